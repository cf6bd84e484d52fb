"""All sources -> one file of checked conversations, and a few numbers about each row, all that memory holds."""

from __future__ import annotations

import json
import re
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from trainer.config import AutoSplit, ColumnSplit, DataConfig, FileSplit, SourceConfig
from trainer.data.conversation import BadRowError, Conversation
from trainer.data.fields import FieldNotes
from trainer.data.formats import RowReader, detect_format
from trainer.data.json_rows import Note
from trainer.data.messages import MessageRules
from trainer.data.names import SplitName, role_of, selected
from trainer.data.sources import Row, read_source, splits_of
from trainer.data.templates import input_separator
from trainer.errors import TrainerError

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
UNSPLIT = -1
# Which splits are cut by shares from rows so marked: all, or what a source lacks beside its own train rows.
CUT: dict[int, tuple[SplitName, ...]] = {UNSPLIT: ("validation", "test"), -2: ("validation",), -3: ("test",)}
_FIRST_ROWS = 100  # from which `auto` decides
_MOST_REASONS = 20  # in a message; the file has all
_FIRST_NAMED = 5  # rows of each reason in a message
_VALUES = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")


@dataclass(frozen=True)
class Collected:
    """The conversations in a file of JSON lines, and for each row: where its line starts, and what it belongs to."""

    path: Path
    starts: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int32]
    """Number of the source in data.sources; those of a split's own files come after them."""
    splits: npt.NDArray[np.int8]
    """Index into SPLITS where the data says it, else a key of CUT."""
    categories: npt.NDArray[np.int32]
    """Number of the category; rows without one have a number of their own."""
    formats: tuple[str, ...]
    """The form of each source."""
    fields: FieldNotes = field(default_factory=FieldNotes)
    """What rows said that nothing reads."""
    notes: tuple[str, ...] = ()
    """What was taken as what, and what was left out, a line for each."""

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
    """Bad rows: all are written to a file and counted; where none may be skipped, their reasons are reported."""

    def __init__(self, path: Path, skip: bool) -> None:
        self._path = path
        self._skip = skip
        self._reasons: dict[str, _Reason] = {}
        self.counts: Counter[str] = Counter()

    def add(self, error: BadRowError) -> None:
        """Count a row that is left out.

        Args:
            error: with its place.
        """
        line = {"file": error.file, "row": error.row, "field": error.field, "reason": error.reason}
        with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.counts["bad row"] += 1
        # What differs from row to row, such as numbers and quoted values, makes no new reason.
        key = _VALUES.sub("", f"{error.field}: {error.reason}")
        if key in self._reasons:
            self._reasons[key].add(error)
        else:
            self._reasons[key] = _Reason(error)

    def listed(self) -> str:
        """The most frequent reasons, a line for each, with the number of rows and the first of them."""
        most = sorted(self._reasons.values(), key=lambda reason: -reason.count)
        lines = [str(reason) for reason in most[:_MOST_REASONS]]
        if len(most) > _MOST_REASONS:
            rest = sum(reason.count for reason in most[_MOST_REASONS:])
            lines.append(f"{rest:,} rows for {len(most) - _MOST_REASONS:,} other reasons")
        return "".join(f"\n  {line}" for line in lines)

    def check(self) -> None:
        """End the stage where rows were bad and none may be skipped.

        Raises:
            TrainerError: has each reason once, how many rows there are, and where all of them are listed.
        """
        number = self.counts["bad row"]
        if self._skip or not number:
            return
        way_out = "set data.on_bad_row: skip to leave such rows out"
        if number == 1:
            raise TrainerError(f"{next(iter(self._reasons.values()))}; fix the row, or {way_out}")
        raise TrainerError(
            f"{number:,} rows cannot be used:{self.listed()}\nAll of them are listed in {self._path}. Fix them, or "
            + way_out
        )

    def check_source(self, path: str) -> NoReturn:
        """End the stage where a source gave no row at all.

        Args:
            path: of the source.

        Raises:
            TrainerError: has the reasons of the rows that were left out.
        """
        reasons = f":{self.listed()}\nAll rows left out are listed in {self._path}" if self._reasons else ""
        raise TrainerError(f"data: {path} has no row that can be used{reasons}")


