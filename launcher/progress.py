"""The line that tells how training goes, read from metrics.jsonl as the workers write it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def describe(row: dict[str, Any], steps_per_s: float | None) -> str:
    """One line for one row of metrics.jsonl.

    Args:
        row: of any kind.
        steps_per_s: recent speed, from which the time left is told; None when it is not known yet.

    Returns:
        The line, without its end.
    """
    if row["kind"] == "validation":
        return f"step {row['step']}  validation loss {row['loss']:.4f}"
    if row["kind"] == "skipped":
        return f"step {row['step']}  skipped: {row['cause']}"
    if row["kind"] == "checkpoint":
        written = f"{row['num_bytes'] / 1e6:,.1f} MB written in {row['write_s']:.1f} s"
        return f"step {row['step']}  checkpoint: {written}, training waited {row['stalled_s']:.1f} s"
    parts = [
        f"step {row['step']}/{row['max_steps']}",
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.2e}",
        f"grad norm {row['grad_norm']:.3g}" if row.get("grad_norm") is not None else "",
        f"{row['tokens_per_s_per_device']:,.0f} tokens/s a device",
        f"MFU {row['mfu']:.1%}",
        f"{row['memory_bytes'] / 2**30:.1f} GiB",
        f"padding {row['padding_share']:.1%}",
        f"loss scale {row['loss_scale']:g}" if "loss_scale" in row else "",
    ]
    if steps_per_s:
        left_s = round((row["max_steps"] - row["step"]) / steps_per_s)
        parts.append(f"ETA {left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d}")
    return "  ".join(part for part in parts if part)


class MetricsFollower:
    """Reads what is new in a metrics file, and shows a line of it at most every so often.

    Args:
        path: metrics.jsonl, which need not exist yet; rows already in it are passed over.
        show: receives a line for a person.
        every_s: seconds between lines of training rows; the others are always shown.
    """

    def __init__(self, path: Path, show: Callable[[str], None], every_s: float) -> None:
        self._path = path
        self._show = show
        self._every_s = every_s
        self._offset = path.stat().st_size if path.exists() else 0
        self._inode = path.stat().st_ino if path.exists() else None
        self._shown_at = float("-inf")
        self._first: tuple[float, int] | None = None

    def tick(self) -> None:
        """Read the complete lines that are new, and show the newest."""
        for row in self._new_rows():
            now = time.monotonic()
            if row["kind"] != "train":
                self._show(describe(row, None))
            elif now - self._shown_at >= self._every_s or row["step"] == row["max_steps"]:
                self._shown_at = now
                self._show(describe(row, self._speed(now, row["step"])))

    def _speed(self, now: float, step: int) -> float | None:
        if self._first is None or step < self._first[1]:
            self._first = (now, step)
        since_s, steps = now - self._first[0], step - self._first[1]
        return steps / since_s if since_s > 0 and steps > 0 else None

    def _new_rows(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            replaced = self._inode not in (None, inode)  # a resumed run cut off the steps after its checkpoint
            self._inode = inode
            if replaced:
                self._offset = 0
            elif file.seek(0, 2) < self._offset:
                self._offset = file.tell()
            file.seek(self._offset)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        rows = [json.loads(line) for line in complete.splitlines()]
        return rows[-1:] if replaced else rows
