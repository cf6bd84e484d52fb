"""Runs in fp16, with 8-bit moments, and with the optimizer on a disk: killed, they go on as if they had not been."""

import shutil

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder

from tests.trainer.resumed_runs import rows, set_options, train, write_run
from tests.trainer.test_resume import assert_same_run, fresh_copy
from trainer.config import FromScratch
from trainer.scratch import build_from_scratch

pytestmark = pytest.mark.slow
VARIANTS = {
    "8bit-zero0": (0, {"optimizer": "adamw_8bit"}),
    "8bit-zero2": (2, {"optimizer": "adamw_8bit"}),
    "8bit-zero3-bf16": (3, {"optimizer": "adamw_8bit", "precision": "bf16"}),
    "fp16-zero1": (1, {"precision": "fp16", "loss_scale_power": 32}),
    "fp16-zero3": (3, {"precision": "fp16", "loss_scale_power": 32}),
}


@pytest.fixture
def train_whole(tmp_path, tiny_base):
    def of(variant):
        stage, training = VARIANTS[variant]
        run_dir = write_run(tmp_path / "whole", tiny_base, stage=stage, **training)
        done = train(run_dir, fp16_on_cpu=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return run_dir

    return of


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(train_whole, tmp_path, variant):
    whole = train_whole(variant)
    run_dir = fresh_copy(whole, tmp_path / "run")
    assert train(run_dir, kind="SIGKILL", step=5, fp16_on_cpu=True).returncode != 0
    again = train(run_dir, fp16_on_cpu=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same_run(run_dir, whole)
    scales = [[row.get("loss_scale") for row in rows(run, "train")] for run in (run_dir, whole)]
    assert scales[0] == scales[1]


def test_8_bit_moments_are_not_taken_over_by_another_layout_or_optimizer(train_whole):
    run_dir = train_whole("8bit-zero2")
    set_options(run_dir, "training", max_steps=10)
    for change, words in (("adamw", "adamw can't take over"), ("adamw_8bit", "num_workers 1 and deepspeed.stage 2")):
        set_options(run_dir, "training", optimizer=change, num_workers=2 if change == "adamw" else 1)
        refused = train(run_dir, 2 if change == "adamw" else 1)
        assert refused.returncode != 0
        assert "holds the moments of AdamW8bit with training.num_workers 2 and deepspeed.stage 2" in refused.stderr
        assert words in refused.stderr


@pytest.fixture
def larger_base(tmp_path, tiny_tokenizer):
    """Its MLP is large enough for DeepSpeed to swap: it leaves tensors below 1 MiB a rank in memory."""
    heads = {"num_heads": 4, "num_kv_heads": 4}
    sizes = FromScratch(vocab_size=300, hidden_size=512, intermediate_size=2048, num_layers=1, **heads)
    build_from_scratch(sizes, tiny_tokenizer, seed=0, folder=tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run_on_disk(tmp_path, larger_base):
    """A run with its optimizer in memory, and a copy of it with what is named on a disk, killed and gone on with."""

    def of(**on_disk):
        in_memory = write_run(tmp_path / "memory", larger_base, stage=3)
        set_options(in_memory, "deepspeed", offload_optimizer="cpu")
        done = train(in_memory, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        run_dir, disk = fresh_copy(in_memory, tmp_path / "run"), tmp_path / "disk"
        set_options(run_dir, "deepspeed", nvme_path=str(disk), **on_disk)
        disk.mkdir()
        assert train(run_dir, kind="SIGKILL", step=5, timeout=240).returncode != 0
        swapped = {path.relative_to(disk): path.stat().st_size for path in disk.rglob("*.swp")}
        shutil.rmtree(disk)
        disk.mkdir()
        again = train(run_dir, timeout=240)
        assert again.returncode == 0, again.stderr[-3000:]
        return in_memory, run_dir, swapped

    return of


@pytest.mark.skipif(not AsyncIOBuilder().is_compatible(verbose=False), reason="needs libaio and its headers")
@pytest.mark.parametrize("on_disk", [("offload_optimizer",), ("offload_optimizer", "offload_parameters")])
def test_what_lies_on_a_disk_trains_the_same_and_is_restored(run_on_disk, on_disk):
    in_memory, run_dir, swapped = run_on_disk(**dict.fromkeys(on_disk, "nvme"))
    assert sum(size for path, size in swapped.items() if "optimizer" in str(path)) > 2**20
    assert any("param" in str(path) for path in swapped) == ("offload_parameters" in on_disk)
    assert_same_run(run_dir, in_memory)
