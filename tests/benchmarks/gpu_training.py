"""Tokens a second, MFU and memory of full, LoRA and QLoRA tuning of Llama shapes with random weights.

On a GPU machine, without Ray:

    python tests/benchmarks/gpu_training.py --shape 8b --gpus 8 --json results.json

On a CPU, to see that it runs:

    python tests/benchmarks/gpu_training.py --shape tiny --gpus 1 --lengths 256 --steps 8

Full tuning of 8b on one GPU of 141 GB needs its optimizer made smaller: --optimizer adamw_8bit, or
--offload-optimizer cpu. Figures are medians over the steps behind the first five of each run. A run that fails is
reported with its last words beside the steps that it took, and does not end the others; the checkpoint at a run's end
is refused where the disk is too small for it, which costs no figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.data.shards import SplitWriter

WARM_UP = 5
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
}
"""Llama 3.2 1B and Llama 3.1 8B; the tiny one is for a try on a CPU."""
METHODS = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 16},
    "qlora": {"method": "qlora", "rank": 16},
}


def make_base(folder: Path, shape: str) -> int:
    """Write a model of this shape with random bf16 weights.

    Args:
        folder: Becomes a Hugging Face folder.
        shape: Key of SHAPES.

    Returns:
        Its vocabulary.
    """
    config = LlamaConfig(max_position_embeddings=131_072, tie_word_embeddings=False, **SHAPES[shape])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return config.vocab_size


def make_data(run_dir: Path, vocabulary: int, length: int, num_packs: int) -> None:
    """Write packs of rows of random tokens, of lognormal lengths around 180 tokens; half of each row is the answer.

    Args:
        run_dir: Becomes a run folder as prepare leaves it.
        vocabulary: Token ids are below.
        length: Of a pack, in tokens.
        num_packs: About how many packs.
    """
    generator = np.random.default_rng(0)
    for split, packs in (("train", num_packs), ("validation", 1)):
        writer = SplitWriter(run_dir / "data" / split)
        left, number = packs * length, 0
        while left > 0:
            size = int(np.clip(generator.lognormal(5.2, 0.8), 8, length))
            ids = generator.integers(10, vocabulary, size)
            writer.add_row(str(number), ids, np.where(np.arange(size) < size // 2, -100, ids))
            left, number = left - size, number + 1
        writer.finish(sequence_length=length, packing=True, pad_token_id=0, seed=0)


def measure(run_dir: Path, base: Path, case: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """Train one case by torchrun and read its metrics.

    Args:
        run_dir: From make_data.
        base: From make_base.
        case: method, stage, length and attention.
        asked: The command's options.

    Returns:
        Medians over the steps taken, and the last words of a run that failed.
    """
    for old in ("metrics.jsonl", "checkpoints"):
        shutil.rmtree(run_dir / old, ignore_errors=True)
        (run_dir / old).unlink(missing_ok=True)
    content = {
        "model": {"name_or_path": str(base), "attention": case["attention"]},
        "data": {"path": "rows.json", "sequence_length": case["length"]},
        "tuning": METHODS[case["method"]],
        "training": {
            "num_workers": asked.gpus,
            "precision": "bf16",
            "optimizer": asked.optimizer if case["method"] == "full" else "adamw",
            "liger_kernels": asked.liger,
            "global_batch_size": asked.gpus * asked.micro_batch_size,
            "micro_batch_size": asked.micro_batch_size,
            "num_epochs": 1000,
            "max_steps": asked.steps,
            "gradient_checkpointing": not asked.keep_activations,
            "validate_every": asked.steps,
            "checkpoint_every": asked.steps + 1,
        },
        "deepspeed": {
            "stage": case["stage"],
            "offload_optimizer": asked.offload_optimizer if case["method"] == "full" else "none",
        },
    }
    (run_dir / "run.yaml").write_text(yaml.safe_dump(content))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={asked.gpus}"]
    command = [*launch, "-m", "trainer.worker", str(run_dir / "run.yaml"), "--run-dir", str(run_dir)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)
    metrics = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    taken = [row for row in rows if row["kind"] == "train"][WARM_UP:]
    if done.returncode:
        case = case | {"error": done.stderr.strip().splitlines()[-25:]}
    if not taken:
        return case
    names = ("tokens_per_s", "step_s", "mfu", "wait_s", "padding_share", "num_tokens")
    medians = {name: statistics.median(row[name] for row in taken) for name in names}
    per_gpu = medians["tokens_per_s"] / asked.gpus
    return case | medians | {"tokens_per_s_per_gpu": per_gpu, "memory_bytes": max(row["memory_bytes"] for row in taken)}


def main() -> None:
    """Measure every method at every length, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument(
        "--stage", type=int, choices=range(4), help="of full tuning; default 3 for several GPUs, else 2"
    )
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--attention", nargs="+", default=["auto"], help="values of model.attention")
    parser.add_argument("--optimizer", default="adamw", help="of full tuning")
    parser.add_argument("--offload-optimizer", choices=["none", "cpu"], default="none", help="of full tuning")
    parser.add_argument("--liger", action="store_true", help="Liger's kernels")
    parser.add_argument("--keep-activations", action="store_true", help="no gradient checkpointing")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where weights, data and a checkpoint go; 115 GB for 8b")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}")
    packages = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {"shape": asked.shape, "gpus": asked.gpus, "device": device, "cases": []}
    result |= {"optimizer": asked.optimizer, "offload_optimizer": asked.offload_optimizer, "liger": asked.liger}
    result["versions"] = {package: version(package) for package in packages}
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        vocabulary = make_base(Path(folder) / "base", asked.shape)
        for length in asked.lengths:
            run_dir = Path(folder) / f"length-{length}"
            make_data(run_dir, vocabulary, length, asked.gpus * asked.micro_batch_size * asked.steps)
            for method, attention in itertools.product(asked.methods, asked.attention):
                stage = asked.stage if asked.stage is not None else 3 if asked.gpus > 1 else 2
                case = {"method": method, "stage": stage if method == "full" else 2, "length": length}
                case |= {"attention": attention}
                result["cases"].append(measure(run_dir, Path(folder) / "base", case, asked))
                print(json.dumps(result["cases"][-1]), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
