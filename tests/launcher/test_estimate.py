"""Memory, traffic and steps told before a run: by hand-computed numbers, and against what a real run takes."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config import RunConfig, load_config
from launcher.estimate import memory, scale, shapes, text
from launcher.estimate.memory import GIB, host_of, memory_of
from launcher.estimate.shapes import Shape, trained_weights
from launcher.estimate.traffic import traffic_of
from launcher.quickstart_data import write_quickstart_data
from launcher.ray_cluster import Resources

ANYWHERE = Resources(num_cpus=64, num_gpus=8, source="a cluster")
# Llama-3.1-8B: the count is the one of its safetensors files.
LLAMA_8B = Shape(8_030_261_248, hidden=4096, intermediate=14336, num_layers=32, kv_width=1024, vocab_size=128_256)


@pytest.fixture
def eight_b(repository: Path) -> RunConfig:
    return load_config(repository / "configs/8b.yaml", ["judge={type: reference}", "cluster.gpu_memory_gib=80"])


def changed(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def test_weights_are_counted_from_sizes_as_the_model_has_them() -> None:
    named = shapes.shape_named("meta-llama/Llama-3.1-8B-Instruct")
    assert named is not None
    assert vars(named) | {"attention": None, "max_positions": None} == vars(LLAMA_8B)


def test_zero_shares_by_hand(eight_b: RunConfig) -> None:
    # bf16 weights 2 bytes, fp32 master and two moments 12; 8 ranks.
    n = LLAMA_8B.num_weights
    told = {stage: memory_of(changed(eight_b, "deepspeed", stage=stage), LLAMA_8B, on_gpu=True) for stage in range(4)}
    assert [told[stage].weights for stage in range(4)] == [2 * n, 2 * n, 2 * n, 2 * n // 8]
    assert [told[stage].optimizer for stage in range(4)] == [12 * n, 12 * n // 8, 12 * n // 8, 12 * n // 8]


def test_gradients_by_hand(eight_b: RunConfig) -> None:
    n = LLAMA_8B.num_weights
    share = 4 * n // 8  # fp32 sums of a rank's share of the weights

    def told(**deepspeed: Any) -> int:
        return memory_of(changed(eight_b, "deepspeed", **deepspeed), LLAMA_8B, on_gpu=True).gradients

    # 16-bit sums, and their fp32 copy in the step.
    kept = [told(stage=stage, grad_accum_dtype="bf16") for stage in range(4)]
    assert kept == [6 * n, 2 * n + share, 6 * n // 8, 6 * n // 8]
    # fp32 sums: of all weights, of a share, and in stage 3 that share's copy in parts of a milliard weights.
    assert [told(stage=stage) for stage in (1, 2, 3)] == [4 * n, share, share + 4 * 10**9]
    # With the optimizer on the host the sums of stages 1 and 2 stay on the GPU.
    offloaded = [told(stage=stage, offload_optimizer="cpu") for stage in (1, 2, 3)]
    assert offloaded == [4 * n + share, share, 0]
    assert [told(stage=stage, offload_optimizer="cpu", grad_accum_dtype="bf16") for stage in (1, 2, 3)] == [0, 0, 0]
    fp32 = changed(changed(eight_b, "training", precision="fp32"), "deepspeed", stage=2)
    assert memory_of(fp32, LLAMA_8B, on_gpu=True).gradients == share


def test_a_bucket_that_is_reduced_in_fp32_is_copied(eight_b: RunConfig) -> None:
    def told(**deepspeed: Any) -> int:
        return memory_of(changed(eight_b, "deepspeed", **deepspeed), LLAMA_8B, on_gpu=True).buffers

    bucket = eight_b.deepspeed.bucket_elements
    copies = [told(stage=stage) - told(stage=stage, grad_accum_dtype="bf16") for stage in (1, 2, 3)]
    assert copies == [0, 4 * bucket, 8 * bucket]


def test_what_is_offloaded_leaves_the_gpu(eight_b: RunConfig) -> None:
    n = LLAMA_8B.num_weights
    everything = changed(eight_b, "deepspeed", stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    told = memory_of(everything, LLAMA_8B, on_gpu=True)
    assert (told.weights, told.gradients, told.optimizer) == (0, 0, 0)
    assert host_of(everything, LLAMA_8B) == (16 + 2) * n // 8
    assert host_of(eight_b, LLAMA_8B) == 0
    # On a CPU it is the same memory; moments of 8 bits are smaller there too.
    assert memory_of(everything, LLAMA_8B, on_gpu=False) == memory_of(
        changed(eight_b, "deepspeed", stage=3), LLAMA_8B, on_gpu=False
    )
    assert (
        memory_of(changed(eight_b, "training", optimizer="adamw_8bit"), LLAMA_8B, on_gpu=True).optimizer == 6 * n // 8
    )


def test_activations_by_hand(eight_b: RunConfig) -> None:
    # A layer, a token: two norms of 4 + 2 x 2 bytes, four and a half widths of attention in bf16, four MLP widths.
    layer = 2 * 4096 * 8 + (2 * 4096 + 2 * 1024) * 2 + 4096 * 2 + 4 * 14336 * 2
    ends = 4096 * 10
    every = memory_of(changed(eight_b, "training", gradient_checkpointing=False), LLAMA_8B, on_gpu=True)
    few = memory_of(eight_b, LLAMA_8B, on_gpu=True)
    assert every.activations == 4096 * (32 * layer + ends)
    assert few.activations == 4096 * (32 * 4096 * 2 + layer + ends)


def test_adapters_by_hand(eight_b: RunConfig) -> None:
    tree = eight_b.model_dump(mode="json") | {"tuning": {"method": "qlora", "rank": 8}, "deepspeed": {"stage": 2}}
    config = RunConfig.model_validate(tree)
    by_hand = 32 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert trained_weights(config, LLAMA_8B) == by_hand == 20_971_520
    assert traffic_of(config, LLAMA_8B).export == 2 * by_hand
    assert memory_of(config, LLAMA_8B, on_gpu=True).weights == 2 * by_hand + int(0.55 * LLAMA_8B.num_weights)


def test_traffic_by_hand(eight_b: RunConfig) -> None:
    # 32 packs over 8 ranks: 4 micro-batches. Stage 3 gathers bf16 weights twice and reduces once in each of them.
    n = LLAMA_8B.num_weights

    def sent(**deepspeed: Any) -> int:
        return traffic_of(changed(eight_b, "deepspeed", **deepspeed), LLAMA_8B).network

    assert sent() == (2 * 2 + 4) * n * 4 * 7 // 8
    assert sent(stage=2) == n * (4 * 4 + 2) * 7 // 8
    assert sent(stage=1) == n * (2 * 4 + 2) * 7 // 8
    # Gradients summed in bf16 are sent in bf16.
    assert sent(grad_accum_dtype="bf16") == 3 * n * 4 * 2 * 7 // 8
    assert sent(stage=2, grad_accum_dtype="bf16") == n * (4 + 1) * 2 * 7 // 8
    assert [sent(stage=stage, grad_accum_dtype="bf16") for stage in (0, 1)] == [2 * n * 2 * 7 // 8] * 2
    assert traffic_of(eight_b, LLAMA_8B).checkpoint == 12 * n


def test_what_cannot_fit_is_refused_with_the_nearest_that_can(
    eight_b: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "shape_of", lambda *_: LLAMA_8B)
    assert memory.problems(eight_b, ANYWHERE, on_gpu=True) == []
    unsharded = changed(eight_b, "deepspeed", stage=0)
    (problem,) = memory.problems(unsharded, ANYWHERE, on_gpu=True)
    assert "for each GPU, which has 80.0 GiB" in problem
    assert problem.endswith("the nearest setting that fits: deepspeed.stage=2")
    way_out = changed(unsharded, "deepspeed", stage=2)
    assert memory.problems(way_out, ANYWHERE, on_gpu=True) == []
    small = changed(unsharded, "cluster", gpu_memory_gib=24)
    (problem,) = memory.problems(small, ANYWHERE, on_gpu=True)
    assert problem.endswith("deepspeed.stage=3 training.num_workers=16"), problem
    (problem,) = memory.problems(changed(unsharded, "cluster", gpu_memory_gib=2), ANYWHERE, on_gpu=True)
    assert problem.endswith("no setting that was tried fits")


def test_steps_time_and_cost(eight_b: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "shape_of", lambda *_: None)
    assert "launcher prepare" in "\n".join(text.describe(eight_b, tmp_path, on_gpu=True))
    (tmp_path / "data").mkdir()
    train = {"packs": 1000, "tokens": 4_000_000}
    (tmp_path / "data/summary.json").write_text(json.dumps({"splits": {"train": train}}))
    lines = "\n".join(text.describe(eight_b, tmp_path, on_gpu=True, tokens_per_s=10_000, price=2.5))
    assert "96 over 1,000 packs an epoch, 12,000,000 tokens" in lines  # 3 epochs of 32 steps
    assert "0.33 hours of training at 10,000 tokens/s: 2.67 GPU hours, 6.67 at 2.5 an hour" in lines


def test_how_it_grows(eight_b: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "shape_of", lambda *_: LLAMA_8B)
    header, *rows, sources = scale.scale(eight_b, tmp_path, network_bytes_per_s=10e9)
    assert [row.split()[0] for row in rows] == ["1", "8", "64", "512", "1,000"]
    eight = changed(eight_b, "training", num_workers=8)
    assert text.in_gib(memory_of(eight, LLAMA_8B, on_gpu=True).total) in rows[1]
    assert f"{traffic_of(eight, LLAMA_8B).network / 10e9:.2f}" in rows[1]
    assert "2.11 days" in rows[-1]  # 264 days over 125 nodes
    assert "arXiv:2407.21783" in sources
    assert len({len(row) for row in (header, *rows)}) == 1


def test_what_failures_cost_is_told_with_what_was_measured(
    eight_b: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "shape_of", lambda *_: LLAMA_8B)
    config = changed(eight_b, "training", checkpoint_every=500)

    def told() -> str:
        lines = text.describe(config, tmp_path, on_gpu=True, tokens_per_s=4096 * 32)
        return next(line for line in lines if line.startswith("failures"))

    # 96 GB at 1 GB/s; a step of 32 packs of 4,096 tokens takes a second.
    assert "one in 264 days on 1 node; a checkpoint about every 18.4 h loses least" in told()
    assert "every 500 steps is every 8.33 min, and loses 16.16%" in told()
    (tmp_path / "metrics.jsonl").write_text('{"kind": "checkpoint", "step": 5, "stalled_s": 2.0}\n')
    assert "every 500 steps is every 8.33 min, and loses 0.40%" in told()


def test_the_examples_of_times_hold() -> None:
    assert doctest.testmod(text).failed == 0


# For glibc: blocks of this size and more are given back when they are freed, so that what is held is what is needed.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**19), "MALLOC_TRIM_THRESHOLD_": str(2**19)}
CASES = [
    pytest.param({"precision": "fp32"}, 2, id="fp32-zero2", marks=pytest.mark.slow),
    pytest.param({"precision": "fp32"}, 0, id="fp32-zero0", marks=pytest.mark.slow),
    pytest.param({"precision": "bf16"}, 2, id="bf16-zero2", marks=pytest.mark.slow),
    pytest.param({"precision": "bf16"}, 3, id="bf16-zero3", marks=pytest.mark.slow),
    pytest.param({"precision": "fp32", "gradient_checkpointing": True}, 1, id="checkpointing", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("training", "stage"), CASES)
def test_the_estimate_is_what_a_real_run_takes(training: dict[str, Any], stage: int, tmp_path: Path) -> None:
    """Two ranks train a model of 60 million weights for three steps; the largest of them is compared."""
    write_quickstart_data(tmp_path / "data.json", 400, 0)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_layers": 8, "num_heads": 12, "num_kv_heads": 12}
    tree = {
        "run": {"name": "measured", "storage": str(tmp_path)},
        "model": {"from_scratch": sizes | {"vocab_size": 512}},
        "data": {"path": str(tmp_path / "data.json"), "sequence_length": 512},
        "training": {"num_workers": 2, "max_steps": 3, "global_batch_size": 8, "micro_batch_size": 4} | training,
        "deepspeed": {"stage": stage},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "run.yaml")
    program = [sys.executable, "-m", "launcher", "prepare", "run.yaml", "--run-dir", "run"]
    subprocess.run(program, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program += ["-m", "trainer.worker", "run.yaml", "--run-dir", "run"]
    subprocess.run(program, cwd=tmp_path, check=True, capture_output=True, timeout=300, env=os.environ | GIVEN_BACK)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = max(row["memory_bytes"] for row in rows if row["kind"] == "train")
    shape = shapes.shape_of(config)
    assert shape is not None
    train = json.loads((tmp_path / "run/data/summary.json").read_text())["splits"]["train"]
    target_share = train["target_tokens"] / (train["packs"] * 512)
    told = memory_of(config, shape, on_gpu=False, target_share=target_share)
    print(f"{training} stage {stage}: {measured / GIB:.2f} GiB measured, {told.total / GIB:.2f} told: {told}")
    assert told.total == pytest.approx(measured, rel=0.15)
