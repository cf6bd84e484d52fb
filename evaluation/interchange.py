"""The way in for files made elsewhere: preferences to a win rate, responses to rows that our judges score.

Rows are joined by id, or by the text of the prompt where a format has no ids. Files that do not line up are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.config import ReportConfig
from evaluation.errors import EvaluationError
from evaluation.rows import Row, content_key, read_rows, write_rows
from evaluation.statistics import bootstrap_mean, length_controlled_win_rate, win_rate


def score_file(path: Path, config: ReportConfig) -> dict[str, Any]:
    """The win rate in AlpacaEval's annotations, without a model.

    A preference of 1 is the baseline's win (`output_1`), 2 the model's (`output_2`), anything between a share of it;
    0 is AlpacaEval's older way to write a draw, 1.5. Null and values elsewhere are no preference: counted, not scored.

    Args:
        path: `annotations.json`, or the same rows as JSON Lines.
        config: Coverage and resamples.

    Returns:
        `win_rate` and `standard_error` in percent, None where too few preferences exist; `low` and `high` of its
        bootstrap interval; `num_asked`, `num_scored`, `num_wins`, `num_draws`, `num_losses`; `unscored` by cause;
        `length_controlled_win_rate` where the outputs are there; `model`, `baseline`, `annotator`.

    Raises:
        EvaluationError: The file holds no annotations, or those of several models or annotators.
    """
    rows = _rows_of(path)
    if not rows or not any("preference" in row for row in rows):
        raise EvaluationError(
            f"{path}: none of {len(rows)} rows has a 'preference'; AlpacaEval's annotations are needed"
        )
    names = {key: _only_value(rows, key, path) for key in ("generator_2", "generator_1", "annotator")}
    preferences, unscored = [_preference(row) for row in rows], Counter[str]()
    unscored.update(cause for _, cause in preferences if cause is not None)
    known = [value for value, _ in preferences if value is not None]
    rate = win_rate(known)
    interval = bootstrap_mean(
        [100 * value for value in known], confidence=config.confidence, num_resamples=config.bootstrap_samples
    )
    return {
        "win_rate": rate.win_rate,
        "standard_error": rate.standard_error,
        "low": interval.low,
        "high": interval.high,
        "num_asked": len(rows),
        "num_scored": rate.num,
        "num_wins": sum(value > 0.5 for value in known),
        "num_draws": sum(value == 0.5 for value in known),
        "num_losses": sum(value < 0.5 for value in known),
        "unscored": dict(unscored),
        "length_controlled_win_rate": _length_controlled(rows, preferences, config),
        "model": names["generator_2"],
        "baseline": names["generator_1"],
        "annotator": names["annotator"],
    }


def score_exit_code(result: dict[str, Any]) -> int:
    """The policy of `launcher score`: 0 with a win rate, 2 where nothing was scored and there is no measurement."""
    return 0 if result["num_scored"] else 2


def _rows_of(path: Path) -> list[Row]:
    """The objects of a JSON list or of JSON Lines, told apart by the first character."""
    if not path.is_file():
        raise EvaluationError(f"{path} is not a file")
    with path.open(encoding="utf-8-sig") as file:
        first = file.read(4096).lstrip()[:1]
    if first != "[":
        return read_rows(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise EvaluationError(f"{path}: not JSON ({error})") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise EvaluationError(f"{path}, row {number}: an object is needed, this is {type(row).__name__}")
    return list(rows)


def _only_value(rows: Sequence[Row], key: str, path: Path) -> str | None:
    values = sorted({str(row[key]) for row in rows if row.get(key) is not None})
    if len(values) > 1:
        raise EvaluationError(f"{path} has {len(values)} values of {key} ({', '.join(values)}); score each apart")
    return values[0] if values else None


def _preference(row: Row) -> tuple[float | None, str | None]:
    """The preference for the model in 0..1, or why there is none."""
    value = row.get("preference")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None, "no preference"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, f"preference is {value!r}, not a number"
    if value == 0:
        return 0.5, None
    return (float(value) - 1, None) if 1 <= value <= 2 else (None, f"preference {value:g} lies outside 1..2")


def _length_controlled(
    rows: Sequence[Row], preferences: Sequence[tuple[float | None, str | None]], config: ReportConfig
) -> dict[str, float | None] | None:
    known = [(row, value) for row, (value, _) in zip(rows, preferences, strict=True) if value is not None]
    if not known or not all(isinstance(row.get(key), str) for row, _ in known for key in ("output_1", "output_2")):
        return None
    return length_controlled_win_rate(
        [value for _, value in known],
        [len(row["output_2"]) - len(row["output_1"]) for row, _ in known],
        confidence=config.confidence,
        num_resamples=min(config.bootstrap_samples, 1000),
    ).to_json()


def score_text(result: dict[str, Any]) -> str:
    """The result of `score_file` in one or more lines.

    Args:
        result: What `score_file` returns.

    Returns:
        Text that ends without a line break.
    """
    who = f"{result['model'] or 'the model'} against {result['baseline'] or 'the baseline'}"
    if result["win_rate"] is None:
        line = f"{who}: no win rate, 0 of {result['num_asked']} scored"
    else:
        line = f"{who}: win rate {result['win_rate']:.2f}%"
        if result["standard_error"] is not None:
            line += f" [{result['low']:.2f}, {result['high']:.2f}], standard error {result['standard_error']:.2f}"
        line += f", {result['num_scored']} of {result['num_asked']} scored"
    controlled = result["length_controlled_win_rate"]
    if controlled and controlled["mean"] is not None:
        line += (
            f"\nlength-controlled {controlled['mean']:.2f}% [{controlled['low']:.2f}, {controlled['high']:.2f}]"
            " (without AlpacaEval's own instruction difficulties)"
        )
    return "\n".join([line, *(f"not scored: {num} x {cause}" for cause, num in result["unscored"].items())])


def import_responses(
    path: Path, run_dir: Path, model: str, references: Path | None = None, *, needs_references: bool = False
) -> dict[str, Any]:
    """Bring responses made elsewhere into a run folder, where the judge stage scores them like our own.

    Known files: our own rows (`id`, `response`); instruction, input, output, model_response, where `output` is the
    reference; AlpacaEval's outputs (instruction, output), whose references, if any, are a second such file.
    Where the folder has a test set the rows must be exactly its rows, joined by id or else by the prompt's text;
    where it has none, the file becomes its test set.

    Args:
        path: JSON list or JSON Lines.
        run_dir: Receives `responses/<model>.jsonl`, and `data/test.jsonl` where there is none.
        model: Name under which the responses are judged and reported.
        references: AlpacaEval outputs to take as reference answers.
        needs_references: The judge only compares with references, so a file without them is refused.

    Returns:
        `format`, `num_responses`, and `num_missing` for rows whose response is null.

    Raises:
        EvaluationError: The format is not known, ids are given twice, or the file and the test set do not line up.
    """
    if model in ("", ".", "..") or "/" in model or "\\" in model:
        raise EvaluationError(f"model name {model!r} cannot be a file's name; use letters, digits, - and _")
    rows = _rows_of(path)
    kind = _format_of(rows, path)
    test_path = run_dir / "data" / "test.jsonl"
    known = {str(row["id"]): row for row in read_rows(test_path)} if test_path.is_file() else None
    if kind == "ours":
        if known is None:
            raise EvaluationError(f"{path} has ids and responses, but {test_path} with their prompts is missing")
        answers, test = _by_id(rows, path), known
    else:
        imported, answers = _with_ids(rows, kind, references)
        if known is not None:
            answers, test = _joined_by_prompt(imported, answers, known, path), known
        else:
            if needs_references:
                _refuse_without_references(imported, path)
            write_rows(test_path, imported.values())
            test = imported
    _refuse_leftovers(set(answers), set(test), path)
    write_rows(
        run_dir / "responses" / f"{model}.jsonl",
        (_response_row(test[name], model, answer) for name, answer in answers.items()),
    )
    num_missing = sum(answer is None for answer in answers.values())
    return {"format": kind, "num_responses": len(answers), "num_missing": num_missing}


def _format_of(rows: Sequence[Row], path: Path) -> str:
    def have(*keys: str) -> bool:
        return bool(rows) and all(key in row for row in rows for key in keys)

    if have("id", "response"):
        return "ours"
    if have("instruction", "output", "model_response"):
        return "instruction"
    if have("instruction", "output"):
        return "alpaca_eval"
    keys = ", ".join(rows[0]) if rows else "none"
    raise EvaluationError(
        f"{path}: all rows need id and response, or instruction, output and model_response, or instruction and output; "
        f"the first of {len(rows)} has {keys}"
    )


def _id_of(row: Row, path: Path, number: int) -> str:
    if not isinstance(row["id"], str):
        raise EvaluationError(f"{path}, row {number}: id must be text, this is {row['id']!r}")
    return row["id"]


def _by_id(rows: Sequence[Row], path: Path) -> dict[str, Any]:
    answers = {_id_of(row, path, number): row.get("response") for number, row in enumerate(rows, 1)}
    if len(answers) < len(rows):
        twice = [name for name, num in Counter(str(row["id"]) for row in rows).items() if num > 1]
        raise EvaluationError(f"{path}: id {twice[0]!r} stands there twice")
    return answers


def _refuse_without_references(imported: dict[str, Row], path: Path) -> None:
    if not any(row["reference"] for row in imported.values()):
        raise EvaluationError(
            f"{path} holds no reference answers, with which this judge compares; give them with --references FILE "
            "(AlpacaEval outputs of the same prompts), or take a judge that is a language model"
        )


def _with_ids(rows: Sequence[Row], kind: str, references: Path | None) -> tuple[dict[str, Row], dict[str, Any]]:
    """Test rows and answers by an id made from the prompt's text, so that files of the same prompts line up."""
    wanted = {} if references is None else {_prompt_of(row): row.get("output") for row in _rows_of(references)}
    test: dict[str, Row] = {}
    answers: dict[str, Any] = {}
    for row in rows:
        prompt = _prompt_of(row)
        digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        name = next(n for n in (f"{digest}-{i}" if i else digest for i in range(len(rows) + 1)) if n not in test)
        if references is not None and prompt not in wanted:
            raise EvaluationError(f"{references} has no reference for {prompt[:80]!r}; the files do not line up")
        reference = row["output"] if kind == "instruction" else wanted.get(prompt)
        test[name] = {
            "id": name,
            "category": row.get("dataset"),
            "messages": [{"role": "user", "content": prompt}],
            "prompt": prompt,
            "prompt_token_ids": [],
            "reference": str(reference or ""),
        }
        answers[name] = row["model_response"] if kind == "instruction" else row["output"]
    return test, answers


