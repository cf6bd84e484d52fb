"""JSON Lines as the evaluation keeps them: appended while a stage runs, rewritten whole and in order when it ends.

A killed process can leave a torn last line; reading for a resume drops it, reading a finished file refuses it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evaluation.errors import EvaluationError

Row = dict[str, Any]


def content_key(*parts: object) -> str:
    """Hash everything that a result depends on: a changed letter asks again, an unchanged run asks nothing.

    Args:
        *parts: JSON-able values; the order of a mapping's keys does not matter.

    Returns:
        The first 128 bits of the SHA-256, in hexadecimal.
    """
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def read_rows(path: Path, *, torn_end: bool = False) -> list[Row]:
    """Read a JSON Lines file.

    Args:
        path: The file; each line is one JSON object.
        torn_end: True leaves out a last line that was cut by a kill.

    Returns:
        The rows, in the file's order.

    Raises:
        EvaluationError: The file cannot be read, or a line is not a JSON object; it is named by its number.
    """
    rows: list[Row] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError(f"a JSON {type(row).__name__}")
        except (ValueError, TypeError) as error:
            if torn_end and number == len(lines):
                break
            raise EvaluationError(f"{path}, line {number}: not a JSON object ({error})") from error
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a JSON Lines file in one step: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for row in rows:
            file.write(_line(row))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Row) -> None:
    """Write a JSON file in one step, for people and programs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add finished rows to the end of a file, so that a kill afterwards loses none of them."""
    with path.open("ab") as file:
        file.write(b"".join(_line(row) for row in rows))


def _line(row: Row) -> bytes:
    # A lone surrogate in a model's output cannot be UTF-8; it is written as its JSON escape instead of failing the row.
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row, ensure_ascii=True) + "\n").encode()
