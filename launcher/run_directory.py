"""The folder of one run: its lock, its configuration, the records of its stages, and what is set aside."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from launcher.errors import ConfigError, LauncherError

LOCK = ".lock"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object.

    Args:
        path: the file.

    Returns:
        The object, or None where there is no such file.

    Raises:
        LauncherError: if the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise LauncherError(f"{path}: is not valid JSON ({error}); remove it and run again") from None
    if not isinstance(value, dict):
        raise LauncherError(f"{path}: must hold a JSON object; remove it and run again")
    return value


@dataclass(frozen=True)
class Holder:
    """The launcher that holds a run's folder; `attempt` counts how often Slurm has put its job back into the queue."""

    pid: int
    host: str
    job: str | None = None
    attempt: int = 0

    @classmethod
    def this_process(cls) -> Holder:
        """Who would hold the folder from here."""
        job, attempt = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT")
        return cls(os.getpid(), socket.gethostname(), job, int(attempt or 0))

    def succeeds(self, earlier: Holder) -> bool:
        """Whether this is a later attempt of the same job: Slurm thinks the earlier one dead. Pure."""
        return self.job is not None and self.job == earlier.job and self.attempt > earlier.attempt


def check_held(run_dir: Path) -> None:
    """Before a record is written: does the run still belong to this process?

    Args:
        run_dir: the run's folder.

    Raises:
        LauncherError: if a later attempt of the job has taken it over.
    """
    holder = _holder(run_dir / LOCK)
    if holder is not None and (holder.pid, holder.host) != (os.getpid(), socket.gethostname()):
        raise LauncherError(
            f"{run_dir}: attempt {holder.attempt} of this job, on {holder.host}, has taken the run over; this earlier "
            f"one ends and writes nothing more"
        )


def is_held(run_dir: Path) -> bool:
    """Whether the run still belongs to this process."""
    try:
        check_held(run_dir)
    except LauncherError:
        return False
    return True


@contextmanager
def open_run_directory(path: Path) -> Iterator[None]:
    """Hold a run's folder for one launcher at a time.

    A later attempt of the same Slurm job takes the folder over from an earlier one, whose node Slurm has lost. Should
    that wake up beside its successor, it is interrupted within a second, and writes no record before.

    Args:
        path: the run's folder, made when missing.

    Yields:
        Nothing; the folder is held until the block ends.

    Raises:
        ConfigError: if the folder holds something that is not a run, or another launcher works in it.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; give a folder with --run-dir, or change run.name")
    if path.is_dir() and any(path.iterdir()) and not (path / LOCK).exists():
        raise ConfigError(f"{path}: holds files that are not a run's; give another folder with --run-dir or run.name")
    path.mkdir(parents=True, exist_ok=True)
    mine, ended = Holder.this_process(), threading.Event()
    with _lock(path / LOCK, mine) as lock:
        lock.truncate(0)
        lock.write(json.dumps(asdict(mine)))
        lock.flush()
        threading.Thread(target=_interrupt_when_taken_over, args=(path, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()


def _lock(path: Path, mine: Holder) -> TextIO:
    """The lock file, open and locked; the file lives on, and so does the lock until it is closed."""
    lock = path.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        lock.close()
    holder = _holder(path)
    if holder is None or not mine.succeeds(holder):
        who = f"process {holder.pid} is working on this run ({holder.host})" if holder else "it is being worked on"
        raise ConfigError(f"{path.parent}: {who}; wait or stop it")
    # The earlier attempt keeps its lock on a file that no longer has the name.
    successor = path.with_name(f"{path.name}.{mine.host}.{mine.pid}")
    lock = successor.open("a+")
    fcntl.flock(lock, fcntl.LOCK_EX)
    successor.replace(path)
    return lock


def _holder(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _interrupt_when_taken_over(run_dir: Path, ended: threading.Event) -> None:
    while not ended.wait(1):
        try:
            check_held(run_dir)
        except LauncherError as error:
            # Slurm may have ended what read this output: that must not keep the process alive.
            with suppress(OSError, ValueError):
                print(f"error: {error}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGINT)  # not SIGTERM, which asks the run to save
            return


def set_aside(run_dir: Path, names: list[str], *, keep: bool) -> Path | None:
    """Put what a stage made under superseded/, so that doing it again loses nothing.

    Args:
        run_dir: the run's folder.
        names: files and folders in it.
        keep: leave a copy in place (for stages that reuse their own rows).

    Returns:
        The folder they went to, or None where there was nothing.
    """
    present = [name for name in names if (run_dir / name).exists()]
    if not present:
        return None
    aside = run_dir / "superseded" / datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    aside.mkdir(parents=True)
    for name in present:
        if not keep:
            (run_dir / name).rename(aside / name)
        elif (run_dir / name).is_dir():
            shutil.copytree(run_dir / name, aside / name)
        else:
            shutil.copy2(run_dir / name, aside / name)
    return aside
