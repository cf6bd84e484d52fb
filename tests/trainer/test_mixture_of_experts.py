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

from tests.trainer.families import MIXTURES, build
from tests.trainer.splits import write_split
from trainer.config import ModelConfig
from trainer.data.batches import Batches
from trainer.data.shards import PackedSplit
from trainer.model import load_base, return_the_loss

CASES = [
    {"name": f"zero-{stage}", "packing": True, "stage": stage, "deepspeed": {}, "training": sizes | options}
    for stage, options in ((2, {}), (3, {}), (3, {"gradient_checkpointing": True}))
    for sizes in ({"micro_batch_size": 1, "global_batch_size": 16},)
]
CASES[-1]["name"] = "zero-3-recomputed"


@pytest.fixture(scope="module", params=MIXTURES)
def folder(request, tmp_path_factory, tiny_tokenizer):
    """Packed rows in packed/data, a mixture of experts in packed/base."""
    folder = tmp_path_factory.mktemp(request.param)
    for split, num_rows in (("train", 24), ("validation", 4)):
        write_split(folder / "packed" / "data" / split, num_rows)
    build(request.param, tiny_tokenizer, folder / "packed" / "base")
    return folder


@pytest.fixture(scope="module")
def steps(folder):
    """One step of each case, saved by two ranks beside the rows."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("exactness_worker.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, script, str(folder), json.dumps(CASES)], check=True, timeout=240, env=environment)
    return {case["name"]: torch.load(folder / f"{case['name']}.pt", weights_only=True) for case in CASES}


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


def test_packs_have_transformers_own_loss_and_gradients(folder):
    split = PackedSplit.open(folder / "packed" / "data" / "train")
    base = ModelConfig(name_or_path=str(folder / "packed" / "base"))
    model = load_base(base, folder, torch.float32, torch.device("cpu"), 96)
    return_the_loss(model)
    sizes = {"global_batch_size": 16, "micro_batch_size": 4, "rank": 0, "world_size": 1}
    step = Batches(split, seed=0, **sizes).step(0, 0)
    total = sum(model(**micro_batch) for micro_batch in step.micro_batches) / step.num_target_tokens
    total.backward()
    loss, gradients = transformers_loss(folder)
    assert sum("experts" in name or "gate" in name for name in gradients) >= 6  # router and fused experts, two layers
    assert float(total) == pytest.approx(loss, rel=1e-6)
    compare({name: weight.grad for name, weight in model.named_parameters()}, gradients)


@pytest.mark.slow
def test_two_ranks_of_every_stage_take_the_same_step(folder, steps):
    loss, gradients = transformers_loss(folder)
    for result in steps.values():
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
        compare(result["gradients"], gradients)


def compare(found, gradients):
    assert found.keys() == gradients.keys()
    for weight, expected in gradients.items():
        error = (found[weight] - expected).norm() / expected.norm()
        assert error < 1e-5, f"{weight}: {error:.2g}"
