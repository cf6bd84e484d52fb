"""All sources -> one file of checked conversations, and a few numbers about each row, all that memory holds."""

from __future__ import annotations

import json
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.config import ColumnSplit, DataConfig, FileSplit, SourceConfig
from trainer.data.conversation import BadRowError, Conversation
from trainer.data.formats import RowReader, detect_format
from trainer.data.sources import Row, read_source
from trainer.data.templates import input_separator
from trainer.errors import TrainerError

SPLITS = ("train", "validation", "test")
UNSPLIT = -1
_FIRST_ROWS = 100  # from which `auto` decides
_TOLD_ROWS = 20  # bad rows in the message; the file has all


@dataclass(frozen=True)
class Collected:
    """The conversations in a file of JSON lines, and for each row: where its line starts, and what it belongs to."""

    path: Path
    starts: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int32]
    """Number of the source in data.sources; those of a split's own files come after them."""
    splits: npt.NDArray[np.int8]
    """Index into SPLITS where the data says it, else UNSPLIT."""
    categories: npt.NDArray[np.int32]
    """Number of the category; rows without one have a number of their own."""
    formats: tuple[str, ...]
    """The form of each source."""

    @property
    def num_rows(self) -> int:
        """Rows that can be used."""
        return self.starts.size

    def lines(self, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """The JSON lines of some rows, in the order asked for; `parse_line` reads one."""
        with self.path.open("rb") as file:
            for start in self.starts[rows]:
                file.seek(start)
                yield file.readline()


@dataclass(frozen=True)
class Line:
    """A conversation and the place that it came from."""

    conversation: Conversation
    file: str
    row: int


def parse_line(line: bytes) -> Line:
    """Read a line of the collected file."""
    fields = json.loads(line)
    file, row = fields.pop("file"), fields.pop("row")
    return Line(Conversation(**fields), file, row)


class Rejected:
    """Bad rows: all are written to a file and counted; where none may be skipped, the first ones are told together."""

    def __init__(self, path: Path, skip: bool) -> None:
        self._path = path
        self._skip = skip
        self._first: list[str] = []
        self.counts: Counter[str] = Counter()

    def add(self, error: BadRowError) -> None:
        """Take note of a row that is left out.

        Args:
            error: with its place.
        """
        line = {"file": error.file, "row": error.row, "field": error.field, "reason": error.reason}
        with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.counts["bad row"] += 1
        if len(self._first) < _TOLD_ROWS:
            self._first.append(str(error))

    def listed(self) -> str:
        """The first of them, a line for each."""
        return "".join(f"\n  {line}" for line in self._first)

    def check(self) -> None:
        """End the stage where rows were bad and none may be skipped.

        Raises:
            TrainerError: tells the first of them, how many there are, and where all of them are listed.
        """
        number = self.counts["bad row"]
        if self._skip or not number:
            return
        way_out = "set data.on_bad_row: skip to leave such rows out"
        if number == 1:
            raise TrainerError(f"{self._first[0]}; mend the row, or {way_out}")
        first = "the first" if number > len(self._first) else "these"
        raise TrainerError(
            f"{number:,} rows cannot be used, {first} {len(self._first)}:\n  "
            + "\n  ".join(self._first)
            + f"\nAll of them stand in {self._path}. Mend them, or {way_out}"
        )


class FirstRows:
    """Cuts each source off after its first rows, for a look at them before anything starts."""

    def __init__(self, *, rows: int, num_bytes: int, seconds: float) -> None:
        self._rows, self._bytes, self._seconds = rows, num_bytes, seconds
        self.num_rows = 0
        """Rows that were looked at."""
        self.has_more = False
        """Whether there are more."""

    def of(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The first rows of a source; seconds are of this process's CPU time, so that other work makes no difference.

        Args:
            rows: all of them.

        Yields:
            So many, or fewer where they are long or take long to read.
        """
        end, size = time.process_time() + self._seconds, 0
        for number, row in enumerate(rows):
            size += len(str(row[2]))
            if number and (number == self._rows or size > self._bytes or time.process_time() > end):
                self.has_more = True
                return
            self.num_rows += 1
            yield row


def collect(
    data: DataConfig, seed: int, path: Path, rejected: Rejected, first_rows: FirstRows | None = None
) -> Collected:
    """Read, check and write down every row of every source.

    Args:
        data: its sources and, where it has files of its own, its split.
        seed: of the choice where a source gives only some of its rows.
        path: the file that is written.
        rejected: takes the bad rows.
        first_rows: cuts sources off; None reads them to their end.

    Returns:
        The collected rows.

    Raises:
        TrainerError: a source cannot be read, has no usable row or a bad one that may not be skipped, or two rows have
            the same id.
    """
    sources = _sources_with_splits(data)
    starts, of_source, splits, categories, ids = array("q"), array("i"), array("b"), array("i"), array("q")
    names: dict[str | None, int] = {}
    formats: list[str] = []
    with path.open("wb") as file:
        for number, (source, split) in enumerate(sources):
            before = len(starts)
            rows, reader = _open_source(source, data)
            formats.append(reader.format)
            rows = first_rows.of(rows) if first_rows else rows
            for line in _read_rows(rows, reader, rejected):
                starts.append(file.tell())
                of_source.append(number)
                splits.append(_split_of(line.conversation, data) if split == UNSPLIT else split)
                categories.append(names.setdefault(line.conversation.category, len(names)))
                ids.append(hash(line.conversation.id))
                file.write(_dumped(line))
            if len(starts) == before:
                rejected.check()
                raise TrainerError(f"data: {source.path} has no row that can be used")
    rejected.check()
    collected = Collected(  # views of the arrays, not copies
        path,
        np.frombuffer(starts, np.int64),
        np.frombuffer(of_source, np.int32),
        np.frombuffer(splits, np.int8),
        np.frombuffer(categories, np.int32),
        tuple(formats),
    )
    _check_ids(collected, np.frombuffer(ids, np.int64))
    return _choose(collected, [source for source, _ in sources], seed)


def _sources_with_splits(data: DataConfig) -> list[tuple[SourceConfig, int]]:
    """Every file that is read, with the number of its split, or UNSPLIT where its rows are split later."""
    if not isinstance(data.split, FileSplit):
        return [(source, UNSPLIT) for source in data.all_sources]
    first = data.all_sources[0].model_copy(update={"num_rows": None, "weight": 1.0})
    own = (data.split.validation, data.split.test)
    train = [(source, SPLITS.index("train")) for source in data.all_sources]
    return train + [(first.model_copy(update={"path": str(file)}), 1 + i) for i, file in enumerate(own)]


def _open_source(source: SourceConfig, data: DataConfig) -> tuple[Iterator[Row], RowReader]:
    rows = read_source(source)
    form = source.format
    if form == "auto":
        first = list(islice(rows, _FIRST_ROWS))
        if not first:
            raise TrainerError(f"data: {source.path} holds no rows")
        form = detect_format([row for *_, row in first if not isinstance(row, BadRowError)], source.path)
        rows = chain(first, rows)
    reader = RowReader(
        format=form,
        input_separator=input_separator(data.template),
        columns=source.columns,
        category=source.category,
        split_column=data.split.column if isinstance(data.split, ColumnSplit) else None,
    )
    return rows, reader


def _read_rows(rows: Iterator[Row], reader: RowReader, rejected: Rejected) -> Iterator[Line]:
    prefixes: dict[str, str] = {}
    for file, number, row in rows:
        if file not in prefixes:
            # Two files of the same name in two folders get ids of their own.
            stem = Path(file).name.partition(".")[0]
            prefixes[file] = stem if stem not in prefixes.values() else f"{stem}-{len(prefixes)}"
        try:
            if isinstance(row, BadRowError):
                raise row
            yield Line(reader.read(row, f"{prefixes[file]}-{number}"), file, number)
        except BadRowError as error:
            rejected.add(error.at(file, number))


def _split_of(conversation: Conversation, data: DataConfig) -> int:
    if not isinstance(data.split, ColumnSplit):
        return UNSPLIT
    names = [data.split.train, data.split.validation, data.split.test]
    if conversation.split not in names:
        raise TrainerError(
            f"row {conversation.id}: {data.split.column} is {conversation.split!r}, which is none of "
            f"{', '.join(names)}: name your values under data.split"
        )
    return names.index(conversation.split)


def _dumped(line: Line) -> bytes:
    return json.dumps(vars(line.conversation) | {"file": line.file, "row": line.row}).encode() + b"\n"


def _check_ids(collected: Collected, hashes: npt.NDArray[np.int64]) -> None:
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if not repeated.size:
        return
    seen: dict[str, Line] = {}
    for line in map(parse_line, collected.lines(np.flatnonzero(np.isin(hashes, repeated)))):
        first = seen.setdefault(line.conversation.id, line)
        if first is not line:
            raise TrainerError(
                f"two rows have the id {line.conversation.id!r}: {first.file}, row {first.row}, and {line.file}, row "
                f"{line.row}; make ids unique, or rename the field so that ids are made from file and row number"
            )


def _choose(collected: Collected, sources: list[SourceConfig], seed: int) -> Collected:
    """Only num_rows rows of each source that has a limit, chosen by the seed."""
    kept = np.ones(collected.num_rows, dtype=bool)
    for number, source in enumerate(sources):
        rows = np.flatnonzero(collected.sources == number)
        if source.num_rows is not None:
            if source.num_rows > rows.size:
                raise TrainerError(
                    f"data: num_rows of {source.path} is {source.num_rows}, but it has {rows.size} usable rows"
                )
            kept[np.random.default_rng([seed, number]).permutation(rows)[source.num_rows :]] = False
    return replace(
        collected,
        starts=collected.starts[kept],
        sources=collected.sources[kept],
        splits=collected.splits[kept],
        categories=collected.categories[kept],
    )
