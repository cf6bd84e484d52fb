"""What `launcher plan` says of a rank's memory, beside what ranks of other shapes really take on this machine's CPU.

    python tests/benchmarks/memory_estimate.py [CASE ...]

Every case trains a few steps, twice, and the figure told is compared with the largest rank's peak (resident): with the
C library's allocator as the trainer sets it, which holds some memory in gaps, and with all blocks of 512 KiB and more
given back as soon as they are freed, which is what the rank needs (and half as fast).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launcher.config import load_config
from launcher.estimate.memory import Memory, memory_of
from launcher.estimate.shapes import shape_of
from launcher.quickstart_data import write_quickstart_data

GIB = 2**30
# For glibc: blocks of this size and more are their own, and nothing freed is kept.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**19), "MALLOC_TRIM_THRESHOLD_": str(2**19)}


@dataclass(frozen=True)
class Case:
    """A shape and a layout; `vocab` is the width of the logits, whatever the tokenizer has."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 512
    length: int = 512
    workers: int = 2
    stage: int = 2
    training: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=lambda: {"method": "full"})


CASES = {
    "nothing": Case(64, 64, 1, 2, 2, length=256),
    "wide": Case(1280, 3584, 3, 20, 20, length=256),
    "deep": Case(384, 1024, 28, 6, 6, length=256, training={"precision": "bf16"}),
    "vocabulary": Case(512, 1408, 4, 8, 8, vocab=32_000, stage=3, training={"precision": "bf16"}),
    "lora": Case(1024, 2816, 8, 16, 16, tuning={"method": "lora", "rank": 16}),
    "long-checkpointed": Case(512, 1408, 12, 8, 8, length=1024, training={"gradient_checkpointing": True}),
    "one-worker": Case(768, 2048, 6, 12, 12, workers=1, stage=0, training={"precision": "bf16"}),
    "grouped": Case(1024, 3072, 4, 16, 4, stage=0, training={"precision": "bf16"}),
    "zero3-fp32": Case(896, 2432, 5, 14, 14, length=256, stage=3),
    "lora-bf16": Case(
        1024, 2816, 10, 16, 8, stage=0, workers=1, training={"precision": "bf16"}, tuning={"method": "lora", "rank": 8}
    ),
    "vocabulary-fp32": Case(384, 1024, 4, 6, 6, vocab=32_000, stage=0),
    "long": Case(512, 1408, 6, 8, 8, length=1024),
    "lora-zero3": Case(1024, 2816, 8, 16, 8, stage=3, tuning={"method": "lora", "rank": 16}),
}


def make_base(case: Case, folder: Path, tokenizer: Path) -> None:
    """A Llama of the case's shape with random weights, beside a small tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_config(case: Case, folder: Path, model: dict[str, Any]) -> Path:
    """The run's YAML file; three optimizer steps of two micro-batches for each rank."""
    training = {
        "num_workers": case.workers,
        "precision": "fp32",
        "max_steps": 3,
        "num_epochs": 10,
        "micro_batch_size": 4,
        "global_batch_size": 8 * case.workers,
        "validate_every": 1000,
        "checkpoint_every": 1000,
    }
    precision = case.training.get("precision", "fp32")
    tree = {
        "run": {"name": "measured", "storage": str(folder)},
        "model": model,
        "data": {"path": str(folder / "data.json"), "sequence_length": case.length},
        "training": training | case.training,
        "deepspeed": {"stage": case.stage, "grad_accum_dtype": "fp32" if case.stage else precision},
        "tuning": case.tuning,
        "cluster": {"device": "cpu"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def call(folder: Path, *words: str, environment: dict[str, str] | None = None) -> None:
    """Run a module of this checkout's Python in a folder; its last words are the error's."""
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=os.environ | quiet | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def make_tokenizer(folder: Path) -> Path:
    """A folder with the tokenizer that a small run from nothing makes."""
    write_quickstart_data(folder / "data.json", 600, 0)
    small = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2}
    write_config(CASES["nothing"], folder, {"from_scratch": small})
    call(folder, "launcher", "prepare", "run.yaml", "--run-dir", "scratch")
    return folder / "scratch" / "base"


def measure(case: Case, folder: Path, tokenizer: Path) -> tuple[Memory, int, int]:
    """Train the case for a few steps, twice.

    Args:
        case: the case.
        folder: an empty folder.
        tokenizer: what `make_tokenizer` returned.

    Returns:
        What is told of a rank once its data is prepared, and bytes of the largest rank: what it held, what it needed.
    """
    write_quickstart_data(folder / "data.json", 1000, 0)
    make_base(case, folder / "model", tokenizer)
    path = write_config(case, folder, {"name_or_path": str(folder / "model")})
    call(folder, "launcher", "prepare", "run.yaml", "--run-dir", "run")
    config = load_config(path)
    shape = shape_of(config)
    assert shape is not None
    train = json.loads((folder / "run" / "data" / "summary.json").read_text())["splits"]["train"]
    share = train["target_tokens"] / (train["packs"] * case.length)
    told = memory_of(config, shape, on_gpu=False, target_share=share)
    return told, peak(case, folder, {}), peak(case, folder, GIVEN_BACK)


def peak(case: Case, folder: Path, environment: dict[str, str]) -> int:
    """Train in the run's folder, which has its data, and tell the largest rank's bytes."""
    for old in ("checkpoints", "metrics.jsonl"):
        subprocess.run(["rm", "-rf", str(folder / "run" / old)], check=True)
    group = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(case.workers)]
    call(folder, *group, "-m", "trainer.worker", "run.yaml", "--run-dir", "run", environment=environment)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return max(row["memory_bytes"] for row in rows if row["kind"] == "train")


def main() -> None:
    """Measure the named cases, or all, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="cases; none is all")
    with tempfile.TemporaryDirectory(prefix="memory-") as top:
        (Path(top) / "first").mkdir()
        tokenizer = make_tokenizer(Path(top) / "first")
        for name in parser.parse_args().cases or CASES:
            folder = Path(top) / name
            folder.mkdir()
            told, held, needed = measure(CASES[name], folder, tokenizer)
            parts = " ".join(f"{part} {size / 2**20:.0f}" for part, size in vars(told).items())
            print(
                f"{name:<18} told {told.total / GIB:.2f} GiB, needed {needed / GIB:.2f}, held {held / GIB:.2f}: "
                f"told/needed {told.total / needed:.2f}, held/told {held / told.total:.2f} ({parts} MiB)",
                flush=True,
            )


if __name__ == "__main__":
    main()
