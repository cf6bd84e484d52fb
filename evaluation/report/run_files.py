"""A run directory's files, read for the report: what is there, and what is not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.errors import EvaluationError
from evaluation.rows import Row, read_rows

STATES = ("scored", "judge_failed", "generation_failed", "too_long", "skipped")
STAGES = ("prepare", "train", "export", "generate", "judge", "report")


@dataclass
class RunFiles:
    """Everything the report is made from; an absent file leaves its part empty and a line in `missing`.

    `test` maps id to row; `responses` maps model and then (id, sample) to row; `verdicts` maps model and then
    (id, sample, repeat) to row; `harness` maps model to what the lm-evaluation-harness measured of it.
    """

    run_dir: Path
    test: dict[str, Row] = field(default_factory=dict)
    responses: dict[str, dict[tuple[str, int], Row]] = field(default_factory=dict)
    verdicts: dict[str, dict[tuple[str, int, int], Row]] = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    judge_summary: Row = field(default_factory=dict)
    harness: dict[str, Row] = field(default_factory=dict)
    records: dict[str, Row] = field(default_factory=dict)
    config: str = ""
    missing: list[str] = field(default_factory=list)

    def models(self) -> list[str]:
        """Names of the models: base, tuned, then the others by name."""
        names = self.responses.keys() | self.verdicts.keys()
        return sorted(names, key=lambda name: ({"base": 0, "tuned": 1}.get(name, 2), name))


def read_json(path: Path) -> Row:
    """The object in a JSON file.

    Args:
        path: The file; UTF-8.

    Returns:
        The object.

    Raises:
        EvaluationError: The file does not hold one JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise EvaluationError(f"{path}: an object is needed, this is {type(value).__name__}")
    return value


def read_run(run_dir: Path) -> RunFiles:
    """All that the report needs from a run directory.

    Args:
        run_dir: Folder of the run.

    Returns:
        The files' contents, with the absent ones named in `missing`.

    Raises:
        EvaluationError: The folder is not there, a file is broken, or responses or verdicts are of other rows
            than the test set.
    """
    if not run_dir.is_dir():
        raise EvaluationError(f"{run_dir} is not a folder: give the folder of a run")
    files = RunFiles(run_dir)

    def present(name: str) -> bool:
        if (run_dir / name).exists():
            return True
        files.missing.append(name)
        return False

    if present("data/test.jsonl"):
        files.test = _read_test(run_dir / "data/test.jsonl")
    if present("data/summary.json"):
        files.summary = read_json(run_dir / "data/summary.json")
    if present("metrics.jsonl"):
        files.metrics = read_rows(run_dir / "metrics.jsonl", torn_end=True)
    if present("config.yaml"):
        files.config = (run_dir / "config.yaml").read_text(encoding="utf-8")
    if (run_dir / "judge/summary.json").exists():  # only some judges write one
        files.judge_summary = read_json(run_dir / "judge/summary.json")
    for path in sorted((run_dir / "lm_eval").glob("*.json")):  # only where it was asked for
        files.harness[path.stem] = read_json(path)
    for stage in STAGES[:-1]:
        if present(f"{stage}.record.json"):
            files.records[stage] = read_json(run_dir / f"{stage}.record.json")
    for name in ("base", "tuned"):
        present(f"responses/{name}.jsonl")
        present(f"scores/{name}.jsonl")
    for path in sorted((run_dir / "responses").glob("*.jsonl")):
        files.responses[path.stem] = _read_responses(path, files.test)
    for path in sorted((run_dir / "scores").glob("*.jsonl")):
        files.verdicts[path.stem] = _read_verdicts(path, files.test)
    return files


def _read_test(path: Path) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for number, row in enumerate(read_rows(path), 1):
        name = _text(row, "id", path, number)
        if name in rows:
            raise EvaluationError(f"{path}, row {number}: id {name!r} stands there twice; run `launcher prepare` again")
        rows[name] = row
    return rows


def _read_responses(path: Path, test: dict[str, Row]) -> dict[tuple[str, int], Row]:
    rows = {}
    for number, row in enumerate(read_rows(path, torn_end=True), 1):
        rows[_known_id(row, test, path, number), int(row.get("sample", 0))] = row
    return rows


def _read_verdicts(path: Path, test: dict[str, Row]) -> dict[tuple[str, int, int], Row]:
    """The last verdict of each (id, sample, repeat): a failed one may have been asked again."""
    rows = {}
    for number, row in enumerate(read_rows(path, torn_end=True), 1):
        if row.get("state") not in STATES:
            raise EvaluationError(
                f"{path}, row {number}: state is {row.get('state')!r}, not one of {', '.join(STATES)}"
            )
        score = row.get("score")
        in_range = isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 100
        if row["state"] == "scored" and not in_range:
            raise EvaluationError(f"{path}, row {number}: state is scored but score is {score!r}, not within 0..100")
        rows[_known_id(row, test, path, number), int(row.get("sample", 0)), int(row.get("repeat", 0))] = row
    return rows


def _known_id(row: Row, test: dict[str, Row], path: Path, number: int) -> str:
    name = _text(row, "id", path, number)
    if test and name not in test:
        raise EvaluationError(
            f"{path}, row {number}: id {name!r} is not in data/test.jsonl, so this file belongs to other data; "
            "run the stage that wrote it again"
        )
    return name


def _text(row: Row, key: str, path: Path, number: int) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise EvaluationError(f"{path}, row {number}: {key!r} must be text, this is {value!r}")
    return value
