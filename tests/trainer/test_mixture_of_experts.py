"""A mixture of experts is trained on transformers' own loss, on two ranks that route their tokens differently."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.trainer.families import build
from tests.trainer.splits import write_split
from trainer.data.shards import PackedSplit

FAMILIES = ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow), pytest.param("olmoe", marks=pytest.mark.slow)]
CASES = [
    {"name": f"zero-{stage}", "packing": True, "stage": stage, "training": sizes | options}
    for stage, options in ((2, {}), (3, {}), (3, {"gradient_checkpointing": True}))
    for sizes in ({"micro_batch_size": 1, "global_batch_size": 16},)
]
CASES[-1]["name"] = "zero-3-recomputed"


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory, tiny_tokenizer):
    """One step of each case, saved by two ranks; the base's folder is packed/base."""
    folder = tmp_path_factory.mktemp(request.param)
    for split, num_rows in (("train", 24), ("validation", 4)):
        write_split(folder / "packed" / "data" / split, num_rows)
    build(request.param, tiny_tokenizer, folder / "packed" / "base")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("exactness_worker.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, script, str(folder), json.dumps(CASES)], check=True, timeout=240, env=environment)
    return folder


def transformers_loss(folder):
    """The token mean of transformers' own loss, each row alone, and its gradients."""
    split = PackedSplit.open(folder / "packed" / "data" / "train")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "packed" / "base", dtype=torch.float32, attn_implementation="eager"
    )
    total, num_targets = torch.zeros(()), 0
    for first, last in zip(split.row_offsets[:-1], split.row_offsets[1:], strict=True):
        ids = torch.tensor(np.array(split.input_ids[first:last]), dtype=torch.int64)[None]
        labels = torch.tensor(np.array(split.labels[first:last]), dtype=torch.int64)[None]
        targets = int((labels[0, 1:] != -100).sum())
        total = total + model(input_ids=ids, labels=labels, use_cache=False).loss * targets
        num_targets += targets
    (total / num_targets).backward()
    return float(total.detach() / num_targets), {name: weight.grad for name, weight in model.named_parameters()}


def test_loss_and_gradients_are_those_of_transformers(folder):
    loss, gradients = transformers_loss(folder)
    assert sum("experts" in name or "gate" in name for name in gradients) >= 6  # router and fused experts, two layers
    for case in CASES:
        result = torch.load(folder / f"{case['name']}.pt", weights_only=True)
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
        assert result["gradients"].keys() == gradients.keys()
        for weight, expected in gradients.items():
            error = (result["gradients"][weight] - expected).norm() / expected.norm()
            assert error < 1e-5, f"{case['name']}, {weight}: {error:.2g}"