class _Reason:
    """One reason for which rows are bad: the rows are counted, the first ones are named."""

    def __init__(self, error: BadRowError) -> None:
        self.error = error
        self.count = 1
        self._others: list[str] = []
        self._is_one_text = True

    def add(self, error: BadRowError) -> None:
        """Count another row."""
        self.count += 1
        self._is_one_text &= (error.field, error.reason) == (self.error.field, self.error.reason)
        if len(self._others) < _FIRST_NAMED - 1:
            same_file = error.file == self.error.file
            self._others.append(str(error.row) if same_file else f"{error.file}, row {error.row}")

    def __str__(self) -> str:
        if self.count == 1:
            return str(self.error)
        more = "" if self.count == len(self._others) + 1 else ", …"
        such_as = "" if self._is_one_text else "for example "
        return f"{such_as}{self.error} ({self.count:,} rows, also {', '.join(self._others)}{more})"


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
        TrainerError: a source cannot be read, has no usable row or a bad one that may not be skipped, or rows have
            fields that nothing reads where that is refused.
    """
    notes: list[str] = []
    sources = _sources_with_splits(data, notes.append)
    starts, of_source, splits, categories, ids = array("q"), array("i"), array("b"), array("i"), array("q")
    names: dict[str | None, int] = {}
    prefixes: dict[str, str] = {}
    formats: list[str] = []
    fields = FieldNotes()
    with path.open("wb") as file:
        for number, (source, split) in enumerate(sources):
            before = len(starts)
            rows, reader = _open_source(source, data, rejected, fields, notes.append, first_rows)
            formats.append(reader.format)
            for line in _read_rows(rows, reader, rejected, prefixes):
                starts.append(file.tell())
                of_source.append(number)
                splits.append(split if split != UNSPLIT else _split_of(line.conversation, data))
                categories.append(names.setdefault(line.conversation.category, len(names)))
                ids.append(hash(line.conversation.id))
                file.write(_dumped(line))
            if len(starts) == before:
                rejected.check_source(source.path)
    collected = Collected(  # views of the arrays, not copies
        path,
        np.frombuffer(starts, np.int64),
        np.frombuffer(of_source, np.int32),
        np.frombuffer(splits, np.int8),
        np.frombuffer(categories, np.int32),
        tuple(formats),
        fields,
        tuple(notes),
    )
    collected = _without_repeated_ids(collected, np.frombuffer(ids, np.int64), rejected)
    rejected.check()
    fields.check(data.unknown_fields)
    return _choose(collected, [source for source, _ in sources], seed)


def _sources_with_splits(data: DataConfig, note: Note) -> list[tuple[SourceConfig, int]]:
    """Every file that is read, with its mark: a split's index, or a key of CUT where its rows are cut later.

    The first are the sources themselves, in their order; after them come what is read for validation and test alone.
    """
    first: list[tuple[SourceConfig, int]] = []
    further: list[tuple[SourceConfig, int]] = []
    for source in data.all_sources:
        own, others = _held_splits(source, data, note)
        first.append(own)
        further += others
    if isinstance(data.split, FileSplit):
        for file in (data.split.validation, data.split.test):
            if len(held := splits_of(SourceConfig(path=str(file)))) > 1:
                raise TrainerError(
                    f"data.split: {file} holds several splits: {', '.join(held)}: name one's file or folder"
                )
        train = [(source, SPLITS.index("train")) for source, _ in first]
        return train + [
            (_for_evaluation(data.all_sources[0], path=str(file)), SPLITS.index(name))
            for name, file in (("validation", data.split.validation), ("test", data.split.test))
        ]
    return first + further


def _for_evaluation(source: SourceConfig, *, path: str | None = None, hub_split: str | None = None) -> SourceConfig:
    """A source that is read whole and once, as validation or test rows are."""
    place = {"path": path or source.path, "hub_split": hub_split}
    return source.model_copy(update={"num_rows": None, "weight": 1.0, **place})


def _held_splits(
    source: SourceConfig, data: DataConfig, note: Note
) -> tuple[tuple[SourceConfig, int], list[tuple[SourceConfig, int]]]:
    """A source's train rows, or all its rows where they are cut later, and the splits that it holds beside them."""
    whole = (source, UNSPLIT)
    held = splits_of(source)
    names = selected(held, source.hub_split, source.path)
    is_named = source.hub_split is not None
    if len(names) < 2 or (is_named and not isinstance(data.split, AutoSplit)):
        return whole, []
    roles = {name: role_of(name) or ("train" if is_named else None) for name in names}
    if is_named and set(roles.values()) == {"train"}:
        return whole, []
    by_role = {role: [name for name in names if roles[name] == role] for role in SPLITS}
    is_clear = bool(by_role["train"]) and (is_named or len(set(roles.values()) - {None}) == len(names))
    if not is_clear or not isinstance(data.split, AutoSplit):
        raise TrainerError(_several_splits(source, names, is_clear=is_clear))
    lacked = tuple(role for role in SPLITS[1:] if not by_role[role])
    taken = ", ".join(f"{role} ({'+'.join(by_role[role])})" for role in SPLITS if by_role[role])
    cut = f"; {lacked[0]} is cut from train by the shares of data.split" if lacked else ""
    note(f"{source.path}: its own splits are taken: {taken}{cut}")
    mark = next((mark for mark, missing in CUT.items() if missing == lacked), SPLITS.index("train"))
    train = source.model_copy(update={"hub_split": "+".join(by_role["train"])}), mark
    return train, [
        (_for_evaluation(source, hub_split="+".join(by_role[role])), SPLITS.index(role))
        for role in SPLITS[1:]
        if by_role[role]
    ]


