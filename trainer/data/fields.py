"""What the names of fields mean, how a field's value becomes text, and which fields nothing reads.

The names are those that public data sets and the documented formats of other tools use.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from trainer.data.conversation import BadRowError, check_text
from trainer.errors import TrainerError

_METADATA = """\
id _id uid uuid guid idx index key hash sha sha256 checksum row_id doc_id item_id sample_id example_id prompt_id
question_id task_id message_id parent_id parent_message_id thread_id session_id user_id author_id annotator_id
worker_id conv_id conversation_id conversation_hash tree_id message_tree_id __index_level_0__
source sources src origin provenance dataset dataset_name dataset_source data_source subset config split url link
file filename file_name path license licence version
category categories subcategory type kind task tasks task_type task_name topic topics domain subdomain subject
field skill skills ability capability area tag tags keyword keywords cluster intent title
lang language languages language_code locale country state
score scores rating ratings rank quality quality_score difficulty level complexity upvotes votes views likes
confidence similarity embedding perplexity reward_score judge_score helpfulness correctness coherence verbosity
num_tokens n_tokens token_count tokens token_length num_turns n_turns turn num_messages length
model models model_name model_id model_version generator generator_model generation_model teacher_model
author annotator annotators creator username avatarurl
timestamp timestamps date datetime time created created_at create_time created_date updated_at update_time
modified finish_reason stop_reason usage logprobs latency cost temperature top_p seed batch
toxic toxicity redacted moderation openai_moderation detoxify detoxify_moderation synthetic deleted
review_state review_count review_result
metadata meta meta_data extra_info extra info additional_info comment comments note notes
parallel_tool_calls citations cache_control
"""
METADATA = frozenset((*_METADATA.split(), "unnamed: 0"))
"""Names of fields that describe a row or a message and say nothing in the conversation."""

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "systemprompt", "systemmessage")
"""Columns that hold the system message."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
"""An assistant's thoughts before it answers."""

MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio", "file_data")
"""Content that is no text."""

LEARNED = ("weight", "train", "trainable", "training", "loss", "loss_mask", "loss_weight")
"""A turn's own mark for loss: 1 or true where it is learned."""

NOT_LEARNED = ("masked", "ignore_loss")
"""The same the other way round: true where the turn is context only."""

TEMPLATE_ARGUMENTS = ("enable_thinking", "reasoning_effort")
"""Columns that are one argument of the chat template each."""

TEMPLATE_ARGUMENT_TABLES = ("chat_template_kwargs", "template_kwargs")
"""Columns that hold several arguments of the chat template."""

_MOST_FIELDS = 1_000  # unread fields that are counted apart
_OTHER_FIELDS = "(others)"
_SHOWN_FIELDS = 20

NumberText = Literal["exact", "shortest"]


