"""What is done about a failed attempt: a pure decision."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from launcher.ray_training import Resume, Retry, Stop, decide, found_by_workers, workers_for
from trainer.config import TrainerConfig, TrainingConfig
from trainer.errors import Preempted, TrainerError


def failed(**by_rank: Exception) -> WorkerGroupError:
    failures = {int(rank[1:]): UserExceptionWithTraceback(cause, "trace") for rank, cause in by_rank.items()}
    return WorkerGroupError("workers failed", failures)


def test_workers_with_folders_of_their_own_find_what_is_named_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    sections = {"data": {"path": "rows.json"}, "deepspeed": {"nvme_path": "disk", "stage": 3}}
    sections["deepspeed"] |= {"offload_optimizer": "nvme"}
    local = TrainerConfig.model_validate(sections | {"model": {"name_or_path": "model"}})
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
