"""Target tokens a second of this trainer beside TRL's SFTTrainer, and of two workers beside one.

The same rows, tiny Llama (4 layers, width 192), precision, packs and threads in one run on one machine:

    python tests/benchmarks/training_speed.py [--steps 30] [--rounds 3] [--json FILE]

Each figure is the mean number of target tokens of a step over the time of the 10% fastest steps behind the first five,
over all rounds, which other work on the machine disturbs least; the medians stand beside it.

TRL packs by "bfd" without padding: where there is no FlashAttention, its attention scores all pairs of a micro-batch's
tokens under a mask, where ours scores each document alone. That is most of the difference on CPUs.

Two busy cores of one machine are each slower than one alone, for they share its memory. So two workers are also held
against two that know nothing of each other, trained at the same time: what is missing there is the workers' own doing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

SEQUENCE_LENGTH = 512
GLOBAL_BATCH = 6
MICRO_BATCH = 3
WARM_UP = 5
RATE = 1e-3


def make_run(run_dir: Path, num_rows: int) -> None:
    """Write packed splits of short rows (20 to 70 tokens, the second half is the answer) and the untrained base.

    Args:
        run_dir: Becomes a run folder as prepare leaves it.
        num_rows: Rows to train on.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from trainer.config import FromScratch
    from trainer.data.shards import SplitWriter
    from trainer.scratch import build_from_scratch

    for name, count in (("train", num_rows), ("validation", 20)):
        writer = SplitWriter(run_dir / "data" / name)
        for number, ids in enumerate(rows(count)):
            labels = np.where(np.arange(len(ids)) < len(ids) // 2, -100, ids)
            writer.add_row(str(number), ids, labels)
        writer.finish(sequence_length=SEQUENCE_LENGTH, packing=True, pad_token_id=511, seed=0)
    vocabulary = {str(number): number for number in range(510)} | {"</s>": 510, "<pad>": 511}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")), eos_token="</s>", pad_token="<pad>"
    )
    build_from_scratch(FromScratch(), tokenizer, seed=0, folder=run_dir / "base")


def rows(count: int) -> list[np.ndarray]:
    """Arithmetic sequences of token ids below 500."""
    generator = np.random.default_rng(0)
    spans = [(generator.integers(20, 71), generator.integers(0, 500), generator.integers(1, 4)) for _ in range(count)]
    return [(first + np.arange(length) * stride) % 500 for length, first, stride in spans]


