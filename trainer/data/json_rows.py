"""JSON text -> rows: one a line, a list, objects one after another, or an object around them, whatever the file's name.

Memory does not grow with the file, but for one object around all rows, which is read whole.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from trainer.data.cells import list_of_structs
from trainer.data.conversation import BadRowError
from trainer.data.names import in_short
from trainer.errors import TrainerError

Note = Callable[[str], None]
"""Takes a line about a source that the user should see."""

_READ_CHARACTERS = 1 << 20
_CUT_CHARACTERS = 16  # an error so near to the end of what has been read may come from that end: tru, \u12, 1e
# Beside one of these, a list of objects is part of a row, and not a list of rows.
_ROW_FIELDS = {"instruction", "prompt", "messages", "conversations", "question", "response", "output", "completion"}
_WHITE = " \t\r\n"
_KEY = re.compile(r'\{\s*("(?:[^"\\]|\\.)*")')
# What a text looks like where it is no JSON, and the way out. Matched at the error, or just before it.
_LOOKS_LIKE = (
    (re.compile(r"'"), "single quotes, as Python prints a dict; write the rows with json.dumps"),
    (re.compile(r"(None|True|False)\b"), "Python's {0} for JSON's word; write the rows with json.dumps"),
    (re.compile(r"//|/\*|#"), "a comment, which JSON has not; delete it"),
    (re.compile(r"[}\]]"), "perhaps a comma before the closing bracket; delete it"),
    (re.compile(r"[A-Za-z_]\w*\s*:"), "a key without double quotes; write the rows with json.dumps"),
    (re.compile(r"[\x00-\x1f]"), "a line break or control character inside a text; write it as \\n or \\u00XX"),
)


class SpelledFloat(float):
    """A fraction with its spelling in the file, such as 1.10, which str() gives."""

    __slots__ = ("spelling",)
    spelling: str

    def __str__(self) -> str:
        return self.spelling


class _Spoiled:
    """Takes the place, inside a row, of what JSON forbids."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class _Decoder:
    """Decodes JSON and takes note of what Python's own decoder lets pass: NaN, infinities, a key given twice.

    Attributes:
        problems: What was forbidden in the value read last; in it stand _Spoiled objects at these places.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        hooks: dict[str, Any] = {
            "object_pairs_hook": self._object,
            "parse_float": self._float,
            "parse_constant": lambda word: self._spoiled(f"{word} is no JSON value"),
        }
        self._decode = json.JSONDecoder(**hooks).raw_decode
        self._decode_giants = json.JSONDecoder(**hooks, parse_int=self._int).raw_decode

    def raw_decode(self, text: str, at: int = 0) -> tuple[Any, int]:
        """Decode the value that begins at a position; returns it and the position after it."""
        self.problems.clear()
        try:
            return self._decode(text, at)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of more digits than Python reads
            self.problems.clear()
            return self._decode_giants(text, at)

    def _spoiled(self, reason: str) -> _Spoiled:
        self.problems.append(reason)
        return _Spoiled(reason)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Spoiled:
        read = dict(pairs)
        if len(read) == len(pairs):
            return read
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        return self._spoiled(f"the key {twice!r} is there more than once in one object")

    def _float(self, text: str) -> float | _Spoiled:
        value = float(text)
        if not math.isfinite(value):
            return self._spoiled(f"the number {text[:20]} is too large")
        spelled = SpelledFloat(value)
        spelled.spelling = text
        return spelled

    def _int(self, text: str) -> int | _Spoiled:
        try:
            return int(text)
        except ValueError:
            return self._spoiled(f"a number of {len(text):,} digits is too long")


def read_json(file: TextIO, path: Path, note: Note) -> Iterator[object]:
    """Read the rows of a JSON text.

    Args:
        file: Its text, newlines as they are.
        path: For messages.
        note: Takes what is left out of an object around the rows.

    Yields:
        Values; a BadRowError in the place of each that can't be read, where the next one can be found.

    Raises:
        TrainerError: The text is no JSON, and where its rows begin can't be known.
    """
    line, start = 1, file.read(1)
    while start and (start.isspace() or start == "\ufeff"):
        line += start == "\n"
        start = file.read(1)
    if not start:
        return
    if start == "[":
        yield from _read_values(_Window(file, path, start, line))
        return
    first = start + file.readline()
    second = ""
    between: list[str] = []  # lines read so far after the first
    while start == "{" and not second.strip() and (second := file.readline()):
        between.append(second)
    if start == "{" and not second.strip() and _is_value(first):  # one object, on one line
        yield from _read_lone(_Window(file, path, first, line), note)
    elif start == "{" and _goes_on(first) and not _is_value(second):
        window = _Window(file, path, first + "".join(between), line)
        yield from _read_lone(window, note)
    else:
        yield from _read_lines(chain([first], between, file), line)


def _goes_on(line: str) -> bool:
    """Whether a line holds the beginning of a value and not all of it."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip()) or error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return False
    return False


