"""Several jobs of one run: submitted all or none, followed to the last, cancelled from the end. Slurm is a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import LauncherError
from launcher.submit import slurm
from launcher.submit.config import SlurmConfig
from launcher.submit.script import Script
from launcher.submit.slurm import Job, JobState, cancel, follow, submit

CHAIN = [Job("1", "prepare", "slurm/1.log"), Job("2", "train", "slurm/2.log"), Job("3", "report", "slurm/3.log")]


def states(*sequences: list[str]) -> Callable[[str], JobState | None]:
    """What scontrol says of jobs 1, 2, ... at each look; the last stays. FAILED has code 3; "" is forgotten."""
    looks = {str(number): list(sequence) for number, sequence in enumerate(sequences, start=1)}

    def look(job: str) -> JobState | None:
        found = looks[job].pop(0) if len(looks[job]) > 1 else looks[job][0]
        reason = "Dependency" if found == "PENDING" else "None"
        return JobState(found, reason, 3 if found == "FAILED" else 0, 0) if found else None

    return look


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    made: list[tuple[str, ...]] = []

    def stand_in(*command: str) -> str:
        made.append(command)
        if command[-1].endswith("refused.sh"):
            raise LauncherError("sbatch failed (exit code 1): invalid partition")
        return f"{40 + sum(call[0] == 'sbatch' for call in made)};cluster\n"

    monkeypatch.setattr(slurm, "_slurm", stand_in)
    return made


def script(name: str, after: str = "", members: tuple[str, ...] = ()) -> Script:
    return Script(name, f"#!/bin/bash\n# {name}\n", (), SlurmConfig(), after, members)  # type: ignore[arg-type]


def test_each_waits_for_the_one_before(calls: list[tuple[str, ...]], tmp_path: Path) -> None:
    jobs = submit([script("prepare"), script("train", "afterok"), script("report", "afterok")], tmp_path)
    assert [(job.job, job.does, job.log) for job in jobs] == [
        ("41", "prepare", "slurm/41.log"),
        ("42", "train", "slurm/42.log"),
        ("43", "report", "slurm/43.log"),
    ]
    assert [call[2:-1] for call in calls] == [
        (),
        ("--dependency=afterok:41", "--kill-on-invalid-dep=yes"),
        ("--dependency=afterok:42", "--kill-on-invalid-dep=yes"),
    ]
    assert (tmp_path / "slurm/train.sh").read_text() == "#!/bin/bash\n# train\n"


def test_an_arrays_tasks_are_jobs_and_the_comparison_waits_for_all(
    calls: list[tuple[str, ...]], tmp_path: Path
) -> None:
    jobs = submit([script("members", members=("1-a", "2-b")), script("compare", "afterany")], tmp_path)
    assert [(job.job, job.does, job.shown) for job in jobs] == [
        ("41_0", "1-a", False),
        ("41_1", "2-b", False),
        ("42", "compare", True),
    ]
    assert calls[1][2] == "--dependency=afterany:41"


def test_what_was_submitted_is_taken_back_where_a_later_one_is_refused(
    calls: list[tuple[str, ...]], tmp_path: Path
) -> None:
    with pytest.raises(LauncherError, match="invalid partition"):
        submit([script("prepare"), script("train", "afterok"), script("refused", "afterok")], tmp_path)
    assert calls[-1] == ("scancel", "41", "42")


@pytest.mark.parametrize(
    ("looks", "code"),
    [
        ([["RUNNING", "COMPLETED"], ["PENDING", "RUNNING", "COMPLETED"], ["PENDING", "COMPLETED"]], 0),
        ([["COMPLETED"], ["FAILED"], ["PENDING", "CANCELLED"]], 3),
        ([["CANCELLED"], ["CANCELLED"], ["CANCELLED"]], 1),
        ([["RUNNING", ""], ["RUNNING", "COMPLETED"], ["COMPLETED"]], 0),
    ],
)
def test_the_code_is_that_of_the_first_that_failed(
    looks: list[list[str]], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "job_state", states(*looks))
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/2.log").write_text("trained")
    told: list[str] = []
    written: list[str] = []
    assert follow(CHAIN, tmp_path, say=told.append, write=written.append, every_s=0) == code
    assert written == ["trained"]
    assert told[0].startswith("job 1 (prepare): ")


def test_a_last_job_that_slurm_forgot_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "job_state", states(["COMPLETED"], ["COMPLETED"], [""]))
    with pytest.raises(LauncherError, match="no longer knows job 3"):
        follow(CHAIN, tmp_path, say=[].append, write=[].append, every_s=0)


def test_what_waits_is_taken_out_before_what_runs_is_asked_to_save(
    calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "job_state", states(["COMPLETED"], ["RUNNING", "FAILED"], ["PENDING", "CANCELLED"]))
    monkeypatch.setattr(slurm.time, "sleep", lambda _: None)
    told: list[str] = []
    cancel(CHAIN, wait_s=5, say=told.append)
    assert calls == [("scancel", "3"), ("scancel", "--batch", "--signal=TERM", "2")]
    assert told[-1] == "job 2, 3: ended"
