"""Parquet, Arrow and CSV files -> rows."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.cells import Convert, converter
from trainer.data.conversation import BadRowError
from trainer.errors import TrainerError

_BATCH_ROWS = 1_000
_INDEX = re.compile(r"__index_level_\d+__")  # a column that pandas adds
_DELIMITERS = (",", "\t", ";", "|")


def read_parquet(file: pa.NativeFile, path: Path) -> Iterator[object]:
    """Read the rows of a Parquet file.

    Args:
        file: The opened file.
        path: For messages.

    Yields:
        Rows; a BadRowError in the place of each that holds what is no text or no JSON.

    Raises:
        TrainerError: Two columns have the same name.
    """
    with pq.ParquetFile(file) as opened:
        yield from _rows(opened.iter_batches(batch_size=_BATCH_ROWS), opened.schema_arrow, path)


def read_arrow(file: pa.NativeFile, path: Path, *, is_stream: bool) -> Iterator[object]:
    """Read the rows of an Arrow file: what datasets' save_to_disk writes, a stream, or Feather.

    Args:
        file: The opened file.
        path: For messages.
        is_stream: Whether it has the form of a stream, which knows no number of batches.

    Yields:
        Rows; a BadRowError in the place of each that holds what is no text or no JSON.

    Raises:
        TrainerError: Two columns have the same name.
    """
    if is_stream:
        with pa.ipc.open_stream(file) as stream:
            yield from _rows(stream, stream.schema, path)
    else:
        with pa.ipc.open_file(file) as opened:
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
            yield from _rows(batches, opened.schema, path)


def _rows(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: Path) -> Iterator[object]:
    _refuse_twice(schema.names, path)
    names = [name for name in schema.names if not _INDEX.fullmatch(name)]
    converters = {name: convert for name in names if (convert := converter(schema.field(name).type))}
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            part = batch.slice(start, _BATCH_ROWS).select(names)
            try:
                rows: Iterable[dict[str, Any]] = part.to_pylist()
            except UnicodeDecodeError:
                yield from (_row_alone(part.slice(number, 1), converters) for number in range(part.num_rows))
            else:
                yield from (_converted(row, converters) for row in rows)


def _row_alone(part: pa.RecordBatch, converters: dict[str, Convert]) -> object:
    try:
        return _converted(part.to_pylist()[0], converters)
    except UnicodeDecodeError:
        return BadRowError("a text in it is not valid UTF-8")


def _converted(row: dict[str, Any], converters: dict[str, Convert]) -> object:
    for name, convert in converters.items():
        if (value := row[name]) is not None:
            try:
                row[name] = convert(value)
            except BadRowError as error:
                return BadRowError(error.reason, name)
            except ValueError as error:
                return BadRowError(f"can't be read: {error}", name)
    return row


def read_csv(file: TextIO, path: Path) -> Iterator[object]:
    """Read the rows of a table in text; every cell is text, as it is written.

    Args:
        file: Its text, newlines as they are.
        path: Its suffix says which delimiter to try first.

    Yields:
        Rows; a BadRowError in the place of each with more or fewer cells than the header.

    Raises:
        TrainerError: Its header can't be used, or a quote is never closed.
    """
    csv.field_size_limit(1 << 30)  # the csv module's own limit is 128 KiB a field, an answer may be longer
    first = file.readline()
    told = re.fullmatch(r"sep=(.)\s*", first)  # a line that Excel writes and reads
    if told:
        first = file.readline()
    delimiter = told[1] if told else _delimiter_of(first, path)
    rows = csv.reader(chain([first], file), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        before = rows.line_num
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            lines = _lines(before + 1 + bool(told), rows.line_num + bool(told))
            if header is None or ("end of data" in str(error) and rows.line_num > before + 1):
                raise TrainerError(
                    f"{path}, {lines}: {error}: a quote opens there and is never closed, so the rows after it can't "
                    'be told apart; a quote inside a cell is written twice ("")'
                ) from None
            yield BadRowError(f"{lines}: {error}")
            continue
        if not cells:
            continue
        if header is None:
            header = _header(cells, path)
        elif len(cells) != len(header):
            yield BadRowError(
                f"{_lines(before + 1 + bool(told), rows.line_num + bool(told))}: {len(cells)} cells, the header names "
                f"{len(header)} columns; a cell with {delimiter!r} or a line break in it needs quotes"
            )
        else:
            row = dict(zip(header, cells, strict=True))
            row.pop("", None)
            yield row


def _delimiter_of(header: str, path: Path) -> str:
    """The delimiter of the suffix, or the one that parts the header where that one does not."""
    own = "\t" if ".tsv" in path.name.lower() else ","
    parting = [mark for mark in _DELIMITERS if mark in header]
    return parting[0] if own not in parting and len(parting) == 1 else own


def _lines(first: int, last: int) -> str:
    return f"line {first}" if first == last else f"lines {first} to {last}"


def _header(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    _refuse_twice(names, path)
    # A first column without a name is the row numbers that pandas writes.
    if unnamed := [number for number, name in enumerate(names, start=1) if not name and number > 1]:
        raise TrainerError(f"{path}: column {unnamed[0]} has no name in the header, which is the first line: name it")
    return names


def _refuse_twice(names: list[str], path: Path) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            places = [number for number, other in enumerate(names, start=1) if other == name]
            raise TrainerError(
                f"{path}: the header has {name!r} in columns {' and '.join(map(str, places))}: rename or delete all "
                "but one"
            )
