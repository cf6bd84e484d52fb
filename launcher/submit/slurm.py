"""Slurm's queue: submitting scripts, and following and cancelling the jobs of a run."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ConfigError, LauncherError
from launcher.run_directory import write_atomically
from launcher.submit.script import Script

ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}


@dataclass(frozen=True)
class Job:
    """One submitted job, or one task of an array.

    Attributes:
        job: Slurm's id: a number, or ARRAY_TASK.
        does: what it does: a script's name, or a sweep's member.
        log: its output, to which requeued attempts are appended; relative to the folder of its submission.
        shown: whether following shows the output; a sweep's members would talk at once.
    """

    job: str
    does: str
    log: str
    shown: bool = True


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job: its state, why it waits, and the batch script's exit code."""

    state: str
    reason: str
    exit_code: int
    restarts: int

    @property
    def ended(self) -> bool:
        """Whether the job will not run any more."""
        return self.state in ENDED

    @property
    def code(self) -> int:
        """The exit code; 1 where Slurm counts the job as failed and names none."""
        return self.exit_code or (0 if self.state == "COMPLETED" else 1)


def parse_job(text: str) -> JobState:
    """Read one line of `scontrol show job --oneliner`. Pure.

    Args:
        text: the line, of words such as JobState=RUNNING.

    Returns:
        The job's state; the exit code of a script that was killed is 128 and the signal's number.

    Raises:
        LauncherError: if the line is no job's.
    """
    found = dict(re.findall(r"(?:^|\s)(JobState|Reason|ExitCode|Restarts)=(\S+)", text))
    try:
        code, signal = map(int, found["ExitCode"].split(":"))
        return JobState(
            found["JobState"], found.get("Reason", "None"), code or (signal and 128 + signal), int(found["Restarts"])
        )
    except (KeyError, ValueError):
        raise LauncherError(f"scontrol show job answered in an unknown form: {text[:200]!r}") from None


def submit(scripts: Sequence[Script], folder: Path) -> list[Job]:
    """Write scripts into a folder and hand them to sbatch, each after the one before it; all, or none.

    Args:
        scripts: what to submit.
        folder: the run's folder, or the sweep's; absolute.

    Returns:
        The jobs, in order; an array's tasks singly.

    Raises:
        LauncherError: with sbatch's own words if it refuses.
    """
    jobs: list[Job] = []
    before = ""
    for script in scripts:
        file = folder / "slurm" / f"{script.name}.sh"
        write_atomically(file, script.text)
        # A job whose dependency can no longer be met would wait in the queue for ever.
        waits = [f"--dependency={script.after}:{before}", "--kill-on-invalid-dep=yes"] if script.after else []
        try:
            before = _slurm("sbatch", "--parsable", *waits, str(file)).strip().split(";")[0]
        except LauncherError:
            _scancel(job.job for job in jobs)
            raise
        if script.members:
            names = [(f"{before}_{task}", member) for task, member in enumerate(script.members)]
            jobs += [Job(job, member, f"slurm/{job}.log", shown=False) for job, member in names]
        else:
            jobs.append(Job(before, script.name, f"slurm/{before}.log"))
    return jobs


def job_state(job: str) -> JobState | None:
    """What Slurm says of a job; None where it no longer knows it."""
    try:
        return parse_job(_slurm("scontrol", "show", "job", "--oneliner", job))
    except LauncherError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def is_active(jobs: Iterable[Job]) -> bool:
    """Whether any of the jobs runs, or will."""
    states = (job_state(job.job) for job in jobs)
    return any(state is not None and not state.ended for state in states)


def cancel(jobs: Sequence[Job], *, wait_s: float, say: Callable[[str], None]) -> None:
    """Let what runs save, then end it; what waits is taken out of the queue first.

    Args:
        jobs: the jobs of one run.
        wait_s: longest wait for the run to save, in seconds.
        say: shows a line of text.
    """
    states = {job.job: job_state(job.job) for job in jobs}
    alive = {job: state for job, state in states.items() if state is not None and not state.ended}
    for job in states.keys() - alive.keys() if len(jobs) == 1 else ():
        say(f"job {job} has ended already")
    _scancel(job for job, state in reversed(alive.items()) if state.state == "PENDING")
    running = [job for job, state in alive.items() if state.state == "RUNNING"]
    if running:
        say(f"job {', '.join(running)}: asked to save and end; waiting up to {wait_s:.0f} s")
        _slurm("scancel", "--batch", "--signal=TERM", *running)
    deadline = time.monotonic() + wait_s
    while running and time.monotonic() < deadline:
        time.sleep(1)
        running = [job for job in running if (state := job_state(job)) is not None and state.state == "RUNNING"]
    _scancel(job for job in alive if (state := job_state(job)) is not None and not state.ended)
    if alive:
        say(f"job {', '.join(alive)}: ended")


def follow(
    jobs: Sequence[Job],
    folder: Path,
    *,
    say: Callable[[str], None],
    write: Callable[[str], None],
    every_s: float = 2,
) -> int:
    """Show what jobs write and how they stand, until the last has ended.

    Args:
        jobs: the jobs of one run, in order.
        folder: the run's folder.
        say: shows a line about a job.
        write: shows a piece of a log as it is.
        every_s: seconds between looks.

    Returns:
        The exit code of the first job that failed; 0 if none did.

    Raises:
        LauncherError: if Slurm forgot the last job.
    """
    codes: dict[str, int] = {}
    positions: dict[str, int] = {}
    told: dict[str, str] = {}
    while True:
        for job in jobs:
            if job.job in codes:
                continue
            state = job_state(job.job)
            if job.shown:
                positions[job.job] = _write_new(folder / job.log, positions.get(job.job, 0), write)
            if state is None and job is jobs[-1]:
                raise LauncherError(f"Slurm no longer knows job {job.job}; its log is {folder / job.log}")
            now = _in_words(state)
            if now != told.get(job.job):
                say(f"job {job.job}{'' if len(jobs) == 1 else f' ({job.does})'}: {now}")
                told[job.job] = now
            if state is None or state.ended:
                codes[job.job] = 0 if state is None else state.code
        if len(codes) == len(jobs):
            return next((code for code in (codes[job.job] for job in jobs) if code), 0)
        time.sleep(every_s)


def _in_words(state: JobState | None) -> str:
    if state is None:
        return "ended; Slurm no longer knows it"
    return state.state + (f" ({state.reason})" if state.state == "PENDING" and state.reason != "None" else "")


def describe(job: Job, folder: Path) -> str:
    """A job's state in one line."""
    state = job_state(job.job)
    if state is None:
        return f"job {job.job}: Slurm no longer knows it; its log is {folder / job.log}"
    ended = f", exit code {state.exit_code}" if state.ended else ""
    return f"job {job.job}: {state.state}, {state.reason}, requeued {state.restarts} times{ended}"


def _write_new(log: Path, position: int, write: Callable[[str], None]) -> int:
    if not log.exists():
        return position
    with log.open("rb") as file:
        file.seek(position)
        new = file.read()
    if new:
        write(new.decode("utf-8", errors="replace"))
    return position + len(new)


def _scancel(jobs: Iterable[str]) -> None:
    if listed := list(jobs):
        _slurm("scancel", *listed)


def _slurm(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]}: no such program; run this where Slurm's commands are installed") from None
    if answer.returncode:
        said = answer.stderr.strip() or answer.stdout.strip()
        raise LauncherError(f"{command[0]} failed (exit code {answer.returncode}): {said}")
    return answer.stdout