def _is_value(line: str) -> bool:
    """Whether a line is an object by itself."""
    try:
        return isinstance(json.loads(line), dict)
    except (json.JSONDecodeError, RecursionError):
        return False
    except ValueError:  # it is, with a number of more digits than Python reads
        return True


def _read_lines(lines: Iterable[str], first: int) -> Iterator[object]:
    decoder = _Decoder()
    for number, line in enumerate(lines, start=first):
        text = line.strip()
        if not text:
            continue
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError) as error:
            yield BadRowError(f"line {number} is not valid JSON: {_reason(error, text)}{_column(error)}")
            continue
        if end == len(text) and not decoder.problems:
            yield value
        else:
            yield from _values_of_line(decoder, text, number)


def _values_of_line(decoder: _Decoder, text: str, number: int) -> Iterator[object]:
    """The values of a line that holds several, or one with a comma after it, or what JSON forbids."""
    values: list[object] = []
    at = 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield BadRowError(
                f"line {number} is not valid JSON after its first value: {_reason(error, text)}{_column(error)}"
            )
            return
        values.append(BadRowError(f"line {number}: {decoder.problems[0]}") if decoder.problems else value)
        at = _skip(text, at, _WHITE + ",")
    yield from values


class _Window:
    """The part of a text that is in memory: it grows until a value fits, and what has been read is dropped.

    Attributes:
        path: For messages.
        decoder: Knows what was forbidden in the value read last.
        is_spent: Whether the text was read to its end in search of a next row.
    """

    def __init__(self, file: TextIO, path: Path, text: str, line: int) -> None:
        self.path = path
        self.decoder = _Decoder()
        self.is_spent = False
        self._file, self._text, self._at, self._size = file, text, 0, _READ_CHARACTERS
        self._line = line  # of the text's first character
        self._began = 0  # where the value taken last begins
        self._margin: str | None = None  # white space before a value that begins its line

    def next_character(self) -> str:
        """Skip white space and commas; return the character after them, which is not taken, or "" at the end."""
        gap = ""
        while True:
            at = _skip(self._text, self._at, _WHITE + ",")
            gap += self._text[self._at : at]
            self._at = at
            if at < len(self._text) or not self._grow():
                break
        _, newline, margin = gap.rpartition("\n")
        self._margin = margin if newline and "," not in margin else None
        return self._text[self._at : self._at + 1]

    def take(self) -> None:
        """Go past one character."""
        self._at += 1

    @property
    def line(self) -> int:
        """The line on which the value taken last begins; counted when it is needed, as it costs more than the value."""
        return self._line_at(self._began)

    def value(self) -> object:
        """Take the value that begins here.

        Returns:
            The value, or a BadRowError where it is broken and the next one can be found.

        Raises:
            TrainerError: The next one can't be found.
        """
        ended = False
        while True:
            try:
                value, end = self.decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if ended or not self._may_be_cut(error):
                    return self._broken(error)
            else:
                # One that ends where the text read so far ends may go on after it.
                if ended or end < len(self._text):
                    self._began, self._at, self._size = self._at, end, _READ_CHARACTERS
                    return value
            ended = not self._grow()

    def _may_be_cut(self, error: Exception) -> bool:
        return isinstance(error, json.JSONDecodeError) and (
            error.pos >= len(self._text) - _CUT_CHARACTERS or error.msg.startswith("Unterminated string")
        )

    def _broken(self, error: Exception) -> BadRowError:
        """Go to the next row: it begins with the same key as this one, and as far from its line's start."""
        position = error.pos if isinstance(error, json.JSONDecodeError) else self._at
        line = self._line_at(min(position, len(self._text.rstrip())))
        reason = f"line {line} is not valid JSON: {_reason(error, self._text)}"
        key = _KEY.match(self._text, self._at)
        if key is None:
            raise TrainerError(
                f"{self.path}, {reason}. Where the next row begins can't be known, so the file can't be read"
            )
        margin = "" if self._margin is None else r"(?<=\n" + re.escape(self._margin) + ")"
        following = re.compile(margin + r"\{\s*" + re.escape(key[1]) + r"\s*:")
        overlap = len(key[0]) + len(self._margin or "") + _CUT_CHARACTERS
        self._at, self._size = self._at + 1, _READ_CHARACTERS
        while not (found := following.search(self._text, self._at)):
            self._at = max(self._at, len(self._text) - overlap)
            self._size = _READ_CHARACTERS
            if not self._grow():
                self._at, self.is_spent = len(self._text), True
                return BadRowError(f"{reason}; no row begins after it")
        self._at = found.start()
        return BadRowError(reason)

    def _grow(self) -> bool:
        more = self._file.read(self._size)
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + more, 0
        self._size *= 2  # doubling keeps the work linear for one huge row
        return bool(more)

    def _line_at(self, position: int) -> int:
        return self._line + self._text.count("\n", 0, position)


