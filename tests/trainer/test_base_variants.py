"""New tokens and adapters as bases: trained for a few steps on two ranks, exported, and compared with vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.families import build, five_steps
from tests.trainer.test_adapter import write_adapter
from tests.trainer.test_families import two_engines  # noqa: F401 - a fixture
from trainer.config import TrainerConfig
from trainer.export.stage import export
from trainer.prepare import prepare

pytestmark = pytest.mark.slow
TOKENS = ["<ask>", "<tell>"]
FULL = {"method": "full"}
LORA = {"method": "lora", "rank": 4, "alpha": 16, "targets": ["q_proj", "v_proj"]}
QLORA = LORA | {"method": "qlora"}
# What the base gets, its family, the tuning, the ZeRO stage.
CELLS = {
    "tokens-full-2": ("tokens", "llama-tied", FULL, 2),
    "tokens-full-3": ("tokens", "llama", FULL, 3),
    "tokens-lora-0": ("tokens", "llama", LORA, 0),
    "tokens-lora-1": ("tokens", "llama-tied", LORA, 1),
    "tokens-lora-2": ("tokens", "gemma3_text", LORA, 2),
    "tokens-lora-3": ("tokens", "llama", LORA, 3),
    "tokens-tied-lora-3": ("tokens", "llama-tied", LORA, 3),
    "tokens-qlora-2": ("tokens", "llama", QLORA, 2),
    "tokens-dora-2": ("tokens", "llama", LORA | {"dora": True}, 2),
    "adapter-lora-2": ("adapter", "llama", LORA, 2),
    "adapter-lora-3": ("adapter", "llama-tied", LORA, 3),
    "adapter-qlora-1": ("adapter", "llama", QLORA, 1),
    "adapter-full-2": ("adapter", "llama", FULL, 2),
    "adapter-full-3": ("adapter", "llama", FULL, 3),
}


def values(folder: Path, cell: str) -> dict:
    what, family, tuning, stage = CELLS[cell]
    more = {"new_tokens": TOKENS} if what == "tokens" else {"adapter": str(folder / "adapters" / family)}
    return {
        "model": {"name_or_path": str(folder / "bases" / family)} | more,
        "data": {"path": str(folder / "rows.json"), "sequence_length": 250, "num_processes": 1},
        "tuning": tuning,
        "training": five_steps(1e-3 if tuning == FULL else 1e-2),
        "deepspeed": {"stage": stage},
        "export": {"vllm_prompts": 4, "merge": what == "tokens" and tuning != FULL},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_tokenizer):
    """A folder with a run for each cell, all trained by one pair of processes."""
    folder = tmp_path_factory.mktemp("variants")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [{"instruction": f"<ask>{n} {word}.", "output": f"<tell>{word} {n}"} for n in range(12) for word in words]
    (folder / "rows.json").write_text(json.dumps(rows))
    for cell, (what, family, _, _) in CELLS.items():
        base = folder / "bases" / family
        if not base.exists():
            build(family, tiny_tokenizer, base)
        if what == "adapter" and not (folder / "adapters" / family).exists():
            write_adapter(base, folder / "adapters" / family)
        run_dir = folder / "runs" / cell
        prepare(TrainerConfig.model_validate(values(folder, cell)), run_dir)
        (run_dir / "cell.json").write_text(json.dumps(values(folder, cell)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("matrix_worker.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, script, str(folder / "runs")], check=True, timeout=560, env=environment)
    return folder


def validation_losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "validation"]


@pytest.mark.parametrize(
    "cells",
    [
        ("tokens-lora-0", "tokens-lora-3"),
        ("tokens-lora-1", "tokens-tied-lora-3"),
        ("adapter-full-2", "adapter-full-3"),
    ],
)
def test_stages_learn_the_same(trained, cells):
    losses = [validation_losses(trained / "runs" / cell) for cell in cells]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_it_learns_and_vllm_answers_as_trained(trained, two_engines, cell):  # noqa: F811
    run_dir = trained / "runs" / cell
    first, last = validation_losses(run_dir)
    what, family, tuning, _ = CELLS[cell]
    counts = export(TrainerConfig.model_validate(values(trained, cell)), run_dir)
    print(json.dumps({"cell": cell, "losses": [first, last], **counts}))
    assert last < first - 0.01
    merged = tuning == FULL or what == "tokens"
    assert counts["kind"] == ("weights" if merged else "adapter")
    assert counts["vllm"]["disagreements"] == []
    if what == "tokens":
        model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
        tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
        plain = AutoModelForCausalLM.from_pretrained(trained / "bases" / family)
        ids = tokenizer.convert_tokens_to_ids(TOKENS)
        matrix, before = (one.get_input_embeddings().weight for one in (model, plain))
        assert ids == [258, 259]
        moved = (matrix[:300] - before).abs().amax(1) > 1e-5
        assert moved[ids].all()
        if tuning != FULL:
            assert torch.nonzero(moved).flatten().tolist() == ids
