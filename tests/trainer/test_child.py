"""A function in a process of its own: what comes back, and what is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.child import portable, run_in_child
from trainer.errors import TrainerError


def test_it_returns_what_the_function_returns() -> None:
    assert run_in_child("os:getcwd") == str(Path.cwd())
    assert run_in_child("os:getpid") != os.getpid()


def test_errors_of_the_product_come_back_as_they_are() -> None:
    with pytest.raises(TrainerError, match=r"^no checkpoint to export$"):
        run_in_child("tests.trainer.test_child:refuse", "no checkpoint to export")


def test_an_error_of_a_library_needs_no_library_to_be_read() -> None:
    class LibraryError(Exception):
        pass

    LibraryError.__module__ = "torch"
    carried = portable(LibraryError("out of memory"))
    assert (type(carried), str(carried)) == (RuntimeError, "LibraryError: out of memory")
    assert type(portable(KeyError("x"))) is KeyError


def test_a_killed_child_is_an_error_in_words() -> None:
    with pytest.raises(TrainerError, match=r"os:abort was killed by SIGABRT$"):
        run_in_child("os:abort")
    with pytest.raises(TrainerError, match="SIGKILL; the kernel kills what takes too much of the host's memory"):
        run_in_child("tests.trainer.test_child:die")


def test_its_standard_input_is_closed() -> None:
    assert run_in_child("tests.trainer.test_child:read_input") == ""


def test_a_child_that_takes_too_long_is_ended() -> None:
    with pytest.raises(TrainerError, match=r"did not end within 1 s"):
        run_in_child("time:sleep", 60, timeout_s=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_parent_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    mark = tmp_path / "pids"
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
        "signal.signal(signal.SIGINT, signal.default_int_handler); from trainer.child import run_in_child; "
        f"run_in_child('tests.trainer.test_child:start_another', {str(mark)!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: mark.exists() and len(mark.read_text().split()) == 2, 60)
    os.kill(parent.pid, number)
    parent.wait(20)
    wait_for(lambda: not any(is_alive(int(pid)) for pid in mark.read_text().split()), 20)


def wait_for(condition, within_s: float) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- what runs in the child -----------------------------------------------------------------------


def refuse(words: str) -> None:
    raise TrainerError(words)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def read_input() -> str:
    return sys.stdin.read()


def start_another(mark: str) -> None:
    """As vLLM's engine core, which outlives a killed parent."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(mark).write_text(f"{os.getpid()} {other.pid}")
    time.sleep(600)
