"""A run belongs to the attempt that began last."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trainer.resumed_runs import write_run
from trainer import stored
from trainer.attempt import Attempt
from trainer.errors import TrainerError


def test_the_later_attempt_owns_the_run(tmp_path: Path) -> None:
    first = Attempt.begin(tmp_path)
    first.check()
    second = Attempt.begin(tmp_path)
    second.check()
    assert (first.number, second.number) == (1, 2)
    with pytest.raises(TrainerError, match="attempt 1 of this run ends: attempt 2 has taken it over"):
        first.check()


def test_two_that_begin_at_once_do_not_both_own_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as blind:
        blind.setattr(Path, "exists", lambda _: False)  # neither sees the other's file
        attempts = [Attempt.begin(tmp_path), Attempt.begin(tmp_path)]
    assert [attempt.number for attempt in attempts] == [1, 1]
    attempts[1].check()
    with pytest.raises(TrainerError):
        attempts[0].check()


def steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row["step"] for row in rows if row["kind"] == "train"]


def until(reached: int, run_dir: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not (done := steps(run_dir)) or done[-1] < reached:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_attempt_that_wakes_up_beside_its_successor_writes_nothing(tmp_path: Path, tiny_base: Path) -> None:
    run_dir = write_run(tmp_path / "run", tiny_base, num_workers=1, max_steps=300, num_epochs=100, checkpoint_every=5)
    command = [sys.executable, "-m", "trainer.worker", str(run_dir / "config.yaml"), "--run-dir", str(run_dir)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    thought_dead = start()
    try:
        until(20, run_dir, thought_dead)
        thought_dead.send_signal(signal.SIGSTOP)
        held = len(steps(run_dir))
        successor = start()
        try:
            until(held + 10, run_dir, successor)
            # A request to stop that the successor has yet to see: it is not for the earlier one to forget.
            successor.send_signal(signal.SIGSTOP)
            (run_dir / "stop").touch()
            thought_dead.send_signal(signal.SIGCONT)
            said, _ = thought_dead.communicate(timeout=60)
            (run_dir / "stop").unlink()
            successor.send_signal(signal.SIGCONT)
            assert thought_dead.returncode != 0
            assert "attempt 1 of this run ends: attempt 2 has taken it over" in said
            assert successor.wait(120) == 0
        finally:
            successor.kill()
    finally:
        thought_dead.kill()
    assert steps(run_dir) == list(range(1, 301))
    names = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert {"step-295", "step-300"} <= set(names)
    assert all(name.removeprefix("step-").isdecimal() for name in names)  # nothing of the first attempt is left over
    assert stored.newest(run_dir) == run_dir / "checkpoints" / "step-300"
