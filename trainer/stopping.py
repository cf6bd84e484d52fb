"""Asking a training to save and end, and the exit code that says it did. Loads nothing heavy."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

RESUME_ME = 75
"""Exit code of a worker, EX_TEMPFAIL of sysexits.h: everything is saved, start the run again and it goes on."""


def _stop_file(run_dir: Path) -> Path:
    return run_dir / "stop"


def request_stop(run_dir: Path) -> None:
    """Ask a running training to save at the next step's edge and to end; from any process, on any machine.

    A file, because it also reaches ranks whose signals belong to somebody else (Ray's workers), and other machines.

    Args:
        run_dir: The run, on storage that all its ranks see.
    """
    _stop_file(run_dir).touch()


def stop_requested(run_dir: Path) -> bool:
    """Whether somebody asked this run to stop, as far as this rank sees."""
    return _stop_file(run_dir).exists()


def clear_stop(run_dir: Path) -> None:
    """Forget a request: it was carried out, or it was meant for an attempt that is over."""
    _stop_file(run_dir).unlink(missing_ok=True)


def stop_on_signals(run_dir: Path, only_if: Callable[[], bool] = lambda: True) -> None:
    """Take SIGTERM and SIGUSR1 of this process, the signals of preemption, as stop requests.

    Python allows this in a process's main thread only.

    Args:
        run_dir: The run that this process trains.
        only_if: Asked at each signal; where it is false the signal is let pass.
    """

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if only_if():
            request_stop(run_dir)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, on_signal)