def _prompt_of(row: Row) -> str:
    """Instruction and input as the Alpaca source joins them into one user message."""
    instruction, extra = str(row.get("instruction") or ""), str(row.get("input") or "")
    return f"{instruction}\n\n### Input:\n{extra}" if extra else instruction


def _joined_by_prompt(
    imported: dict[str, Row], answers: dict[str, Any], known: dict[str, Row], path: Path
) -> dict[str, Any]:
    ids: dict[str, list[str]] = {}
    for name, row in known.items():
        ids.setdefault("\n\n".join(str(message.get("content")) for message in row["messages"]), []).append(name)
    joined = {}
    for name, row in imported.items():
        same = ids.get(row["prompt"])
        if not same:
            raise EvaluationError(
                f"{path}: no row of data/test.jsonl asks {row['prompt'][:80]!r}; the files do not line up"
            )
        joined[same.pop(0)] = answers[name]
    return joined


def _refuse_leftovers(answered: set[str], asked: set[str], path: Path) -> None:
    strange, missing = sorted(answered - asked), sorted(asked - answered)
    if strange or missing:
        raise EvaluationError(
            f"{path} and data/test.jsonl do not line up: {len(missing)} test rows have no response"
            f"{f' ({missing[0]!r} first)' if missing else ''}, {len(strange)} responses have no test row"
            f"{f' ({strange[0]!r} first)' if strange else ''}"
        )


def _response_row(test: Row, model: str, answer: object) -> Row:
    text = None if answer is None else str(answer)
    return {
        "id": test["id"],
        "category": test.get("category"),
        "model": model,
        "sample": 0,
        "prompt": test["prompt"],
        "reference": test["reference"],
        "response": text,
        "finish_reason": None,
        "num_prompt_tokens": None,
        "num_response_tokens": None,
        "state": "generation_failed" if text is None else "generated",
        "cause": "no response in the imported file" if text is None else None,
        "key": content_key("imported", test["id"], test["prompt"], text),
    }
