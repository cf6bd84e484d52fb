"""What can go wrong while a run trains, and what is done: numbers that are not finite, and hangs.

Policies are pure and return values; `StepGuard`, `Watchdog` and the loop carry them out.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

HUNG = 76
"""Exit code of a worker that hung, or that waited for one that did."""
_GRACE_S = 5.0  # other ranks write their stacks before the first exit tears the group down


# --- numbers that are not finite ------------------------------------------------------------------


@dataclass(frozen=True)
class Skip:
    """Leave the step out and go on."""


@dataclass(frozen=True)
class Stop:
    """End the training with this message."""

    message: str


def after_nonfinite(policy: str, num_skipped: int, step: int, cause: str, row_ids: list[str]) -> Skip | Stop:
    """What to do about a step that was not taken. Pure.

    >>> after_nonfinite("skip 1", 0, 7, "the loss is nan", ["r1"])
    Skip()
    >>> print(after_nonfinite("skip 1", 1, 8, "the loss is nan", ["r1", "r2"]).message[:50])
    step 8 was not taken: the loss is nan; 1 skipped b

    Args:
        policy: training.on_nonfinite: `stop`, or `skip N` for at most N steps of a run.
        num_skipped: Steps of this run skipped so far.
        step: The step, from 1.
        cause: What was not finite.
        row_ids: The rows at fault; all of the step's when it can't be told.

    Returns:
        The decision.
    """
    allowed = 0 if policy == "stop" else int(policy.removeprefix("skip "))
    if num_skipped < allowed:
        return Skip()
    rows = ", ".join(row_ids[:20]) + (f" and {len(row_ids) - 20} more" if len(row_ids) > 20 else "")
    return Stop(
        f"step {step} was not taken: {cause}; {num_skipped} skipped before, training.on_nonfinite is {policy!r}; "
        f"rows: {rows}. Look at these rows, lower training.lr or training.max_grad_norm, or train in fp32"
    )


class StepGuard:
    """Keeps the optimizer from moving on what is not finite; DeepSpeed alone does so for some layouts only.

    ZeRO 1 and 2 in bf16 and ZeRO 0 in fp32 would put NaN into weights and moments. The guard stands in front of the
    inner optimizer's `step`; DeepSpeed around it goes on as after a step: it clears the gradients and counts.

    Args:
        engine: The engine whose steps are guarded from now on.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._refuse = False
        self._engine = engine
        self._blocked = False
        self._step: Callable[..., Any] = engine.basic_optimizer.step
        engine.basic_optimizer.step = self._guarded

    def _guarded(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - the optimizer's own signature
        if self._refuse or not self._gradient_is_finite():
            self._blocked = True
            return None
        return self._step(*arguments, **options)

    def _gradient_is_finite(self) -> bool:
        """The same answer on every rank: ZeRO's norm is over all ranks, and ZeRO 0's gradients are equal."""
        optimizer = self._engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.compute_grad_norm:
            return math.isfinite(norm := float(optimizer._global_grad_norm)) and norm >= 0  # -1 stands for "not finite"
        if optimizer is self._engine.basic_optimizer:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            return all(bool(gradient.isfinite().all()) for gradient in gradients)
        return True  # the other layouts do not come here when their norm is not finite

    def take_step(self, summed_loss: float) -> str | None:
        """Let the engine take the step that ends a batch, if loss and gradient are finite.

        Args:
            summed_loss: The loss of all ranks' micro-batches, equal on every rank.

        Returns:
            Why it was not taken, in which case weights and moments are as before; None when it was.
        """
        self._refuse, self._blocked = not math.isfinite(summed_loss), False
        self._engine.step()
        if self._refuse:
            return f"the loss is {summed_loss}"
        if self._blocked or getattr(self._engine.optimizer, "overflow", False):
            return "the gradient is not finite"
        return None


# --- hangs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """One process of the group."""

    rank: int
    host: str
    pid: int


def this_process(rank: int) -> Peer:
    """The peer that this process is."""
    return Peer(rank, socket.gethostname(), os.getpid())


def is_overdue(now: float, last_beat: float, last_look: float, timeout_s: float) -> bool:
    """Whether a rank hangs, or was stopped and has just been woken. Pure.

    >>> is_overdue(now=70.0, last_beat=5.0, last_look=69.0, timeout_s=60.0)
    True
    >>> is_overdue(now=70.0, last_beat=69.9, last_look=5.0, timeout_s=60.0)  # it slept, and the loop woke up first
    True
    >>> is_overdue(now=70.0, last_beat=15.0, last_look=69.0, timeout_s=60.0)
    False

    Args:
        now: Monotonic time, in seconds.
        last_beat: When the loop last said that it goes on.
        last_look: When this was last asked.
        timeout_s: training.hang_timeout_s.

    Returns:
        The answer.
    """
    return now - last_beat > timeout_s or now - last_look > timeout_s


class Watchdog:
    """A thread of each rank that ends the process when the loop stands still; a context manager around the loop.

    A rank that hangs leaves the others waiting in a collective, without an error. Each waiting rank notices by itself,
    writes the stacks of its threads to `run_dir/incidents/`, wakes ranks of its machine that a signal has stopped so
    that they do the same, and exits with 76: whoever started the group sees a failure and starts it again.

    A rank that hangs in C code which holds the interpreter's lock stops this thread too. For it a timer of
    faulthandler, which needs no lock, is wound up at each look; left alone, it writes the stacks and exits with 1.

    Args:
        run_dir: The run.
        rank: This rank.
        peers: All processes of the group.
        timeout_s: Longest time between two beats.
    """

    def __init__(self, run_dir: Path, rank: int, peers: list[Peer], timeout_s: float) -> None:
        self._folder = run_dir / "incidents"
        self._locked = self._folder / f"interpreter-locked-rank-{rank}-process-{os.getpid()}.txt"
        self._rank = rank
        self._peers = peers
        self._timeout_s = timeout_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._step = 0
        self._last_beat = time.monotonic()

    def beat(self, step: int) -> None:
        """Say that the loop goes on.

        Args:
            step: Steps taken so far.
        """
        self._step = step
        self._last_beat = time.monotonic()

    def __enter__(self) -> Watchdog:
        self._last_beat = time.monotonic()
        self._folder.mkdir(exist_ok=True)
        self._stacks = self._locked.open("w", encoding="utf-8")  # by the time it is needed, none can be opened
        self._wind_up()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._stacks.close()
        self._locked.unlink()
        with suppress(OSError):  # not empty: something happened, or others are still at it
            self._folder.rmdir()

    def _watch(self) -> None:
        last_look = time.monotonic()
        while not self._done.wait(min(1.0, self._timeout_s / 10)):
            self._wind_up()
            now = time.monotonic()
            if is_overdue(now, self._last_beat, last_look, self._timeout_s):
                self._give_up(now - min(self._last_beat, last_look))
            last_look = now
        faulthandler.cancel_dump_traceback_later()

    def _wind_up(self) -> None:
        """The timer rings behind this thread, which tells more, and before another rank's end takes this one along."""
        faulthandler.dump_traceback_later(self._timeout_s + _GRACE_S / 2, exit=True, file=self._stacks)

    def _give_up(self, still_s: float) -> None:
        host = socket.gethostname()
        stopped = [peer for peer in self._peers if peer.host == host and _is_stopped(peer.pid)]
        faulthandler.cancel_dump_traceback_later()
        self._locked.unlink()
        path = self._folder / f"hang-after-step-{self._step}-rank-{self._rank}.txt"
        with path.open("w", encoding="utf-8") as file:
            file.write(f"rank {self._rank} on {host}, process {os.getpid()}: no progress for {still_s:.1f} s\n")
            file.writelines(f"rank {peer.rank}, process {peer.pid}, is stopped by a signal\n" for peer in stopped)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        for peer in stopped:
            os.kill(peer.pid, signal.SIGCONT)
        time.sleep(_GRACE_S)
        os._exit(HUNG)


def _is_stopped(pid: int) -> bool:
    """Whether a process of this machine is under SIGSTOP; where /proc does not tell, it is taken as running."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in "Tt"
