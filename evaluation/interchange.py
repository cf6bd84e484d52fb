"""The way in for files made elsewhere: preferences to a win rate, responses to rows that our judges score.

Rows are joined by id, or by the question (and the system message) where a file has no ids, whatever template the test
set was rendered with. Files that do not line up are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.config import ReportConfig
from evaluation.errors import EvaluationError
from evaluation.prompts import reference_of, thinking_of_row
from evaluation.reply import Reply, read_reply
from evaluation.rows import Row, content_key, read_rows, write_rows
from evaluation.statistics import bootstrap_mean, length_controlled_win_rate, win_rate
from evaluation.thoughts import Parts, split, split_known

# Columns in which files keep a thought apart from the answer, and the system message apart from the question.
_THOUGHT_COLUMNS = ("thought", "reasoning_content", "reasoning", "thinking")
_SYSTEM_COLUMNS = ("system", "system_prompt")
# Between an Alpaca row's instruction and its input, where the test set does not say what its template puts there.
_INPUT_SEPARATOR = "\n\n### Input:\n"


@dataclass(frozen=True)
class _Answer:
    """One row of a file of answers.

    Attributes:
        id: The row's id; None where it has none.
        instruction: What the user asked, without the input.
        extra: The input of an Alpaca row, or nothing.
        system: The system message, or nothing.
        reply: The answer; its thought where the file keeps it apart.
        category: Kind of task, or nothing.
        reference: The expected answer, where this file has it.
    """

    id: str | None
    instruction: str
    extra: str
    system: str
    reply: Reply
    category: str | None
    reference: str

    def question(self, separator: str = _INPUT_SEPARATOR) -> str:
        """Join instruction and input as the Alpaca source does."""
        return f"{self.instruction}{separator}{self.extra}" if self.extra else self.instruction


def score_file(path: Path, config: ReportConfig) -> dict[str, Any]:
    """The win rate in AlpacaEval's annotations, without a model.

    A preference of 1 is the baseline's win (`output_1`), 2 the model's (`output_2`), anything between a share of it;
    0 is AlpacaEval's older way to write a draw, 1.5. Null and values elsewhere are no preference: counted, not scored.

    Args:
        path: `annotations.json`, or the same rows as JSON Lines.
        config: Coverage and resamples.

    Returns:
        `win_rate` and `standard_error` in percent, None where too few preferences exist; `low` and `high` of its
        bootstrap interval, or of another one by `interval_method` where all preferences are equal; `num_asked`,
        `num_scored`, `num_wins`, `num_draws`, `num_losses`; `unscored` by cause; `length_controlled_win_rate` where the
        outputs are there; `model`, `baseline`, `annotator`.

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
        "interval_method": interval.method,
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
) -> dict[str, Any] | None:
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
            error = result["interval_method"] or f"standard error {result['standard_error']:.2f}"
            line += f" [{result['low']:.2f}, {result['high']:.2f}], {error}"
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
    reference; AlpacaEval's outputs (instruction, output), whose references, if any, are a second such file; OpenAI's
    batch results (`custom_id`, `response`). A thought, in a column of its own or in known tags, is split off.
    Where the folder has a test set the rows must be exactly its rows, joined by id or else by the question;
    where it has none, the file becomes its test set.

    Args:
        path: JSON list or JSON Lines.
        run_dir: Receives `responses/<model>.jsonl`, and `data/test.jsonl` where there is none.
        model: Name under which the responses are judged and reported.
        references: AlpacaEval outputs to take as reference answers.
        needs_references: The judge only compares with references, so a file without them is refused.

    Returns:
        `format`, `num_responses`, `num_missing` for rows whose response is null, and `num_unclosed` where there are
        thoughts that were not closed.

    Raises:
        EvaluationError: The format is not known, ids are given twice, or the file and the test set do not line up.
    """
    if model in ("", ".", "..") or "/" in model or "\\" in model:
        raise EvaluationError(f"model name {model!r} cannot be a file's name; use letters, digits, - and _")
    rows = _rows_of(path)
    kind = _format_of(rows, path)
    answers = [_answer(row, kind, path, number) for number, row in enumerate(rows, 1)]
    test_path = run_dir / "data" / "test.jsonl"
    known = {str(row["id"]): row for row in read_rows(test_path)} if test_path.is_file() else None
    if known is not None:
        joined, test = _join(answers, known, path), known
    elif kind in ("ours", "openai_batch"):
        raise EvaluationError(f"{path} has ids and responses, but {test_path} with their prompts is missing")
    else:
        test = _test_set(answers, references)
        joined = dict(zip(test, answers, strict=True))
        if needs_references:
            _refuse_without_references(test, path)
        write_rows(test_path, test.values())
    _refuse_leftovers(set(joined), set(test), path)
    written = [_response_row(test[name], model, answer.reply) for name, answer in joined.items()]
    write_rows(run_dir / "responses" / f"{model}.jsonl", written)
    num_unclosed = sum(row.get("thought_closed") is False for row in written)
    num_missing = sum(row["response"] is None for row in written) - num_unclosed
    counts = {"format": kind, "num_responses": len(written), "num_missing": num_missing}
    return counts | ({"num_unclosed": num_unclosed} if num_unclosed else {})


def _format_of(rows: Sequence[Row], path: Path) -> str:
    def have(*keys: str) -> bool:
        return bool(rows) and all(key in row for row in rows for key in keys)

    if have("custom_id", "response"):
        return "openai_batch"
    if have("id", "response"):
        return "ours"
    if have("instruction", "output", "model_response"):
        return "instruction"
    if have("instruction", "output"):
        return "alpaca_eval"
    keys = ", ".join(rows[0]) if rows else "none"
    raise EvaluationError(
        f"{path}: all rows need id and response, or custom_id and response, or instruction, output and model_response, "
        f"or instruction and output; the first of {len(rows)} has {keys}"
    )


def _answer(row: Row, kind: str, path: Path, number: int) -> _Answer:
    name = row.get("custom_id" if kind == "openai_batch" else "id")
    if kind in ("ours", "openai_batch") and not isinstance(name, str):
        raise EvaluationError(f"{path}, row {number}: id must be text, this is {name!r}")
    said = row.get({"instruction": "model_response", "alpaca_eval": "output"}.get(kind, "response"))
    if kind == "openai_batch":
        reply = read_reply(said.get("body") if isinstance(said, dict) else None)
    else:
        thought = next((str(row[key]) for key in _THOUGHT_COLUMNS if row.get(key)), None)
        cause = "no response in the imported file" if said is None else None
        reply = Reply(None if said is None else str(said), cause=cause, thought=thought)
    return _Answer(
        id=None if name is None else str(name),
        instruction=str(row.get("instruction") or ""),
        extra=str(row.get("input") or ""),
        system=next((str(row[key]) for key in _SYSTEM_COLUMNS if row.get(key)), ""),
        reply=reply,
        category=row.get("dataset"),
        reference=_answer_alone(row["output"]) if kind == "instruction" else "",
    )


def _answer_alone(text: object) -> str:
    """A reference without the thought of the model that made it."""
    words = str(text or "")
    return split_known(words).answer or words


def _join(answers: Sequence[_Answer], known: Mapping[str, Row], path: Path) -> dict[str, _Answer]:
    """Find each answer's test row: by id where the file has ids of the test set, else by the question."""
    ids = [answer.id for answer in answers if answer.id is not None]
    if len(ids) == len(answers) and (any(name in known for name in ids) or not any(a.instruction for a in answers)):
        if len(set(ids)) < len(ids):
            raise EvaluationError(f"{path}: id {Counter(ids).most_common(1)[0][0]!r} is there twice")
        return dict(zip(ids, answers, strict=True))
    by_question: dict[str, list[str]] = {}
    for name, row in known.items():
        for question in {_folded(_question(row)), _folded(_users(row)[-1] if _users(row) else "")}:
            by_question.setdefault(question, []).append(name)
    separators = {str(row.get("input_separator") or _INPUT_SEPARATOR) for row in known.values()}
    # A file that gives some rows a system message means it where a row has none.
    has_systems = any(answer.system for answer in answers)
    joined: dict[str, _Answer] = {}
    for answer in answers:
        asked = dict.fromkeys(_folded(answer.question(separator)) for separator in sorted(separators))
        names = dict.fromkeys(name for question in asked for name in by_question.get(question, ()))
        rows = {name: known[name] for name in names}
        joined[_only_row(answer, rows, joined, path, by_system=has_systems)] = answer
    return joined


