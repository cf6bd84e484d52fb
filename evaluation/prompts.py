"""The prompts of the test set, token for token as the model was trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.errors import EvaluationError
from evaluation.rows import Row, read_rows
from evaluation.thoughts import Thinking, split


@dataclass(frozen=True)
class Prompt:
    """One row of the test set.

    Attributes:
        id: Names the row in every file of the run.
        category: Kind of task, where the data has one.
        messages: The conversation up to the answer, as role and content.
        text: The prompt as rendered with the training template, up to where the answer starts.
        token_ids: `text` in the training tokenizer; what the models under test are given.
        reference: The expected answer, without its thought.
        thinking: The training template's texts around a thought; None where it writes none.
        template_kwargs: The row's own arguments of a chat template, such as `enable_thinking`.
    """

    id: str
    category: str | None
    messages: tuple[dict[str, str], ...]
    text: str
    token_ids: tuple[int, ...]
    reference: str
    thinking: Thinking | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(run_dir: Path) -> list[Prompt]:
    """Read `data/test.jsonl` of a run.

    Args:
        run_dir: The run's folder; the prepare stage has been there.

    Returns:
        The prompts, in the file's order.

    Raises:
        EvaluationError: The file is missing or empty, a row lacks a field, or two rows share an id.
    """
    path = run_dir / "data" / "test.jsonl"
    if not path.is_file():
        raise EvaluationError(f"{path} is missing; run `launcher prepare` first")
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for number, row in enumerate(read_rows(path), 1):
        try:
            prompt = _prompt(row)
        except KeyError as error:
            raise EvaluationError(f"{path}, row {number}: no field {error}; run `launcher prepare` again") from error
        except TypeError as error:
            raise EvaluationError(f"{path}, row {number}: {error}; run `launcher prepare` again") from error
        if not prompt.token_ids:
            raise EvaluationError(f"{path}, row {number} (id {prompt.id!r}): the prompt has no tokens")
        if prompt.id in seen:
            raise EvaluationError(f"{path}, row {number}: the id {prompt.id!r} is there twice")
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise EvaluationError(f"{path} holds no row; give data.split.test a larger share or more data")
    return prompts


def _prompt(row: Row) -> Prompt:
    thinking = thinking_of_row(row)
    return Prompt(
        id=str(row["id"]),
        category=row.get("category"),
        messages=tuple(row["messages"]),
        text=row["prompt"],
        token_ids=tuple(row["prompt_token_ids"]),
        reference=reference_of(row),
        thinking=thinking,
        template_kwargs=row.get("template_kwargs") or {},
    )


def thinking_of_row(row: Row) -> Thinking | None:
    """Read a test row's texts around a thought.

    Args:
        row: Of `data/test.jsonl`.

    Returns:
        The texts; None where the training template writes no thoughts.

    Raises:
        TypeError: `thinking` is no mapping with two texts that are not blank.
    """
    fields = row.get("thinking")
    if fields is None:
        return None
    texts = [str(fields.get(name) or "") for name in ("open", "close")] if isinstance(fields, dict) else []
    if not texts or not all(text.strip() for text in texts):
        raise TypeError(f"thinking is {fields!r}, not a mapping with the texts open and close")
    return Thinking(texts[0], texts[1], bool(fields.get("opened")), str(fields.get("plain") or ""))


def reference_of(row: Row) -> str:
    """Give a test row's reference answer, without a thought that is still in it."""
    thinking = thinking_of_row(row)
    if thinking is None or thinking.close.strip() not in row["reference"]:
        return str(row["reference"])
    answer = split(row["reference"], thinking).answer
    return str(row["reference"]) if answer is None else answer
