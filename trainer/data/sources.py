"""Files, folders and hub data sets -> rows, one at a time, in a fixed order. Memory does not grow with the file.

Bytes that are not UTF-8 are read as lone surrogates, so that one broken row is one bad row and not a broken file.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config import SourceConfig
from trainer.data.conversation import BadRowError
from trainer.errors import TrainerError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz", ".parquet", ".csv", ".tsv")
_READ_CHARACTERS = 1 << 20
_PARQUET_ROWS = 1_000
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

Row = tuple[str, int, object]
"""The file, the row's number in it from 1, and the row; the row is a BadRowError where it could not be read."""


def read_source(source: SourceConfig) -> Iterator[Row]:
    """Read all rows of a source.

    Args:
        source: its path is a file, a folder or a hub id.

    Yields:
        Rows, files in the order of their names.

    Raises:
        TrainerError: there is nothing to read, or it cannot be read at all.
    """
    path = Path(source.path)
    if path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        from trainer.data.hub import read_saved

        yield from read_saved(path, source.hub_split)
    elif path.exists():
        for file in source_files(path):
            for number, row in enumerate(_read_file(file), start=1):
                yield str(file), number, row
    elif is_hub_id(source.path):
        from trainer.data.hub import read_hub

        yield from read_hub(source)
    else:
        raise TrainerError(f"data: there is no file or folder {path}")


def is_hub_id(path: str) -> bool:
    """Whether a source is to be looked for on the hub: there is no such path, and it has the form of an id."""
    return not Path(path).exists() and bool(_HUB_ID.fullmatch(path)) and not path.endswith(SUFFIXES)


def source_files(path: Path) -> list[Path]:
    """The files of rows at a path: itself, or those in the folder and below it, in the order of their names.

    Args:
        path: a file or a folder.

    Returns:
        At least one file.

    Raises:
        TrainerError: the file has another suffix than those known, or the folder holds none.
    """
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    known = [p for p in found if p.name.lower().endswith(SUFFIXES) and not p.name.startswith(".")]
    if not known:
        raise TrainerError(f"data: {path} {'is' if path.is_file() else 'holds'} no file of {', '.join(SUFFIXES)}")
    return known


def _read_file(path: Path) -> Iterator[object]:
    name = path.name.lower().removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            yield from _read_parquet(path)
        elif name.endswith((".csv", ".tsv")):
            yield from _read_csv(path, "\t" if name.endswith(".tsv") else ",")
        else:
            yield from _read_json(path)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise TrainerError(f"{path} cannot be read: {error}") from error


def _read_parquet(path: Path) -> Iterator[object]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            yield from batch.to_pylist()


def _read_csv(path: Path, delimiter: str) -> Iterator[object]:
    csv.field_size_limit(1 << 30)  # the csv module's own limit is 128 KiB a field, an answer may be longer
    with _open_text(path, newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in rows:
                yield BadRowError("has more fields than the header") if None in row else row
        except csv.Error as error:
            raise TrainerError(f"{path}, line {rows.reader.line_num}: {error}") from error


def _read_json(path: Path) -> Iterator[object]:
    with _open_text(path, newline="\n") as file:
        line, start = 1, file.read(1)
        while start.isspace():
            line += start == "\n"
            start = file.read(1)
        if start == "[":
            yield from _read_list(file, path, line)
        elif start:
            yield from _read_lines(chain([start + file.readline()], file), line)


def _read_lines(lines: Iterable[str], first: int) -> Iterator[object]:
    for number, text in enumerate(lines, start=first):
        if text.strip():
            try:
                yield json.loads(text.rstrip())
            except json.JSONDecodeError as error:
                yield BadRowError(f"line {number} is not valid JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                yield BadRowError(f"line {number} is not valid JSON: {error}")


def _read_list(file: TextIO, path: Path, line: int) -> Iterator[object]:
    """The items of a JSON list whose opening bracket has been read, on this line of the file."""
    decode = json.JSONDecoder().raw_decode
    text, at, size, number = "", 0, _READ_CHARACTERS, 0
    while True:
        at = _skip(text, at, " \t\r\n" + ("," if number else ""))
        try:
            if text[at : at + 1] == "]":
                break
            item, end = decode(text, at)
            # An item that ends where the text read so far ends may go on after it.
            complete, problem = end < len(text), "the file ends inside the list"
        except json.JSONDecodeError as error:
            complete, problem = False, f"line {line + text.count(chr(10), 0, error.pos)}: {error.msg}"
        except (ValueError, RecursionError) as error:
            raise TrainerError(f"{path}, row {number + 1}: is not valid JSON: {error}") from None
        if complete:
            yield item
            at, number, size = end, number + 1, _READ_CHARACTERS
            continue
        more = file.read(size)
        if not more:
            raise TrainerError(f"{path}, row {number + 1}: the JSON list is broken or cut off: {problem}")
        line += text.count("\n", 0, at)
        text, at, size = text[at:] + more, 0, size * 2  # doubling keeps the work linear for one huge row


def _skip(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


@contextmanager
def _open_text(path: Path, newline: str) -> Iterator[TextIO]:
    how: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": newline}
    with gzip.open(path, "rt", **how) if path.name.lower().endswith(".gz") else path.open(**how) as file:
        yield cast(TextIO, file)
