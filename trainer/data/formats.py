"""Rows of a known form -> conversations. Every row is checked, also after `auto` decided from the first ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from trainer.config import Columns, RowFormat
from trainer.data.conversation import BadRowError, Conversation, Message, TrainOn, check_conversation
from trainer.data.fields import (
    LEARNED,
    MEDIA,
    METADATA,
    NOT_LEARNED,
    SYSTEM,
    TEMPLATE_ARGUMENT_TABLES,
    TEMPLATE_ARGUMENTS,
    THOUGHTS,
    FieldNotes,
    as_text,
    is_blank,
    json_text,
    kind,
    label,
    parsed,
)
from trainer.data.messages import MessageRules, read_messages
from trainer.data.tools import NULLS_LEFT_OUT, drop_null_arguments, read_tools
from trainer.errors import TrainerError

LISTS = ("messages", "conversations", "conversation")
"""Fields that hold a list of messages."""

_EXTRA = ("input", "context")
_TOOLS = ("tools", "functions")
_PREFERENCE = (("chosen", "rejected"), ("rejected_response",), ("rejected_messages",))
_RENDERED = ("text", "prompt", "formatted_text", "full_text", "chat")  # may hold the whole conversation as one text
_INDEX = re.compile(r"\[\d+\]")
# What apply_chat_template takes for itself; a row may give arguments of the template only.
_RESERVED = """\
messages conversation tools chat_template add_generation_prompt continue_final_message tokenize padding truncation
max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs processor_kwargs
"""


@dataclass(frozen=True)
class OneTurn:
    """Names of the fields of a form that is one question and one answer."""

    prompt: tuple[str, ...]
    answer: tuple[str, ...]


ONE_TURN: Mapping[RowFormat, OneTurn] = {
    "alpaca": OneTurn(("instruction",), ("output", "response")),
    "prompt_completion": OneTurn(("prompt", "query"), ("completion", "response")),
}
_KNOWN_FORMS = (
    "messages (messages or conversations: a list of role and content), sharegpt (conversations: a list of from and "
    "value), alpaca (instruction, input, output), prompt_completion (prompt, completion)"
)
_NO_COLUMNS = Columns(prompt="prompt", response="response")


@dataclass(frozen=True)
class RowReader:
    """Reads rows of one form."""

    format: RowFormat
    input_separator: str
    """Between a question and the input that goes with it."""
    columns: Columns | None = None
    category: str | None = None
    """Of rows that have none of their own."""
    split_column: str | None = None
    splits: tuple[str, ...] = ()
    """Values that the split column may have; none means any."""
    rules: MessageRules = field(default_factory=MessageRules)
    train_on: TrainOn = "assistant"
    notes: FieldNotes = field(default_factory=FieldNotes)
    """Gets what rows say that nothing reads."""

    def read(self, row: object, default_id: str, file: str = "", number: int = 0) -> Conversation:
        """Turn a row into a conversation.

        Args:
            row: as in its file.
            default_id: the id of a row that has none.
            file: the row's file, for the notes.
            number: the row's number in it, from 1, for the notes.

        Returns:
            The conversation, checked.

        Raises:
            BadRowError: names the field and the reason.
        """
        if not isinstance(row, dict):
            raise BadRowError(f"a row must be an object with named fields, this one is {kind(row)}")
        return _Row(self, row).conversation(default_id, file, number)


@dataclass(frozen=True)
class _Names:
    """What the names of a row's fields mean; nearly all rows of a source have the same."""

    read: tuple[str, ...]
    """All that are not metadata."""
    system: tuple[str, ...]
    tools: tuple[str, ...]
    tables: tuple[str, ...]
    arguments: tuple[str, ...]
    thoughts: tuple[str, ...]
    refused: bool
    """Whether some belong to preferences, or to more than text."""


@lru_cache(maxsize=1024)
def _names_of(names: tuple[str, ...]) -> _Names:
    return _Names(
        read=tuple(name for name in names if str(name).lower() not in METADATA),
        system=tuple(name for name in names if str(name).lower() in SYSTEM),
        tools=tuple(name for name in names if name in _TOOLS),
        tables=tuple(name for name in names if name in TEMPLATE_ARGUMENT_TABLES),
        # DeepSeek's template is asked to think by an argument of the same name as a thought has in other data.
        arguments=tuple(name for name in names if name in (*TEMPLATE_ARGUMENTS, "thinking")),
        thoughts=tuple(name for name in names if name in THOUGHTS),
        refused=any(name in MEDIA or any(name in given for given in _PREFERENCE) for name in names),
    )


