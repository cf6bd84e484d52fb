"""What a checkpoint costs beside a step, written while training goes on and written while it waits.

    python tests/benchmarks/checkpoint_cost.py [--hidden-size 512] [--workers 2] [--json FILE]

Both ways train the same Llama with random weights for 24 steps on this machine, saving every 6; the checkpoint of the
last step, for which there is nothing left to do meanwhile, is left out. Figures are medians, and ratios to a step
beside which nothing was written. Steps that share their cores or disk with the writing thread take longer: `cost` adds
that to the time for which training stood still.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.data.shards import SplitWriter

LENGTH = 256
STEPS, EVERY = 24, 6
WARM_UP = 2


def make_run(run_dir: Path, hidden_size: int) -> int:
    """Write rows of random ids and a base with random weights.

    Args:
        run_dir: Becomes a run folder as prepare leaves it.
        hidden_size: Width of the model.

    Returns:
        Number of weights.
    """
    generator = np.random.default_rng(0)
    for name, count in (("train", 400), ("validation", 2)):
        writer = SplitWriter(run_dir / "data" / name)
        for number in range(count):
            ids = generator.integers(0, 500, LENGTH)
            writer.add_row(str(number), ids, ids)
        writer.finish(sequence_length=LENGTH, packing=True, pad_token_id=511, seed=0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, bos_token_id=None, eos_token_id=510, pad_token_id=511,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(run_dir / "base")
    return model.num_parameters()


def measure(run_dir: Path, workers: int, *, in_background: bool) -> dict[str, float]:
    """Train once.

    Args:
        run_dir: From make_run.
        workers: Ranks, of one thread each.
        in_background: training.checkpoint_in_background.

    Returns:
        Seconds of a step, of the copy, of the writing, for which training stood still; the cost in steps.
    """
    training = {
        "num_workers": workers, "precision": "fp32", "global_batch_size": workers, "micro_batch_size": 1,
        "num_epochs": 100, "max_steps": STEPS, "validate_every": STEPS, "checkpoint_every": EVERY,
        "keep_checkpoints": 1, "checkpoint_in_background": in_background,
    }  # fmt: skip
    content = {
        "model": {"name_or_path": str(run_dir / "base")},
        "data": {"path": "rows.json", "sequence_length": LENGTH},
        "training": training,
    }
    (run_dir / "run.yaml").write_text(yaml.safe_dump(content))
    for old in ("metrics.jsonl", "checkpoints"):
        subprocess.run(["rm", "-rf", str(run_dir / old)], check=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command = [*launch, "-m", "trainer.worker", str(run_dir / "run.yaml"), "--run-dir", str(run_dir)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    return figures([json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()])


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Read the costs off the metrics.

    Args:
        rows: In the order in which they were told: a checkpoint's comes when it is sealed.

    Returns:
        See measure.
    """
    saved = {row["step"]: row for row in rows if row["kind"] == "checkpoint" and row["step"] < STEPS}
    beside: dict[int, list[float]] = {step: [] for step in saved}  # steps taken while that checkpoint was written
    alone: list[float] = []
    writing: int | None = None
    for row in rows:
        if row["kind"] == "checkpoint" and row["step"] == writing:
            writing = None
        if row["kind"] != "train":
            continue
        if writing is not None:
            beside[writing].append(row["step_s"])
        elif row["step"] > WARM_UP:
            alone.append(row["step_s"])
        writing = row["step"] if row["step"] in saved else writing
    step_s = statistics.median(alone)
    lost_s = [row["stalled_s"] + sum(beside[step]) - step_s * len(beside[step]) for step, row in saved.items()]
    found = {
        name: statistics.median(row[name] for row in saved.values()) for name in ("copy_s", "write_s", "stalled_s")
    }
    return {
        "step_s": step_s,
        **found,
        "megabytes": next(iter(saved.values()))["num_bytes"] / 1e6,
        "stalled_in_steps": found["stalled_s"] / step_s,
        "cost_in_steps": statistics.median(lost_s) / step_s,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="What a checkpoint costs beside a step.")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"num_weights": make_run(Path(folder), arguments.hidden_size)}
        for name, in_background in (("in background", True), ("while training waits", False)):
            result[name] = measure(Path(folder), arguments.workers, in_background=in_background)
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