def ours(run_dir: Path, num_workers: int, steps: int, precision: str) -> dict[str, Any]:
    """Train by torchrun with one thread a worker.

    Args:
        run_dir: From make_run.
        num_workers: Ranks.
        steps: Optimizer steps.
        precision: bf16 or fp32.

    Returns:
        step_s of each step, target_tokens of a step on average, and the largest share of a step spent waiting for data.
    """
    for old in (run_dir / "metrics.jsonl", run_dir / "checkpoints"):
        subprocess.run(["rm", "-rf", str(old)], check=True)
    content = {
        "model": {"from_scratch": {}},
        "data": {"path": "rows.json", "sequence_length": SEQUENCE_LENGTH},
        "training": {
            "num_workers": num_workers,
            "precision": precision,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": MICRO_BATCH,
            "num_epochs": 1000,
            "max_steps": steps,
            "lr": RATE,
            "validate_every": steps,
            "checkpoint_every": steps,
        },
    }
    (run_dir / "run.yaml").write_text(yaml.safe_dump(content))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}"]
    command = [*launch, "-m", "trainer.worker", str(run_dir / "run.yaml"), "--run-dir", str(run_dir)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    taken = [row for row in metrics if row["kind"] == "train"][WARM_UP:]
    return {
        "step_s": [row["step_s"] for row in taken],
        "target_tokens": statistics.mean(row["num_target_tokens"] for row in taken),
        "wait_share": max(row["wait_s"] / row["step_s"] for row in taken),
    }


def ours_apart(run_dirs: list[Path], steps: int, precision: str) -> dict[str, Any]:
    """Train in several run folders at the same time, one worker each.

    Args:
        run_dirs: From make_run.
        steps: Optimizer steps.
        precision: bf16 or fp32.

    Returns:
        What ours returned, of all together: each takes a step's target tokens in each step's time.
    """
    with ThreadPoolExecutor(len(run_dirs)) as pool:
        results = list(pool.map(lambda run_dir: ours(run_dir, 1, steps, precision), run_dirs))
    return {
        "step_s": [step for result in results for step in result["step_s"]],
        "target_tokens": sum(result["target_tokens"] for result in results),
    }


def trl_here(run_dir: Path, num_rows: int, steps: int, precision: str) -> dict[str, Any]:
    """Train with TRL's SFTTrainer in this process: bfd packing, loss on the answers, one thread.

    Args:
        run_dir: From make_run.
        num_rows: Rows to train on.
        steps: Optimizer steps.
        precision: bf16 (weights too, as ours) or fp32.

    Returns:
        step_s of each step, and target_tokens of a step on average.
    """
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir / "base")
    data = [
        {"input_ids": ids.tolist(), "completion_mask": [int(i >= len(ids) // 2) for i in range(len(ids))]}
        for ids in rows(num_rows)
    ]
    settings = trl.SFTConfig(
        output_dir=str(run_dir / "trl"),
        packing=True,
        max_length=SEQUENCE_LENGTH,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=GLOBAL_BATCH // MICRO_BATCH,
        max_steps=steps,
        learning_rate=RATE,
        completion_only_loss=True,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=precision == "bf16",
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "bfloat16" if precision == "bf16" else "float32"},
    )
    trainer = trl.SFTTrainer(
        str(run_dir / "base"),
        args=settings,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
    )
    counts, num_collated, times = [0], [0], [0.0]
    collate = trainer.data_collator

    def counting(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = collate(examples)
        counts[0] += int((batch["labels"] != -100).sum())
        num_collated[0] += 1
        return batch

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times[-1] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] = time.perf_counter() - times[-1]
            times.append(0.0)

    trainer.data_collator = counting
    trainer.add_callback(Clock())
    trainer.train()
    return {"step_s": times[WARM_UP:-1], "target_tokens": counts[0] / num_collated[0] * GLOBAL_BATCH / MICRO_BATCH}


def trl(run_dir: Path, num_rows: int, steps: int, precision: str) -> dict[str, Any]:
    """The same in a process of its own.

    Args:
        run_dir: From make_run.
        num_rows: Rows to train on.
        steps: Optimizer steps.
        precision: bf16 or fp32.

    Returns:
        What trl_here returned.
    """
    options = ["--trl-in", str(run_dir), "--rows", str(num_rows), "--steps", str(steps), "--precision", precision]
    command = [sys.executable, __file__, *options]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, env=quiet, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """One figure out of several rounds.

    Args:
        rounds: What ours or trl returned, once a round.

    Returns:
        target_tokens_per_s in the fastest tenth of the steps, its median, the number of steps, the largest wait.
    """
    steps = sorted(step for result in rounds for step in result["step_s"])
    target_tokens = statistics.mean(result["target_tokens"] for result in rounds)
    return {
        "target_tokens_per_s": target_tokens / statistics.mean(steps[: max(1, len(steps) // 10)]),
        "median_target_tokens_per_s": target_tokens / statistics.median(steps),
        "num_steps": len(steps),
        "largest_wait_share": max(result.get("wait_share", 0.0) for result in rounds),
    }


def main() -> None:
    """Measure, print the ratios, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trl-in", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.trl_in:
        print(json.dumps(trl_here(asked.trl_in, asked.rows, asked.steps, asked.precision)))
        return
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        make_run(run_dir, asked.rows)
        beside = Path(folder) / "beside"
        make_run(beside, asked.rows)
        rounds: dict[str, list[dict[str, Any]]] = {"one_worker": [], "trl": [], "two_workers": [], "two_apart": []}
        for _ in range(asked.rounds):
            rounds["one_worker"].append(ours(run_dir, 1, asked.steps, asked.precision))
            rounds["trl"].append(trl(run_dir, asked.rows, asked.steps, asked.precision))
            rounds["two_workers"].append(ours(run_dir, 2, asked.steps, asked.precision))
            rounds["two_apart"].append(ours_apart([run_dir, beside], asked.steps, asked.precision))
    result: dict[str, Any] = {name: summary(results) for name, results in rounds.items()}
    alone = result["one_worker"]["target_tokens_per_s"]
    result["one_worker_over_trl"] = alone / result["trl"]["target_tokens_per_s"]
    for name in ("two_workers", "two_apart"):
        result[f"{name}_over_one"] = result[name]["target_tokens_per_s"] / alone
    packages = ("torch", "deepspeed", "transformers", "trl")
    result |= {"precision": asked.precision, "cpus": os.cpu_count(), "machine": platform.processor()}
    result["versions"] = {package: version(package) for package in packages}
    print(json.dumps(result, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