class _Row:
    """One row while it is read."""

    def __init__(self, reader: RowReader, row: dict[str, Any]) -> None:
        self.reader = reader
        self.row = row
        self.names = _names_of(tuple(row))
        hidden = reader.rules.metadata
        self.given = {
            name: value for name in self.names.read if not is_blank(value := row[name]) and name not in hidden
        }
        """The fields that say something and are to be read."""
        self.unknown: list[str] = []
        self.used: set[str] = set()

    def conversation(self, default_id: str, file: str, number: int) -> Conversation:
        """What the row says."""
        reader, names = self.reader, self.reader.columns or _NO_COLUMNS
        if self.names.refused:
            _refuse_other_data(self.given)
        messages = self._with_system(self._messages())
        tools = self._tools(messages)
        kwargs = self._template_kwargs() if self.names.tables or self.names.arguments else None
        dropped = drop_null_arguments(messages, tools)
        check_conversation(messages, reader.train_on)
        row_id, category = label(self.row, names.id or "id"), label(self.row, names.category or "category")
        split = self._split(reader.split_column) if reader.split_column else None
        self.used.update((names.id or "id", names.category or "category", reader.split_column or "split"))
        if not self.given.keys() <= self.used:
            self._look_at_the_rest(messages)
        if self.unknown or dropped:
            unknown = [_INDEX.sub("[]", name) for name in self.unknown]
            reader.notes.add(unknown, [NULLS_LEFT_OUT] if dropped else [], file, number)
        return Conversation(
            id=row_id or default_id,
            messages=messages,
            category=category or reader.category,
            tools=tools,
            split=split,
            template_kwargs=kwargs,
        )

    def _messages(self) -> list[Message]:
        form, columns = self.reader.format, self.reader.columns
        if form == "columns" and columns:
            return self._one_turn((columns.prompt,), (columns.input,) if columns.input else (), (columns.response,))
        if form in ONE_TURN:
            names = ONE_TURN[form]
            return self._one_turn(names.prompt, _EXTRA, names.answer)
        for fields in (self.given, self.row):
            for name in LISTS:
                if name in fields:
                    return self._listed(name)
        raise self._missing(LISTS[0])

    def _one_turn(self, prompt: tuple[str, ...], extra: tuple[str, ...], answer: tuple[str, ...]) -> list[Message]:
        question, answered = self._only(prompt), self._only(answer)
        history = self._history() if "history" in self.given else []
        if isinstance(self.row.get(question), list):
            asked = self._listed(question)
        else:
            text = self._required(question)
            if not self.given.keys().isdisjoint(extra):
                text += self.reader.input_separator + self._required(self._only(extra))
            asked = [{"role": "user", "content": text}]
        if isinstance(self.row.get(answered), list):
            said = self._listed(answered)
        else:
            said = [{"role": "assistant", "content": self._required(answered)}]
        thoughts = tuple(name for name in self.names.thoughts if isinstance(self.given.get(name), str))
        if thoughts and said[0]["role"] == "assistant" and "reasoning_content" not in said[0]:
            said[0]["reasoning_content"] = self._required(self._only(thoughts))
        return [*history, *asked, *said]

    def _history(self) -> list[Message]:
        """Earlier turns: pairs of a question and its answer, or messages."""
        turns = self.given["history"]
        self.used.add("history")
        if isinstance(turns, str):
            turns = parsed(turns, "history", repr_too=True)
        if not isinstance(turns, list):
            raise BadRowError(f"must be a list of earlier turns, it is {kind(turns)}", "history")
        listed: list[object] = []
        for number, turn in enumerate(turns):
            if isinstance(turn, dict):
                listed.append(turn)
            elif isinstance(turn, list | tuple) and len(turn) == 2:
                listed.append({"user": turn[0], "assistant": turn[1]})
            else:
                raise BadRowError("an earlier turn must be a question and its answer", f"history[{number}]")
        return read_messages(listed, "history", self.reader.rules, self.unknown) if listed else []

    def _listed(self, name: str) -> list[Message]:
        """The messages in a field."""
        self.used.add(name)
        return read_messages(self.row.get(name), name, self.reader.rules, self.unknown)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        """The messages, after the system message that the row has in a column of its own."""
        columns = self.reader.columns
        named = (columns.system,) if columns and columns.system else ()
        if not (named or self.names.system):
            return messages
        names = tuple(name for name in dict.fromkeys((*named, *self.names.system)) if name in self.given)
        if not names:
            return messages
        name = self._only(names)
        text = self._required(name)
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": text}, *messages]
        if messages[0]["content"].strip() != text.strip():
            raise BadRowError(f"differs from the system message in the row's messages; {_leave_out(name)}", name)
        return messages

    def _tools(self, messages: list[Message]) -> list[dict[str, Any]] | None:
        """The tools of the row or of its system message."""
        if not self.names.tools and "tools" not in messages[0]:
            return None
        given = {name: self.given[name] for name in self.names.tools if name in self.given}
        self.used.update(given)
        offered = [read_tools(value, name) for name, value in given.items()]
        offered += [read_tools(message.pop("tools"), "tools") for message in messages if "tools" in message]
        offered = [tools for tools in offered if tools]
        if any(tools != offered[0] for tools in offered):
            raise BadRowError("the row offers two lists of tools that differ", "tools")
        return offered[0] if offered else None

    def _template_kwargs(self) -> dict[str, Any] | None:
        """The arguments of the chat template that the row gives."""
        kwargs: dict[str, Any] = {}
        tables = [name for name in self.names.tables if name in self.given]
        for name in tables:
            table = self.given[name]
            if isinstance(table, str):
                table = parsed(table, name, repr_too=True)
            if not isinstance(table, dict):
                raise BadRowError(f"must be an object of names and values, it is {kind(table)}", name)
            self._add_kwargs(kwargs, table, name)
        single = [name for name in self.names.arguments if name in self.given]
        if isinstance(self.given.get("thinking"), str):
            single.remove("thinking")
        for name in single:
            self._add_kwargs(kwargs, {name: self.given[name]}, name)
        self.used.update(tables, single)
        return kwargs or None

    def _add_kwargs(self, kwargs: dict[str, Any], table: dict[str, Any], name: str) -> None:
        for key, value in table.items():
            if value is None:  # Arrow's, where another row gives the argument
                continue
            if key in _RESERVED.split():
                raise BadRowError(f"{key} is no argument that a row may give to the chat template", name)
            if kwargs.setdefault(key, value) != value:
                raise BadRowError(f"gives the chat template another {key} than the row's other fields", name)
        json_text(table, name)

    def _split(self, column: str) -> str:
        """Which split the row says it belongs to."""
        split = self._required(column)
        if self.reader.splits and split not in self.reader.splits:
            raise BadRowError(
                f"is {split!r}, which is none of {', '.join(self.reader.splits)}: name your values under data.split",
                column,
            )
        return split

    def _only(self, names: tuple[str, ...]) -> str:
        """Which one of some names the row uses; two that say the same are one, two that differ contradict."""
        given = [name for name in names if name in self.given]
        self.used.update(given)
        if len(given) > 1 and any(self.given[name] != self.given[given[0]] for name in given):
            raise BadRowError(f"the row has {' and '.join(given)}, and they differ; {_leave_out(given[-1])}", given[0])
        return given[0] if given else next((name for name in names if name in self.row), names[0])

    def _required(self, name: str) -> str:
        """A field that must be there and must say something."""
        self.used.add(name)
        if name not in self.row:
            raise self._missing(name)
        value = self.row[name]
        if value is None or (isinstance(value, float) and is_blank(value)):
            raise BadRowError("must be text, it is null", name)
        text = as_text(value, self.reader.rules.numbers, name)
        if is_blank(text):
            raise BadRowError("is empty", name)
        return text

    def _missing(self, name: str) -> BadRowError:
        """The error of a row that lacks a field, with the form that the row has instead."""
        other = next(iter(forms_of(self.given)), None)
        hint = f"; this row is {other}, and the source is read as {self.reader.format}" if other else ""
        return BadRowError(f"is missing; the row has {', '.join(map(str, self.row)) or 'no fields'}{hint}", name)

    def _look_at_the_rest(self, messages: list[Message]) -> None:
        """Note the fields that nothing has read; refuse those that say something else than the conversation."""
        rest = [name for name in self.given if name not in self.used]
        said = [text.strip() for message in messages for text in _texts(message)]
        rivals = set(LISTS) if self.reader.format != "columns" else set()
        for form in forms_of(self.given) if rivals else ():
            if form in ONE_TURN and form != self.reader.format:
                rivals.update(ONE_TURN[form].prompt, ONE_TURN[form].answer)
        for name in rest:
            if name in LEARNED or name in NOT_LEARNED:
                _check_mark_of_row(name, self.given[name])
            if not _restates(name, self.given[name], said):
                if name in rivals:
                    raise BadRowError(
                        f"says something else than the rest of the row, which is read as {self.reader.format}; "
                        + _leave_out(name),
                        name,
                    )
                self.unknown.append(name)


