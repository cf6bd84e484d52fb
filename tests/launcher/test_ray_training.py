"""What is done about a failed attempt: a pure decision."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from launcher import ray_training
from launcher.config import load_config
from launcher.errors import LauncherError
from launcher.estimate.memory import memory_of
from launcher.estimate.shapes import Shape
from launcher.placement import Node
from launcher.ray_cluster import together
from launcher.ray_training import (
    Resume,
    Retry,
    Stop,
    _trainer,
    decide,
    found_by_workers,
    num_oom_kills,
    smaller_setting,
    workers_for,
)
from trainer.config import TrainerConfig, TrainingConfig
from trainer.errors import NotEnoughMemoryError, Preempted, TrainerError


def failed(**by_rank: Exception) -> WorkerGroupError:
    failures = {int(rank[1:]): UserExceptionWithTraceback(cause, "trace") for rank, cause in by_rank.items()}
    return WorkerGroupError("workers failed", failures)


def gone(cause: Exception) -> WorkerHealthCheckFailedError:
    """What Ray Train makes of a worker that no longer answers."""
    return WorkerHealthCheckFailedError("Worker's health check failed", cause)


def test_workers_with_folders_of_their_own_find_what_is_named_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    sections = {"data": {"path": "rows.json"}, "deepspeed": {"nvme_path": "disk", "stage": 3}}
    sections["deepspeed"] |= {"offload_optimizer": "nvme"}
    local = TrainerConfig.model_validate(sections | {"model": {"name_or_path": "model", "adapter": "adapter"}})
    assert found_by_workers(local).model.adapter == f"{tmp_path}/adapter"
    assert found_by_workers(local).model.name_or_path == f"{tmp_path}/model"
    assert found_by_workers(local).deepspeed.nvme_path == tmp_path / "disk"
    far = TrainerConfig.model_validate(sections | {"model": {"name_or_path": "owner/name"}})
    assert found_by_workers(far).model.name_or_path == "owner/name"


def test_a_lost_worker_is_replaced() -> None:
    assert decide(failed(r1=RuntimeError("gone")), failures=1, stalled=0, max_failures=3) == Retry(
        "rank 1: RuntimeError: gone"
    )


def test_many_ranks_make_one_message() -> None:
    error = failed(r0=RuntimeError("peer closed"), r1=RuntimeError("peer closed"))
    assert decide(error, failures=1, stalled=0, max_failures=3) == Retry("rank 0, 1: RuntimeError: peer closed")


def test_restarts_are_bounded() -> None:
    decision = decide(failed(r0=RuntimeError("gone")), failures=4, stalled=1, max_failures=3)
    assert isinstance(decision, Stop)
    assert "attempts: 4, training.max_failures = 3" in decision.cause


def test_two_attempts_without_progress_end_it() -> None:
    decision = decide(failed(r0=RuntimeError("gone")), failures=2, stalled=2, max_failures=9)
    assert isinstance(decision, Stop)
    assert "two attempts in a row ended without a new checkpoint" in decision.cause


def test_what_another_attempt_cannot_mend_stops_at_once() -> None:
    error = failed(r0=RuntimeError("peer closed"), r1=TrainerError("loss is NaN in step 7"))
    assert decide(error, failures=1, stalled=0, max_failures=3) == Stop("loss is NaN in step 7")


def test_a_preempted_run_is_resumed_later() -> None:
    assert decide(failed(r0=Preempted("saved step 7")), failures=1, stalled=0, max_failures=0) == Resume("saved step 7")


SMALLER = "the nearest setting that fits: training.micro_batch_size=1"


@pytest.mark.parametrize(
    ("error", "oom_kills", "words"),
    [
        (NotEnoughMemoryError("rank 1 ran out of memory while training: CUDA out of memory."), 0, "rank 1 ran out of"),
        (gone(OutOfMemoryError("Memory on the node was 61.9GB / 62.0GB")), 0, "rank 1 was killed by Ray, because its"),
        (gone(ActorDiedError()), 2, "the kernel killed 2 processes of this machine because memory ran out"),
    ],
)
def test_memory_that_does_not_suffice_is_not_tried_again(error: Exception, oom_kills: int, words: str) -> None:
    failure = failed(r0=RuntimeError("peer closed"), r1=error)
    decision = decide(failure, failures=1, stalled=0, max_failures=3, oom_kills=oom_kills, smaller=SMALLER)
    assert isinstance(decision, Stop)
    assert words in decision.cause
    assert decision.cause.endswith(f"\n{SMALLER}")


def test_a_worker_that_was_killed_while_memory_sufficed_is_replaced() -> None:
    assert isinstance(decide(failed(r1=gone(ActorDiedError())), failures=1, stalled=0, max_failures=3), Retry)
    peer = failed(r1=RuntimeError("peer closed"))  # killed for memory was something else
    assert isinstance(decide(peer, failures=1, stalled=0, max_failures=3, oom_kills=1), Retry)


def test_kills_are_counted_as_the_kernel_counts_them(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 7\nnuma_hit 1\n")
    assert num_oom_kills(tmp_path / "vmstat") == 7
    assert num_oom_kills(tmp_path / "missing") == 0


def test_the_way_out_of_too_little_memory_needs_less_than_what_failed(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(8_030_261_248, hidden=4096, intermediate=14336, num_layers=32, kv_width=1024, vocab_size=128_256)
    monkeypatch.setattr("launcher.ray_training.shape_of", lambda _: shape)
    config = load_config(repository / "configs/8b.yaml", ["judge={type: reference}", "deepspeed.stage=2"])
    words = smaller_setting(config, 80 * 2**30, on_gpu=True)
    assert "of 80.0 GiB for a rank" in words
    assert words.endswith("the nearest setting that fits: deepspeed.stage=3 training.num_workers=16")
    failed_one = memory_of(config, shape, on_gpu=True).total
    assert failed_one < 80 * 2**30  # by the estimate it fitted
    larger = ["judge={type: reference}", "deepspeed.stage=3", "training.num_workers=16"]
    way_out = load_config(repository / "configs/8b.yaml", larger)
    assert memory_of(way_out, shape, on_gpu=True).total < 0.8 * failed_one
    monkeypatch.setattr("launcher.ray_training.shape_of", lambda _: None)
    assert "training.micro_batch_size: 1" in smaller_setting(config, None, on_gpu=True)


@pytest.mark.parametrize(("hang_timeout_s", "timeout_s"), [(1800, 1980), (600, 660), (30, 600)])
def test_collectives_under_ray_outlast_a_hang(tmp_path: Path, hang_timeout_s: float, timeout_s: int) -> None:
    sections = {"model": {"name_or_path": "owner/name"}, "data": {"path": "rows.json"}}
    training = {"training": {"hang_timeout_s": hang_timeout_s}}
    made = _trainer(TrainerConfig.model_validate(sections | training), tmp_path, tmp_path, use_gpu=False)
    assert made.backend_config.timeout_s == timeout_s


@pytest.mark.parametrize(
    ("num_workers", "min_workers", "room", "expected"),
    [
        (8, None, 8, 8),
        (8, None, 99, 8),
        (8, None, 7, None),
        (8, 1, 7, 6),  # 24 micro-batches cannot be cut over 7
        (8, 1, 5, 4),
        (8, 4, 3, None),
        (8, 5, 5, None),
        (8, 1, 0, None),
    ],
)
def test_fewer_workers_go_on_where_that_is_allowed(
    num_workers: int, min_workers: int | None, room: int, expected: int | None
) -> None:
    training = TrainingConfig(
        num_workers=num_workers, min_workers=min_workers, global_batch_size=48, micro_batch_size=2
    )
    assert workers_for(training, room) == expected


@pytest.mark.parametrize("max_failures", [0, 1])
def test_a_controller_that_fails_is_told(max_failures: int) -> None:
    decision = decide(ControllerError(RuntimeError("no place")), failures=1, stalled=1, max_failures=max_failures)
    assert isinstance(decision, Retry if max_failures else Stop)
    assert "no place" in decision.cause


def test_after_a_lost_node_the_nodes_that_are_left_count(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"model": {"from_scratch": {}}, "data": {"path": "rows.json"}}
    training = {"num_workers": 4, "threads_per_worker": 4, "min_workers": 1}
    config = TrainerConfig.model_validate(sections | {"training": training})
    # 4 GPUs and 20 CPUs are left; two workers find both on one node.
    left = [Node(8, 4, "a"), Node(12, 0, "b")]
    monkeypatch.setattr(ray_training, "cluster_resources", lambda **_: together(left, "the cluster"))
    said: list[str] = []
    fewer = ray_training._after_no_place(config, use_gpu=True, wait_s=0, notify=said.append)
    assert fewer.training.num_workers == 2
    assert said == ["the cluster has room for 2 workers: training goes on with 2 (training.min_workers)"]
    left[0] = Node(2, 4, "a")
    with pytest.raises(LauncherError) as caught:
        ray_training._after_no_place(config, use_gpu=True, wait_s=0, notify=said.append)
    assert "4 x (1 GPU and 4 CPUs) are needed for 4 workers, and the cluster has room for 0" in str(caught.value)
    assert "a has 4 GPUs and 2 CPUs; b has 12 CPUs" in str(caught.value)