def _read_values(window: _Window) -> Iterator[object]:
    """The items of lists, and the values outside of lists, one after another."""
    inside = False
    while character := window.next_character():
        if character == ("]" if inside else "["):
            inside = not inside
            window.take()
            continue
        value = window.value()
        problems = window.decoder.problems
        bad = problems and not isinstance(value, BadRowError)
        yield BadRowError(f"line {window.line}: {problems[0]}") if bad else value
    if inside and not window.is_spent:
        yield BadRowError("the file ends inside its list: it is cut off")


def _read_lone(window: _Window, note: Note) -> Iterator[object]:
    """The rows of an object that may be all there is, and so hold them; else its values one after another."""
    value = window.value()
    line = window.line
    problems = list(window.decoder.problems)
    if isinstance(value, BadRowError):
        yield value
    elif isinstance(value, dict) and not window.next_character():
        for row in rows_inside(value, window.path, note):
            reason = _spoiled_in(row) if problems else None
            yield BadRowError(reason) if reason else row
        return
    else:
        yield BadRowError(f"line {line}: {problems[0]}") if problems else value
    yield from _read_values(window)


def rows_inside(found: dict[str, Any], path: Path, note: Note) -> list[object]:
    """The rows of a file that is one object: those that it holds where that has one meaning, else itself.

    Args:
        found: The object.
        path: For messages.
        note: Takes what is left out.

    Returns:
        The rows.

    Raises:
        TrainerError: It holds several lists of rows.
    """
    lists = [key for key, value in found.items() if _is_rows(key, value)]
    if _ROW_FIELDS & found.keys() - set(lists):
        return [found]
    if len(lists) > 1:
        raise TrainerError(
            f"{path} is one object with several lists of rows: {', '.join(lists)}. Write each to a file of its own: "
            f"python -c \"import json; [json.dump(rows, open(key + '.json', 'w')) for key, rows in "
            f"json.load(open('{path}')).items() if key in {lists}]\""
        )
    if lists:
        if left := [key for key in found if key != lists[0]]:
            note(f"{path}: the rows are those under {lists[0]!r}; not used beside them: {in_short(left)}")
        return list(found[lists[0]])
    values = list(found.values())
    if values and all(isinstance(value, dict | _Spoiled) and value for value in values):
        return _keyed(found)
    return _columns(found) or [found]


def _keyed(found: dict[str, Any]) -> list[object]:
    """The rows of an object of objects: {id: row}, or pandas' {column: {row number: cell}}."""
    values = [value for value in found.values() if isinstance(value, dict)]
    if any(list_of_structs(value) is not None for value in values):
        return [found]  # one row, whose messages are a struct of lists
    if all(list(value) == list(values[0]) and all(map(str.isdigit, value)) for value in values):
        return [{key: found[key][number] for key in found} for number in values[0]]
    return [{"id": key, **value} if isinstance(value, dict) else value for key, value in found.items()]


def _columns(found: dict[str, Any]) -> list[object]:
    """The rows of an object of columns: {column: [cells]}, or pandas' {columns: [...], data: [[cells], ...]}."""
    names, table = found.get("columns"), found.get("data")
    if isinstance(names, list) and isinstance(table, list):
        is_table = all(isinstance(row, list) and len(row) == len(names) for row in table)
        return [dict(zip(names, row, strict=True)) for row in table] if is_table else []
    columns = list(found.values())
    if not all(isinstance(column, list) and column and _all_plain(column) for column in columns):
        return []
    same = len({len(column) for column in columns}) == 1
    return [dict(zip(found, cells, strict=True)) for cells in zip(*columns, strict=True)] if same else []


def _is_rows(key: str, value: object) -> bool:
    """Whether a value is a list of rows, and not of one row's messages or tools."""
    if key in ("tools", "functions", "tool_calls") or not isinstance(value, list) or not value:
        return False
    objects = [item for item in value if not isinstance(item, _Spoiled)]
    return bool(objects) and all(isinstance(item, dict) and not {"role", "from"} & item.keys() for item in objects)


def _all_plain(values: list[Any]) -> bool:
    return not any(isinstance(value, dict | list) for value in values)


def _spoiled_in(value: object) -> str | None:
    """The reason of the first thing in a value that JSON forbids."""
    if isinstance(value, _Spoiled):
        return value.reason
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((reason for item in inside if (reason := _spoiled_in(item))), None)


def _reason(error: Exception, text: str) -> str:
    """The decoder's words, and what the text looks like there."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    at = error.pos
    near = text[at - 1] if error.msg.startswith("Illegal trailing comma") else text[at : at + 40]
    hint = next((words.format(found[0]) for form, words in _LOOKS_LIKE if (found := form.match(near))), "")
    return error.msg + (f" ({hint})" if hint else "")


def _column(error: Exception) -> str:
    return f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""


def _skip(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at
