"""One optimizer step is the same step however it is cut: against an oracle in plain PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.trainer.splits import write_split
from trainer.config import TrainingConfig
from trainer.data.shards import PackedSplit

NUM_ROWS = 24
PACKED_BATCH = 16  # more than there are packs: the last micro-batches hold no target at all


def packed(micro_batch_size, **changes):
    return case(micro_batch_size, PACKED_BATCH, packing=True, **changes)


def padded(micro_batch_size, **changes):
    return case(micro_batch_size, NUM_ROWS, packing=False, **changes)


def case(micro_batch_size, global_batch_size, *, packing, name, stage=2, attention="auto", sums="fp32", **training):
    sizes = {"micro_batch_size": micro_batch_size, "global_batch_size": global_batch_size}
    deepspeed = {"stage": stage, "grad_accum_dtype": sums}
    return {
        "name": name,
        "packing": packing,
        "deepspeed": deepspeed,
        "attention": attention,
        "training": sizes | training,
    }


CASES = {
    1: [
        packed(16, name="one-rank-one-micro-batch"),
        packed(8, name="one-rank-accumulates-2"),
        packed(4, name="one-rank-accumulates-4"),
        packed(4, name="one-rank-unsharded", stage=0),
        padded(6, name="one-rank-padded"),
        packed(4, name="one-rank-sdpa-mask", attention="sdpa"),
    ],
    2: [
        packed(8, name="two-ranks"),
        packed(4, name="two-ranks-accumulate-2"),
        packed(2, name="two-ranks-accumulate-4"),
        packed(1, name="two-ranks-accumulate-8-some-without-targets"),
        packed(4, name="zero-0", stage=0),
        packed(4, name="zero-1", stage=1),
        packed(4, name="zero-3", stage=3),
        padded(6, name="two-ranks-padded"),
        padded(6, name="zero-3-padded-chunked", stage=3, logits_bytes=65536),
        packed(4, name="recomputed", gradient_checkpointing=True),
        packed(4, name="zero-3-recomputed-chunked", stage=3, gradient_checkpointing=True, logits_bytes=65536),
        packed(4, name="chunked", logits_bytes=65536),
        packed(4, name="bf16-zero-0", stage=0, precision="bf16", sums="bf16"),
        packed(4, name="bf16-zero-1", stage=1, precision="bf16"),
        packed(4, name="bf16-zero-2", stage=2, precision="bf16"),
        packed(4, name="bf16-zero-3", stage=3, precision="bf16"),
        packed(4, name="fp16-zero-1", stage=1, precision="fp16"),
        packed(1, name="fp16-zero-2", stage=2, precision="fp16", loss_scale_power=10),
        packed(4, name="fp16-zero-3", stage=3, precision="fp16"),
    ],
    4: [
        packed(4, name="four-ranks"),
        packed(2, name="four-ranks-accumulate-2"),
        packed(1, name="four-ranks-accumulate-4"),
        padded(3, name="four-ranks-padded"),
    ],
}


def start(folder, num_ranks):
    # Started beside its siblings, a launcher finds a free port by itself (--standalone).
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    script = str(Path(__file__).with_name("exactness_worker.py"))
    subprocess.run(
        [*launch, script, str(folder), json.dumps(CASES[num_ranks])],
        check=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_base):
    """The same rows packed and padded, and beside them every case's result."""
    folder = tmp_path_factory.mktemp("exactness")
    for name in ("packed", "padded"):
        for split, num_rows in (("train", NUM_ROWS), ("validation", 4)):
            write_split(folder / name / "data" / split, num_rows, packing=name == "packed")
        (folder / name / "base").symlink_to(tiny_base)
    for num_ranks in CASES:
        start(folder, num_ranks)
    return folder


@pytest.fixture(scope="module")
def oracle(folder, tiny_base):
    """Loss and gradients of the token mean: each row alone, in transformers' own forward pass, no library but torch."""
    split = PackedSplit.open(folder / "packed" / "data" / "train")
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation="eager")
    total, num_targets = torch.zeros(()), 0
    for first, last in zip(split.row_offsets[:-1], split.row_offsets[1:], strict=True):
        ids = torch.tensor(np.array(split.input_ids[first:last]), dtype=torch.int64)[None]
        labels = torch.tensor(np.array(split.labels[first:last]), dtype=torch.int64)
        predictions = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total = total + functional.cross_entropy(predictions, labels[1:], ignore_index=-100, reduction="sum")
        num_targets += int((labels[1:] != -100).sum())
    (total / num_targets).backward()
    return float(total / num_targets), {name: weight.grad for name, weight in model.named_parameters()}


NAMES = [case["name"] for cases in CASES.values() for case in cases]


@pytest.mark.parametrize("name", [name for name in NAMES if "16" not in name])
def test_loss_and_gradients_equal_the_oracle(folder, oracle, name):
    loss, gradients = oracle
    result = torch.load(folder / f"{name}.pt", weights_only=True)
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["gradients"].keys() == gradients.keys()
    for weight, expected in gradients.items():
        error = (result["gradients"][weight] - expected).norm() / expected.norm()
        assert error < 1e-5, f"{weight}: {error:.2g}"


@pytest.mark.parametrize("name", [name for name in NAMES if "16" in name])
def test_in_16_bits_they_equal_it_but_for_rounding(folder, oracle, name):
    loss, gradients = oracle
    result = torch.load(folder / f"{name}.pt", weights_only=True)
    assert result["loss"] == pytest.approx(loss, rel=2e-3)
    for weight, expected in gradients.items():
        error = (result["gradients"][weight] - expected).norm() / expected.norm()
        assert error < (5e-3 if "fp16" in name else 2e-2), f"{weight}: {error:.2g}"


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_s_norm_is_told_and_the_optimizer_has_counted_one_step(folder, oracle, name):
    norm = torch.nn.utils.get_total_norm(list(oracle[1].values())).item()
    result = torch.load(folder / f"{name}.pt", weights_only=True)
    assert result["norm"] == pytest.approx(norm, rel=2e-2 if "16" in name else 1e-5)
    assert result["steps"] == 1


def test_some_micro_batches_hold_no_target(folder):
    assert PackedSplit.open(folder / "packed" / "data" / "train").num_packs < PACKED_BATCH - 1


def test_collectives_of_every_group_outlast_a_hang(folder):
    """The world's group as `join` made it, then all groups, DeepSpeed's own among them: more than hang_timeout_s."""
    timeouts = torch.load(folder / "two-ranks.pt", weights_only=True)["timeouts"]
    assert len(timeouts) >= 3
    assert set(timeouts) == {1980.0}
    assert TrainingConfig().hang_timeout_s == 1800
