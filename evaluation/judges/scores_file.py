"""One file of scores: the verdicts that it shall hold, those that it has, and how it is brought to its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from evaluation.judges.base import Judge, Unit, Verdict, add_attempt
from evaluation.rows import Row, append_rows, read_rows, write_rows

_COUNTS = ("num_calls", "num_prompt_tokens", "num_response_tokens")


@dataclass
class ScoresFile:
    """The verdicts of one judge on one model's responses, or on its checks.

    Attributes:
        asked: The judge.
        path: The file.
        owed: Every verdict in the order of the finished file; also those that nobody can give.
        finished: Rows with a verdict, by key.
        failed: Failed verdicts of an earlier run, by key; their attempts and their cost are kept.
        num_reused: Verdicts that were there already.
    """

    asked: Judge
    path: Path
    owed: list[Unit]
    finished: dict[str, Row] = field(default_factory=dict)
    failed: dict[str, Verdict] = field(default_factory=dict)
    num_reused: int = 0

    def missing(self) -> Iterator[Unit]:
        """Give the units that the judge must still be asked for."""
        return (unit for unit in self.owed if unit.row["state"] == "generated" and unit.key not in self.finished)

    def begin(self) -> None:
        """Leave in the file what is kept of an earlier run; verdicts are appended from here on."""
        failed = [_row(self.asked, unit, self.failed[unit.key]) for unit in self.missing() if unit.key in self.failed]
        write_rows(self.path, [*self.finished.values(), *failed])

    def add(self, unit: Unit, verdict: Verdict) -> None:
        """Append a verdict, so that a kill afterwards does not lose it."""
        row = _row(self.asked, unit, add_attempt(self.failed.get(unit.key), verdict))
        self.finished[unit.key] = row
        append_rows(self.path, [row])

    def rows(self) -> list[Row]:
        """Give a row for each verdict that is owed, in one state each."""
        return [self.finished.get(unit.key) or _unanswered(self.asked, unit) for unit in self.owed]

    def finish(self) -> dict[str, Any]:
        """Bring the file into the order of the responses and count it: rows by state and cause, mean, calls, tokens."""
        rows = self.rows()
        write_rows(self.path, rows)
        scores = [row["score"] for row in rows if row["state"] == "scored"]
        return {
            "asked": len(rows),
            **Counter(row["state"] for row in rows),
            "mean": sum(scores) / len(scores) if scores else None,
            **frequent_causes(rows),
            "reused": self.num_reused,
            **{name: sum(row[name] for row in rows) for name in _COUNTS},
        }


def frequent_causes(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Count why rows have no score: under `causes` the three most frequent ones; nothing where all are scored."""
    causes = Counter(str(row["cause"]) for row in rows if row["state"] != "scored")
    return {"causes": dict(causes.most_common(3))} if causes else {}


def open_scores(asked: Judge, rows: Sequence[Row], path: Path, repeats: int) -> ScoresFile:
    """List what one file shall hold, and keep the verdicts of an earlier run that are still asked for.

    Args:
        asked: The judge.
        rows: The responses.
        path: The file; it is read and not changed.
        repeats: Verdicts on each response.

    Returns:
        What is owed, finished and failed.
    """
    # What has no response keeps the response's key: nothing was asked of the judge.
    units = [
        Unit(asked.key(row, repeat) if row["state"] == "generated" else row["key"], row, repeat)
        for row in rows
        for repeat in range(repeats)
    ]
    scores = ScoresFile(asked, path, units)
    earlier = {row.get("key"): row for row in (read_rows(path, torn_end=True) if path.exists() else ())}
    for unit in scores.missing():
        row = earlier.get(unit.key)
        if row is not None and row["state"] == "scored":
            scores.finished[unit.key] = row | _identity(asked, unit)
        elif row is not None and row["state"] == "judge_failed":
            scores.failed[unit.key] = _verdict(row)
    scores.num_reused = len(scores.finished)
    return scores


def _unanswered(asked: Judge, unit: Unit) -> Row:
    if unit.row["state"] == "generated":
        return _row(asked, unit, Verdict("judge_failed", cause="the judge returned no verdict"))
    row = _row(asked, unit, Verdict("judge_failed"))
    return row | {"state": unit.row["state"], "cause": unit.row["cause"]}


def _identity(asked: Judge, unit: Unit) -> Row:
    names = ("id", "category", "model", "sample")
    return {name: unit.row[name] for name in names} | {"repeat": unit.repeat, "judge": asked.name}


def _row(asked: Judge, unit: Unit, verdict: Verdict) -> Row:
    return _identity(asked, unit) | asdict(verdict) | {"key": unit.key}


def _verdict(row: Row) -> Verdict:
    return Verdict(**{each.name: row[each.name] for each in fields(Verdict) if each.name in row})