def _only_row(
    answer: _Answer, rows: Mapping[str, Row], taken: Mapping[str, object], path: Path, *, by_system: bool
) -> str:
    """Choose among the test rows with an answer's question; equal rows are taken in order."""
    words = repr(answer.instruction[:80])
    if not rows:
        raise EvaluationError(f"{path}: no row of data/test.jsonl asks {words}; the files do not line up")
    if by_system:
        rows = {name: row for name, row in rows.items() if _folded(_system(row)) == _folded(answer.system)}
    if not rows:
        raise EvaluationError(
            f"{path}: {words} has the system message {answer.system[:80]!r}, and data/test.jsonl asks it with another; "
            "the files do not line up. Leave the column out to join by the question alone"
        )
    if len({json.dumps(row["messages"], sort_keys=True) for row in rows.values()}) > 1:
        raise EvaluationError(
            f"{path}: {len(rows)} different rows of data/test.jsonl ask {words} (such as {next(iter(rows))!r}); give "
            "each answer its row's id, or its system message as `system`"
        )
    free = [name for name in rows if name not in taken]
    if not free:
        raise EvaluationError(f"{path}: {words} is answered more often than data/test.jsonl asks it")
    return free[0]


def _folded(text: str) -> str:
    """White space is the template's: it does not tell questions apart."""
    return " ".join(text.split())


