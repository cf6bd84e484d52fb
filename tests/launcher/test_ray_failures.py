"""Real failures under Ray Train: a worker killed in a step, restarts used up, a stop that was asked for."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from launcher.errors import LauncherError, Preempted
from launcher.ray_training import train_on_ray
from tests.trainer import resumed_runs
from tests.trainer.conftest import tiny_base, tiny_tokenizer  # noqa: F401 - fixtures
from tests.trainer.resumed_runs import losses, rows, set_options, tensors, write_run
from trainer.config import load_trainer_config
from trainer.stopping import request_stop

STEPS = 150


def reached(run_dir: Path) -> int:
    """The last step that the metrics tell of."""
    taken = rows(run_dir, "train") if (run_dir / "metrics.jsonl").exists() else []
    return int(taken[-1]["step"]) if taken else 0


def workers() -> list[psutil.Process]:
    """The training workers of this process's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # another one may end meanwhile
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def killer(run_dir: Path, *at_steps: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """Sends a signal to one of the two workers when a step is reached, once for each of the steps."""
    waiting = list(at_steps)

    def tick() -> None:
        if waiting and reached(run_dir) >= waiting[0] and len(found := workers()) == 2:
            os.kill(found[len(waiting) % 2].pid, number)
            waiting.pop(0)

    return tick


def asker(run_dir: Path, at_step: int) -> Callable[[], None]:
    """Asks the run to stop, once, when a step is reached."""
    waiting = [at_step]

    def tick() -> None:
        if waiting and reached(run_dir) >= waiting[0]:
            request_stop(run_dir)
            waiting.pop()

    return tick


def train(run_dir: Path, tick: Callable[[], None] = lambda: None) -> tuple[dict[str, object], list[str]]:
    told: list[str] = []
    config = load_trainer_config(run_dir / "config.yaml")
    return train_on_ray(config, run_dir, use_gpu=False, tick=tick, notify=told.append), told


def fresh_copy(run_dir: Path, folder: Path, **training: object) -> Path:
    left_out = shutil.ignore_patterns("checkpoints", "metrics.jsonl", "attempt")
    shutil.copytree(run_dir, folder, ignore=left_out)
    set_options(folder, "training", **training)
    return folder


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    first, second = tensors(one, STEPS), tensors(other, STEPS)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, local_ray: object) -> Path:  # noqa: F811
    """A run on two workers that nothing happened to, started by torchrun."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    write_run(run_dir, tiny_base, max_steps=STEPS, num_epochs=100, checkpoint_every=20, validate_every=50)
    done = resumed_runs.train(run_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


def test_a_worker_killed_in_a_step_is_replaced_and_the_run_goes_on_by_itself(whole: Path, tmp_path: Path) -> None:
    run_dir = fresh_copy(whole, tmp_path / "run")
    counts, told = train(run_dir, killer(run_dir, 30))
    assert len(told) == 1
    assert "the workers failed and are started again from the newest checkpoint" in told[0]
    assert counts["steps"] == STEPS
    assert int(str(counts["resumed_at_step"])) >= 20
    assert_same_run(run_dir, whole)


def test_memory_that_does_not_suffice_ends_the_run_at_once(
    tmp_path: Path,
    tiny_base: Path,  # noqa: F811
    local_ray: object,
) -> None:
    """A real allocation fails in the workers: a bucket of gradients larger than a process's address space."""
    run_dir = write_run(tmp_path / "run", tiny_base)
    set_options(run_dir, "deepspeed", bucket_elements=5 * 10**13)
    told: list[str] = []
    config = load_trainer_config(run_dir / "config.yaml")
    with pytest.raises(LauncherError) as caught:
        train_on_ray(
            config, run_dir, use_gpu=False, tick=lambda: None, notify=told.append, smaller=lambda: "take less of it"
        )
    assert "ran out of memory while training" in str(caught.value)
    assert "you tried to allocate 200000000000000 bytes" in str(caught.value)
    assert str(caught.value).endswith("take less of it")
    assert told == []


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced_and_the_stacks_are_saved(whole: Path, tmp_path: Path) -> None:
    run_dir = fresh_copy(whole, tmp_path / "run", hang_timeout_s=5.0)
    _, told = train(run_dir, killer(run_dir, 30, number=signal.SIGSTOP))
    assert len(told) == 1
    stacks = [path.read_text() for path in (run_dir / "incidents").glob("hang-*")]
    assert len(stacks) == 2
    assert all("trainer/loop.py" in text for text in stacks)
    assert_same_run(run_dir, whole)


@pytest.mark.slow
def test_restarts_are_bounded(whole: Path, tmp_path: Path) -> None:
    run_dir = fresh_copy(whole, tmp_path / "run", max_failures=1)
    with pytest.raises(LauncherError, match=r"attempts: 2, training\.max_failures = 1"):
        train(run_dir, killer(run_dir, 30, 90))
    _, told = train(run_dir)  # the same command again
    assert told == []
    assert_same_run(run_dir, whole)


@pytest.mark.slow
def test_two_attempts_without_a_checkpoint_end_it(whole: Path, tmp_path: Path) -> None:
    run_dir = fresh_copy(whole, tmp_path / "run", checkpoint_every=1000, max_failures=9)
    with pytest.raises(LauncherError, match="two attempts in a row ended without a new checkpoint"):
        train(run_dir, killer(run_dir, 10, 10))


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(whole: Path, tmp_path: Path) -> None:
    run_dir = fresh_copy(whole, tmp_path / "run", checkpoint_every=1000)
    with pytest.raises(Preempted, match="asked to stop, and saved after step"):
        train(run_dir, asker(run_dir, 30))
    assert Preempted.code == 75
    train(run_dir)
    assert_same_run(run_dir, whole)
