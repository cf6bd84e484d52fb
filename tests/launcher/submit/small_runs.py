"""A small run, and the launcher's commands, for the tests of clusters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def configure(folder: Path, repository: Path, *, training: dict[str, Any] | None = None, **slurm: Any) -> Path:
    tree = {
        "run": {"name": "small", "storage": str(folder)},
        "model": {
            "from_scratch": {
                "vocab_size": 400,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_layers": 2,
                "num_heads": 2,
                "num_kv_heads": 2,
                "max_position_embeddings": 256,
            }
        },
        "data": {"path": "data.json", "sequence_length": 256, "max_test_rows": 8},
        "training": {
            "num_workers": 2,
            "precision": "fp32",
            "num_epochs": 1000,
            "max_steps": 40,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "lr": 2e-3,
            "validate_every": 1000,
            "checkpoint_every": 1000,
        }
        | (training or {}),
        "export": {"vllm_prompts": 0},
        "generation": {"max_model_len": 256, "max_tokens": 16, "cpu_cache_gib": 0.25},
        "cluster": {
            "device": "cpu",
            "slurm": {"nodes": 2, "cpus_per_node": 1, "start_s": 120, "environment": {"PYTHONPATH": str(repository)}}
            | slurm,
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def launcher(
    *words: str | Path, cwd: Path, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *map(str, words)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def until(condition: Callable[[], Any], timeout_s: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


def train_rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["kind"] == "train"]


def log_of(run: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted((run / "slurm").rglob("*.log")))