def _refuse_other_data(given: Mapping[str, Any]) -> None:
    """Refuse rows of preferences and of more than text."""
    for names in _PREFERENCE:
        if all(name in given for name in names):
            raise BadRowError(f"this is preference data ({', '.join(names)}), which is not supported yet", names[-1])
    for name in MEDIA:
        if name in given:
            raise BadRowError(f"only text can be learned, and this is something else; {_leave_out(name)}", name)


def _check_mark_of_row(name: str, mark: object) -> None:
    """Refuse a mark for loss beside the messages that takes something from learning; other values are no marks."""
    if isinstance(mark, list) or (mark in (0, 1) and bool(mark) == (name in NOT_LEARNED)):
        raise BadRowError(
            "marks the row, or turns of it, not to be learned, and such marks are read of messages alone: give each "
            f"message its own, leave the row out, or name it in data.metadata_fields: [{name}] to leave it unread",
            name,
        )


def _leave_out(name: str) -> str:
    return f"take it out, or name it in data.metadata_fields: [{name}] to leave it unread"


def _texts(message: Message) -> tuple[str, ...]:
    return message["content"], message.get("reasoning_content", "")


def _restates(name: str, value: object, said: Sequence[str]) -> bool:
    """Whether a field only repeats what the messages say: one of them, some as a list, or all as one text."""
    if isinstance(value, str):
        return value.strip() in said or (name in _RENDERED and all(text in value for text in said))
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return False
    texts = [str(item.get("content", item.get("value"))).strip() for item in value]
    return all(text in said for text in texts)


