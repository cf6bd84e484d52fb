"""A function in a process of its own: what it loaded, and what it took of a device, is gone when it returns.

    run_in_child("package.module:function", *arguments)

The caller never imports the function's module. The child has a closed standard input and a session of its own, so
Ctrl-C in a terminal reaches the caller alone, which then ends the child with all that it started. A caller that is
killed takes the child along.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError

_OWN = ("builtins", "trainer", "launcher", "evaluation")
# The package need not be installed: a Ray worker has it from the path of the launcher.
_START = "import sys; sys.path.append(sys.argv[1]); from trainer.child import main; main(*sys.argv[2:])"
_ROOT = str(Path(__file__).resolve().parents[1])
_STOP_S = 10.0  # for a child that was asked to end; then it is killed
_LOOK_S = 0.5  # how often a child looks whether its parent is still there


def run_in_child(
    function: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    timeout_s: float | None = None,
) -> Any:  # noqa: ANN401 - whatever the function returns
    """Call a function in a process of its own, and return what it returns.

    Args:
        function: "module:name".
        *arguments: Can be pickled.
        environment: Variables on top of this process's.
        log: File for what the child prints; None prints it where this process prints.
        timeout_s: Longest wait; None waits for ever.

    Returns:
        What the function returned.

    Raises:
        TrainerError: The process was killed, ended without an answer, or took too long. What the function raises is
            raised here as it is, where it is one of this product's errors or a built-in one.
    """
    with tempfile.TemporaryDirectory(prefix="child-") as folder:
        call, outcome = Path(folder, "call"), Path(folder, "outcome")
        call.write_bytes(pickle.dumps(arguments))
        code = _run(function, call, outcome, os.environ | (environment or {}), log, timeout_s)
        if not outcome.exists():
            raise TrainerError(f"the process of {function} {_end_in_words(code)}")
        returned, raised = pickle.loads(outcome.read_bytes())  # noqa: S301 - written by this module, in a private folder
    if raised is not None:
        raise raised
    return returned


def _run(
    function: str,
    call: Path,
    outcome: Path,
    environment: Mapping[str, str],
    log: Path | None,
    timeout_s: float | None,
) -> int:
    """Start the process and wait for its end; whatever happens, nothing of it is left when this returns."""
    output = log.open("ab") if log else None
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, _ROOT, function, str(call), str(outcome), str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TrainerError(f"the process of {function} did not end within {timeout_s:g} s, and was ended") from None
        finally:
            _end_group(process)
    finally:
        if output:
            output.close()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a child that still runs; and whatever it started, for engines outlive a killed parent."""
    try:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_in_words(code: int) -> str:
    if code >= 0:
        return f"ended with status {code} and no answer"
    name = signal.Signals(-code).name
    memory = "; the kernel kills what takes too much of the host's memory" if name == "SIGKILL" else ""
    return f"was killed by {name}{memory}"


def portable(error: BaseException) -> BaseException:
    """An exception that any process can unpickle without loading a library.

    Args:
        error: What was raised.

    Returns:
        The same where it is one of this product's or a built-in one; else a RuntimeError with its words.
    """
    where = "".join(traceback.format_exception(error))
    with suppress(Exception):
        if type(error).__module__.partition(".")[0] in _OWN:
            again: BaseException = pickle.loads(pickle.dumps(error))  # noqa: S301 - of this very process
            if type(error).__module__ == "builtins":
                again.add_note(where)
            return again
    carried = RuntimeError(f"{type(error).__name__}: {error}")
    carried.add_note(where)
    return carried


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os.killpg(0, signal.SIGKILL)


def main(function: str, call: str, outcome: str, parent: str) -> None:
    """Run in the child: call the function and write what becomes of it.

    Args:
        function: "module:name".
        call: File with its arguments.
        outcome: File that is written.
        parent: Process id of the parent, with whose end this process ends.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is stopped
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # batch systems signal a whole job; the parent decides
    threading.Thread(target=_end_with_parent, args=(int(parent),), daemon=True).start()
    returned = raised = None
    try:
        arguments = pickle.loads(Path(call).read_bytes())  # noqa: S301 - the parent's, in a private folder
        module, _, name = function.partition(":")
        returned = getattr(importlib.import_module(module), name)(*arguments)
    except Exception as error:  # noqa: BLE001 - handed to the parent, which raises it
        raised = portable(error)
    partial = Path(outcome + ".partial")
    partial.write_bytes(pickle.dumps((returned, raised)))
    partial.replace(outcome)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