def _several_splits(source: SourceConfig, names: list[str], *, is_clear: bool) -> str:
    """The refusal of a source whose splits would be pooled, or whose names do not say which split they are."""
    held = ", ".join(name or "files whose names say no split" for name in names)
    as_they_are = (
        "set data.split: {type: auto} to take them as they are"
        if is_clear
        else "their names do not say which one is train, validation or test, each once"
    )
    chosen = next((name for name in names if role_of(name) == "train"), names[0] or "all")
    example = f"data.sources: [{{path: {source.path}, hub_split: {chosen}}}]"
    return (
        f"data: {source.path} holds several splits: {held}: {as_they_are}; or choose with the source's hub_split, such "
        f"as {example} (several joined by +, or all, to pool them)"
    )


def _open_source(
    source: SourceConfig,
    data: DataConfig,
    rejected: Rejected,
    fields: FieldNotes,
    note: Note,
    first_rows: FirstRows | None,
) -> tuple[Iterator[Row], RowReader]:
    rows = read_source(source, note)
    rows = first_rows.of(rows) if first_rows else rows
    form = source.format
    if form == "auto":
        before = rejected.counts["bad row"]
        first = _first_readable(rows, rejected)
        if not first and rejected.counts["bad row"] == before:
            raise TrainerError(f"data: {source.path} holds no rows")
        if not first:
            rejected.check_source(source.path)
        form = detect_format([row for *_, row in first], source.path)
        rows = chain(first, rows)
    split = data.split if isinstance(data.split, ColumnSplit) else None
    reader = RowReader(
        format=form,
        input_separator=input_separator(data.template),
        columns=source.columns,
        category=source.category,
        split_column=split.column if split else None,
        splits=(split.train, split.validation, split.test) if split else (),
        rules=MessageRules(
            roles=data.roles,
            repeated_roles=data.repeated_roles,
            numbers=data.numbers,
            metadata=frozenset(data.metadata_fields),
        ),
        train_on=data.train_on,
        notes=fields,
    )
    return rows, reader


def _first_readable(rows: Iterator[Row], rejected: Rejected) -> list[Row]:
    """The first rows of a source that could be read, from which its form is decided."""
    first: list[Row] = []
    for file, number, row in rows:
        if isinstance(row, BadRowError):
            rejected.add(row.at(file, number))
        else:
            first.append((file, number, row))
        if len(first) == _FIRST_ROWS:
            break
    return first


def _read_rows(rows: Iterator[Row], reader: RowReader, rejected: Rejected, prefixes: dict[str, str]) -> Iterator[Line]:
    for file, number, row in rows:
        if file not in prefixes:
            # Two files of the same name in two folders get ids of their own.
            stem = Path(file).name.partition(".")[0]
            prefixes[file] = stem if stem not in prefixes.values() else f"{stem}-{len(prefixes)}"
        try:
            if isinstance(row, BadRowError):
                raise row
            yield Line(reader.read(row, f"{prefixes[file]}-{number}", file, number), file, number)
        except BadRowError as error:
            rejected.add(error.at(file, number))


def _split_of(conversation: Conversation, data: DataConfig) -> int:
    if not isinstance(data.split, ColumnSplit):
        return UNSPLIT
    return (data.split.train, data.split.validation, data.split.test).index(str(conversation.split))


def _dumped(line: Line) -> bytes:
    return json.dumps(vars(line.conversation) | {"file": line.file, "row": line.row}, allow_nan=False).encode() + b"\n"


def _without_repeated_ids(collected: Collected, hashes: npt.NDArray[np.int64], rejected: Rejected) -> Collected:
    """The first row of each id; the others are bad rows."""
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if not repeated.size:
        return collected
    kept = np.ones(collected.num_rows, dtype=bool)
    seen: dict[str, Line] = {}
    numbers = np.flatnonzero(np.isin(hashes, repeated))
    for number, line in zip(numbers, map(parse_line, collected.lines(numbers)), strict=True):
        first = seen.setdefault(line.conversation.id, line)
        if first is not line:
            kept[number] = False
            rejected.add(
                BadRowError(
                    f"{line.conversation.id!r} is the id of {first.file}, row {first.row}, too; make ids unique, or "
                    "rename the field so that ids are made from file and row number",
                    "id",
                ).at(line.file, line.row)
            )
    return _only(collected, kept)


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
    return _only(collected, kept)


def _only(collected: Collected, kept: npt.NDArray[np.bool_]) -> Collected:
    """Some of the rows."""
    return replace(
        collected,
        starts=collected.starts[kept],
        sources=collected.sources[kept],
        splits=collected.splits[kept],
        categories=collected.categories[kept],
    )