def forms_of(row: Mapping[str, Any]) -> list[RowFormat]:
    """Every form in which a row says something whole, the one that is read first.

    Args:
        row: its fields.

    Returns:
        No form where the row is of no known one.
    """
    forms: list[RowFormat] = []
    for name in LISTS:
        value = row.get(name)
        if isinstance(value, str) and value.lstrip()[:1] == "[":
            forms.append("sharegpt" if re.match(r"\[\s*{[^}]*?[\"']from[\"']\s*:", value.lstrip()) else "messages")
        elif isinstance(value, list):
            first = value[0] if value else None
            forms.append("sharegpt" if isinstance(first, dict) and "from" in first else "messages")
    for form, names in ONE_TURN.items():
        if any(name in row for name in names.prompt) and any(name in row for name in names.answer):
            forms.append(form)
    return forms


def detect_format(rows: Sequence[object], where: str) -> RowFormat:
    """Decide the form of a source from its first rows.

    Args:
        rows: the first rows.
        where: the source, for messages.

    Returns:
        The form that most of them have; a row of another form is a bad row when it is read.

    Raises:
        TrainerError: no known form, or preference rows.
    """
    found: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, dict):
            given = {name: value for name, value in row.items() if not is_blank(value)}
            preference = any(all(name in given for name in names) for names in _PREFERENCE)
            found.update(["preference"] if preference else (forms_of(given) or forms_of(row))[:1])
    if not found:
        raise TrainerError(
            f"{where}: the first {len(rows)} rows have no known form ({_fields(rows)}). Known: {_KNOWN_FORMS}. For "
            "other names give the source format: columns and " + _columns_for(rows)
        )
    form = found.most_common(1)[0][0]
    if form == "preference":
        number = next(number for number, row in enumerate(rows, start=1) if isinstance(row, dict))
        raise TrainerError(
            f"{where}, row {number}: this is preference data (chosen, rejected), which is not supported yet; "
            "give rows with one answer each"
        )
    return form  # type: ignore[return-value] # a key of the counter is a form


def _fields(rows: Sequence[object]) -> str:
    if not rows:
        return "fields: none"
    return "fields: " + (", ".join(map(str, rows[0])) if isinstance(rows[0], dict) else kind(rows[0]))


def _columns_for(rows: Sequence[object]) -> str:
    """The setting that names a row's columns, filled in where it has just two."""
    names = (
        [name for name in rows[0] if str(name).lower() not in METADATA] if rows and isinstance(rows[0], dict) else []
    )
    prompt, response = names if len(names) == 2 else ("...", "...")
    return f"columns: {{prompt: {prompt}, response: {response}}}"