def _users(row: Row) -> list[str]:
    return [str(message.get("content")) for message in row["messages"] if message.get("role") == "user"]


def _question(row: Row) -> str:
    return str(row["question"]) if row.get("question") else "\n\n".join(_users(row))


def _system(row: Row) -> str:
    return "\n\n".join(str(m.get("content")) for m in row["messages"] if m.get("role") in ("system", "developer"))


def _refuse_without_references(imported: Mapping[str, Row], path: Path) -> None:
    if not any(row["reference"] for row in imported.values()):
        raise EvaluationError(
            f"{path} holds no reference answers, with which this judge compares; give them with --references FILE "
            "(AlpacaEval outputs of the same prompts), or take a judge that is a language model"
        )


def _test_set(answers: Sequence[_Answer], references: Path | None) -> dict[str, Row]:
    """Test rows of a file's prompts, by an id made from their text, so that files of the same prompts line up."""
    files = [] if references is None else _rows_of(references)
    wanted = {
        _folded(_answer(row, "alpaca_eval", references or Path(), number).question()): _answer_alone(row.get("output"))
        for number, row in enumerate(files, 1)
    }
    test: dict[str, Row] = {}
    for answer in answers:
        question = answer.question()
        prompt = f"{answer.system}\n\n{question}" if answer.system else question
        digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        name = next(n for n in (f"{digest}-{i}" if i else digest for i in range(len(answers) + 1)) if n not in test)
        if references is not None and _folded(question) not in wanted:
            raise EvaluationError(f"{references} has no reference for {question[:80]!r}; the files do not line up")
        system = [{"role": "system", "content": answer.system}] if answer.system else []
        test[name] = {
            "id": name,
            "category": answer.category,
            "messages": [*system, {"role": "user", "content": question}],
            "prompt": prompt,
            "prompt_token_ids": [],
            "reference": answer.reference or wanted.get(_folded(question), ""),
        }
    return test


def _refuse_leftovers(answered: set[str], asked: set[str], path: Path) -> None:
    strange, missing = sorted(answered - asked), sorted(asked - answered)
    if strange or missing:
        raise EvaluationError(
            f"{path} and data/test.jsonl do not line up: {len(missing)} test rows have no response"
            f"{f' ({missing[0]!r} first)' if missing else ''}, {len(strange)} responses have no test row"
            f"{f' ({strange[0]!r} first)' if strange else ''}"
        )


def _response_row(test: Row, model: str, reply: Reply) -> Row:
    parts = _parts_of(reply, test)
    cause = reply.cause or ("the thought in the imported file was not closed" if parts.closed is False else None)
    thought = {"thought": parts.thought, "thought_closed": parts.closed} if parts.closed is not None else {}
    return {
        "id": test["id"],
        "category": test.get("category"),
        "model": model,
        "sample": 0,
        "prompt": test["prompt"],
        "reference": reference_of(test),
        "response": parts.answer,
        "finish_reason": reply.finish_reason,
        "num_prompt_tokens": reply.num_prompt_tokens or None,
        "num_response_tokens": reply.num_response_tokens or None,
        "state": "generation_failed" if parts.answer is None else "generated",
        "cause": cause,
        **thought,
        "key": content_key("imported", test["id"], test["prompt"], reply.text),
    }


def _parts_of(reply: Reply, test: Row) -> Parts:
    """Split an answer at the test row's tags or at known ones; a thought that the file keeps apart comes first."""
    if reply.text is None:
        return Parts(reply.thought, None, None if reply.thought is None else False)
    thinking = thinking_of_row(test)
    parts = split_known(reply.text) if thinking is None else split(reply.text, replace(thinking, opened=False))
    if reply.thought is None:
        return parts
    both = "\n\n".join(thought for thought in (reply.thought.strip(), parts.thought) if thought)
    return Parts(both or None, parts.answer, parts.answer is not None if both else parts.closed)
