"""Small runs for the tests of resuming: written once, copied, trained by torchrun, compared tensor by tensor."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from safetensors import safe_open

from tests.trainer.splits import PAD, write_split
from trainer.data.shards import SplitWriter

STEPS = 8


def write_run(run_dir: Path, base: Path, *, tuning=None, stage=2, attention_dropout=0.1, **training):
    """A prepared run: packed rows, dropout on, steps_per_epoch 5, so that step 8 lies in the middle of an epoch."""
    shutil.copytree(base, run_dir / "base")
    model_config = json.loads((run_dir / "base" / "config.json").read_text())
    (run_dir / "base" / "config.json").write_text(json.dumps(model_config | {"attention_dropout": attention_dropout}))
    (run_dir / "data").mkdir()
    write_split(run_dir / "data" / "train", 40)
    write_split(run_dir / "data" / "validation", 6, seed=1)
    content = {
        "run": {"seed": 3},
        "model": {"from_scratch": {"vocab_size": 300}, "attention": "eager"},
        "data": {"path": "rows.json", "sequence_length": 96},
        "tuning": tuning or {"method": "full"},
        "training": {
            "num_workers": 2,
            "precision": "fp32",
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "max_steps": STEPS,
            "num_epochs": 10,
            "lr": 1e-3,
            "checkpoint_every": 3,
            "validate_every": 4,
            "weight_decay": 0.1,
        }
        | training,
        "deepspeed": {"stage": stage},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(content))
    return run_dir


def write_poisoned_split(folder: Path):
    """40 rows; row-17 alone holds token 255."""
    generator = np.random.default_rng(0)
    writer = SplitWriter(folder)
    for number in range(40):
        ids = generator.integers(0, 250, 40)
        ids[20] = 255 if number == 17 else ids[20]
        writer.add_row(f"row-{number}", ids, np.where(np.arange(40) < 10, -100, ids))
    return writer.finish(sequence_length=96, packing=True, pad_token_id=PAD, seed=0)


def set_options(run_dir: Path, section: str, **values):
    """Change a section of the run's configuration."""
    content = yaml.safe_load((run_dir / "config.yaml").read_text())
    content[section] |= values
    (run_dir / "config.yaml").write_text(yaml.safe_dump(content))


def train(run_dir: Path, num_ranks=2, *, timeout=120, **what) -> subprocess.CompletedProcess:
    """Train the run under torchrun, with something happening to it where `what` says so."""
    script = Path(__file__).with_name("dying_worker.py")
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", str(num_ranks), script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [run_dir / "config.yaml", run_dir, json.dumps({"delay_s": 0.0, "rank": 1} | what)]
    return subprocess.run(
        [str(part) for part in [*command, *arguments]],
        env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def rows(run_dir: Path, kind: str):
    """The rows of one kind in metrics.jsonl."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def losses(run_dir: Path):
    """(kind, step, loss) of every row of the metrics, in the order of the file.

    Checkpoints are left out: their rows come when they are sealed, which the disk decides.
    """
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["kind"], row["step"], row.get("loss")) for row in found if row["kind"] != "checkpoint"]


def starts(run_dir: Path):
    """At which step each start of the run began."""
    return [int(line) for line in (run_dir / "starts.txt").read_text().split()]


def tensors(run_dir: Path, step: int):
    """Every tensor of a checkpoint, generators too, by file and name."""
    found = {}
    for path in sorted((run_dir / "checkpoints" / f"step-{step}").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {(path.name, key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found