def _no_constant(word: str) -> None:
    raise ValueError(f"it holds {word}, which JSON forbids")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it holds the key {twice!r} twice")
    return made


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_key_twice)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def is_blank(value: object) -> bool:
    """Whether a field says nothing: null, NaN, an empty list or object, or text without a visible character."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, list | dict):
        return not value
    return isinstance(value, float) and value != value  # noqa: PLR0124 - true of NaN alone


def kind(value: object) -> str:
    """The type of a value in JSON's words."""
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"a number ({value})"
    names = {type(None): "null", bool: "a truth value", str: "text", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def as_text(value: object, numbers: NumberText, name: str) -> str:
    """A value as the text that is learned or asked.

    Args:
        value: text, or a number or truth value, which stays as it was spelled in the file.
        numbers: what becomes of a fraction whose spelling (0.5, 0.50, 5e-1) the file's format does not keep: `exact`
            refuses it, `shortest` writes the shortest spelling.
        name: of the field, for the message.

    Returns:
        The text.

    Raises:
        BadRowError: the value is neither, or its spelling is not known.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, float):
        raise BadRowError(f"must be text, it is {kind(value)}", name)
    if value in (float("inf"), float("-inf")):
        raise BadRowError(f"must be text, it is {value}, which is no number in JSON", name)
    spelling = getattr(value, "spelling", None)  # kept by the reader of JSON files
    if spelling is None and numbers == "exact":
        raise BadRowError(
            f"is {kind(value)} that can be spelled in several ways: give it as text, or set data.numbers: shortest to "
            f"write {value!r}",
            name,
        )
    return repr(value) if spelling is None else str(spelling)


def label(row: Mapping[str, Any], name: str) -> str | None:
    """A field that only describes the row, such as its id, as text; None where it says nothing."""
    value = row.get(name)
    if is_blank(value):
        return None
    text = as_text(value, "shortest", name)
    check_text(text, name)
    return text


def parsed(text: str, name: str, *, repr_too: bool = False) -> Any:  # noqa: ANN401 - JSON is anything
    """The value that JSON text holds.

    Args:
        text: parsed.
        name: of the field, for the message.
        repr_too: whether a Python literal is read as well, which is what pandas writes into a CSV cell.

    Returns:
        The value.

    Raises:
        BadRowError: the text is not valid JSON, holds NaN, or a key twice.
    """

    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        if repr_too:
            try:
                return ast.literal_eval(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                pass
        raise BadRowError(f"is not valid JSON: {error}", name) from None


def json_text(value: object, name: str) -> str:
    """A value as JSON text, its characters as they are.

    Args:
        value: written.
        name: of the field, for the message.

    Returns:
        The JSON.

    Raises:
        BadRowError: JSON has no form for it, or its text is not valid Unicode.
    """
    try:
        text = _ENCODER.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRowError(f"cannot be written as JSON: {error}", name) from None
    check_text(text, name)
    return text


@dataclass
class FieldNotes:
    """What rows said that nothing reads, each counted once a row."""

    unknown: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For each field: the number of rows and the place of the first."""
    noticed: Counter[str] = field(default_factory=Counter)
    """Rows for each thing that was changed on the way."""

    def add(self, unknown: Collection[str], noticed: Collection[str], file: str, number: int) -> None:
        """Count what one row said.

        Args:
            unknown: its fields that nothing reads.
            noticed: what was changed.
            file: the row's file.
            number: the row's number in it, from 1.
        """
        for name in set(unknown):
            if name not in self.unknown and len(self.unknown) >= _MOST_FIELDS:
                name = _OTHER_FIELDS  # noqa: PLW2901 - rows whose field names are data, such as ids
            if name not in self.unknown:
                self.unknown[name] = {"rows": 0, "first": f"{file}, row {number}"}
            self.unknown[name]["rows"] += 1
        self.noticed.update(set(noticed))

    def check(self, policy: Literal["warn", "fail", "ignore"]) -> None:
        """Refuse unknown fields where the configuration asks for that.

        Args:
            policy: data.unknown_fields.

        Raises:
            TrainerError: names the fields, their rows and the ways out.
        """
        if policy != "fail" or not self.unknown:
            return
        bare = sorted({name.rpartition(".")[2].partition(" ")[0] for name in self.unknown})
        names = ", ".join(bare[:_SHOWN_FIELDS]) + (", ..." if len(bare) > _SHOWN_FIELDS else "")
        raise TrainerError(
            "rows have fields that nothing reads:\n  "
            + "\n  ".join(unknown_lines(self.unknown))
            + f"\nTake them out, name them in data.metadata_fields: [{names}] where they say nothing that is to be "
            "learned, or set data.unknown_fields: warn"
        )


def unknown_lines(unknown: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Fields that nothing reads, a line for each.

    Args:
        unknown: of FieldNotes, or of a summary.

    Returns:
        Lines with the number of rows and the place of the first.
    """
    lines = [
        f"the field {name} is not read: {use['rows']:,} rows, the first {use['first']}"
        for name, use in islice(unknown.items(), _SHOWN_FIELDS)
    ]
    more = len(unknown) - len(lines)
    return lines + ([f"{more:,} more fields are not read"] if more else [])
