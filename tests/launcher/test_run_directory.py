from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.errors import ConfigError, LauncherError
from launcher.run_directory import Holder, open_run_directory, read_json, write_atomically, write_json


def test_one_launcher_at_a_time(tmp_path: Path) -> None:
    with (
        open_run_directory(tmp_path),
        pytest.raises(ConfigError, match=r"process \d+ is working on this run"),
        open_run_directory(tmp_path),
    ):
        pass


WORKS = """
import sys, time
from pathlib import Path
from launcher.run import _stop_requests
from launcher.run_directory import check_held, open_run_directory
with open_run_directory(Path(sys.argv[1])), _stop_requests(Path(sys.argv[1])):
    print("holds", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        check_held(Path(sys.argv[1]))
"""


def attempt(run_dir: Path, number: int, job: str = "7") -> subprocess.Popen[str]:
    environment = os.environ | {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(number)}
    command = [sys.executable, "-c", WORKS, str(run_dir)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_attempt_that_wakes_up_beside_its_successor_ends(tmp_path: Path) -> None:
    thought_dead = attempt(tmp_path, 0)
    assert thought_dead.stdout is not None
    assert thought_dead.stdout.readline() == "holds\n"
    thought_dead.send_signal(signal.SIGSTOP)
    other = attempt(tmp_path, 5, job="8")
    said = other.communicate(timeout=20)[1]
    assert f"process {thought_dead.pid} is working on this run" in said

    successor = attempt(tmp_path, 1)
    try:
        assert successor.stdout is not None
        assert successor.stdout.readline() == "holds\n"
        thought_dead.send_signal(signal.SIGCONT)
        said = thought_dead.communicate(timeout=20)[1]
        assert thought_dead.returncode != 0
        assert said.count("attempt 1 of this job") == 2  # interrupted, and refused what it would write
        assert "has taken the run over" in said
        assert successor.poll() is None
        # And the lock is the successor's now.
        assert "is working on this run" in attempt(tmp_path, 1).communicate(timeout=20)[1]
    finally:
        successor.kill()
        thought_dead.kill()


def test_what_happens_to_an_attempt_that_slept_does_not_reach_its_successor(tmp_path: Path) -> None:
    attempts = [attempt(tmp_path, 0)]
    try:
        assert attempts[0].stdout.readline() == "holds\n"
        attempts[0].send_signal(signal.SIGSTOP)
        attempts.append(attempt(tmp_path, 1))
        assert attempts[1].stdout.readline() == "holds\n"
        # Slurm ends what is left of the job on the lost node, and whoever read its output is gone.
        for pipe in (attempts[0].stdout, attempts[0].stderr):
            pipe.close()
        attempts[0].send_signal(signal.SIGTERM)
        attempts[0].send_signal(signal.SIGCONT)
        assert attempts[0].wait(20) != 0
        assert not (tmp_path / "stop").exists()
        assert attempts[1].poll() is None
        attempts[1].send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while not (tmp_path / "stop").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        for one in attempts:
            one.kill()
            one.wait()


@pytest.mark.parametrize(
    ("mine", "earlier", "succeeds"),
    [
        (Holder(1, "a", "7", 1), Holder(2, "b", "7", 0), True),
        (Holder(1, "a", "7", 1), Holder(2, "b", "7", 1), False),
        (Holder(1, "a", "7", 0), Holder(2, "b", "7", 1), False),
        (Holder(1, "a", "8", 1), Holder(2, "b", "7", 0), False),
        (Holder(1, "a"), Holder(2, "b"), False),
    ],
)
def test_only_a_later_attempt_of_the_same_job_takes_a_run_over(mine: Holder, earlier: Holder, succeeds: bool) -> None:
    assert mine.succeeds(earlier) == succeeds


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="not a run's"), open_run_directory(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "broken \ud800")
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_record_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.record.json"
    path.write_text(text)
    with pytest.raises(LauncherError, match=r"train\.record\.json"):
        read_json(path)
