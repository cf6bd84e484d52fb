"""Messages in every documented form -> those that chat templates take: role, content, thought, calls, mark for loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from trainer.data.conversation import BadRowError, Message
from trainer.data.fields import (
    LEARNED,
    MEDIA,
    METADATA,
    NOT_LEARNED,
    THOUGHTS,
    NumberText,
    as_text,
    is_blank,
    json_text,
    kind,
    parsed,
)
from trainer.data.tools import read_calls

Role = Literal["system", "user", "assistant", "tool", "tool_call"]

ROLE_WORDS: Mapping[Role, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai", "claude", "gemini"),
    "tool": (
        *("tool", "function", "observation", "ipython", "tool_response", "tool_result", "tool_output"),
        *("function_response", "function_result", "function_output"),
    ),
    # A message of its own that is the assistant's call.
    "tool_call": ("tool_call", "tool_calls", "function_call"),
}
"""The words that data sets use for each role; upper and lower case are the same."""

CONTENT = ("content", "value")
PART_TEXT = ("text", "value", "content")
_TEXT_PARTS = frozenset(("text", "input_text", "output_text"))
_THOUGHT_PARTS = frozenset(("thinking", "reasoning", "thought"))
_CALL_PARTS = frozenset(("tool_use", "tool_call", "function_call"))
_RESULT_PARTS = frozenset(("tool_result", "tool_response"))
_TURN_WORDS = {  # keys of a turn that is one object, such as {human: ..., assistant: ...}, in the order of speaking
    "system": "system",
    **dict.fromkeys(("user", "human", "input"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "output"), "assistant"),
}
_ROLE_AND_CONTENT = frozenset(("role", "from", *CONTENT))
_MARKS = frozenset((*LEARNED, *NOT_LEARNED, "train_detail", "training_detail", "mask"))
_USED = frozenset(("tool_calls", "function_call", "name", "tool_call_id", "tools", *THOUGHTS)) | _MARKS | METADATA


@dataclass(frozen=True)
class MessageRules:
    """How messages are read."""

    roles: Mapping[str, Role] = field(default_factory=dict)
    """Further words for roles, by data.roles."""
    repeated_roles: Literal["refuse", "join"] = "refuse"
    numbers: NumberText = "exact"
    metadata: frozenset[str] = frozenset()
    """Names of fields that are not read, by data.metadata_fields."""

    @cached_property
    def words(self) -> dict[str, Role]:
        """Every word for a role, in lower case."""
        known: dict[str, Role] = {word: role for role, words in ROLE_WORDS.items() for word in words}
        return known | {word.lower(): role for word, role in self.roles.items()}

    def role(self, word: object, name: str) -> Role:
        """The role that a word means.

        Args:
            word: as in the row.
            name: of the message.

        Returns:
            The role.

        Raises:
            BadRowError: the word is unknown.
        """
        known = self.words
        role = known.get(word) or known.get(word.strip().lower()) if isinstance(word, str) else None
        if role is None:
            raise BadRowError(
                f"unknown role {word!r}; known: {', '.join(known)}; give others a meaning under data.roles, such as "
                f"{{{word}: user}} or {{{word}: assistant}}",
                name,
            )
        return role


@dataclass
class _Said:
    """What the parts of a content say, in the order of the parts."""

    text: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)


def read_messages(listed: object, name: str, rules: MessageRules, unknown: list[str]) -> list[Message]:
    """The messages of a list, in the words of chat templates.

    Args:
        listed: messages with a role and a content; turns of a question and an answer; or JSON text of either.
        name: of the field.
        rules: how they are read.
        unknown: gets the names of fields that nothing reads.

    Returns:
        Messages; without a first system message that says nothing.

    Raises:
        BadRowError: names the message and the reason.
    """
    if isinstance(listed, str) and not is_blank(listed):
        listed = parsed(listed, name, repr_too=True)
    if not isinstance(listed, list) or not listed:
        raise BadRowError(f"must be a list of messages, it is {kind(listed)}", name)
    messages: list[Message] = []
    for number, item in enumerate(listed):
        where = f"{name}[{number}]"
        if not isinstance(item, dict):
            raise BadRowError(f"a message must be an object, this is {kind(item)}", where)
        for message, is_call in _read(item, where, rules, unknown):
            before = messages[-1] if messages else None
            if (
                before is None
                or before["role"] != message["role"]
                or message["role"] == "tool"
                or not (is_call or rules.repeated_roles == "join")
            ):
                messages.append(message)
            else:
                messages[-1] = _joined(before, message, where)
    # An empty system message says nothing.
    return messages[1:] if messages[0]["role"] == "system" and is_blank(messages[0]["content"]) else messages


def _read(item: dict[str, Any], name: str, rules: MessageRules, unknown: list[str]) -> list[tuple[Message, bool]]:
    """What one object of the list says, and whether it is a call that belongs to the assistant's words before it."""
    given = {
        key: value
        for key, value in item.items()
        if value is not None and key not in _ROLE_AND_CONTENT and not is_blank(value) and key not in rules.metadata
    }
    if not given and ("role" in item) != ("from" in item) and ("content" in item) != ("value" in item):
        word = item["role"] if "role" in item else item["from"]  # nearly every message
        content = item["content"] if "content" in item else item["value"]
        if word is not None and isinstance(content, str) and (role := rules.role(word, name)) != "tool_call":
            return [({"role": role, "content": content}, False)]
    if item.get("role") is None and item.get("from") is None:
        return [(message, False) for message in _turn(item, name, rules, unknown)]
    word = item["from"] if item.get("role") is None else item["role"]
    if item.get("from") is not None and rules.role(item["from"], name) != rules.role(word, name):
        raise BadRowError(f"role is {word!r} and from is {item['from']!r}: take one out", name)
    role = rules.role(word, name)
    said = _content(_only(item, CONTENT, name), role, name, rules, unknown)
    content = "".join(said.text)
    if role == "tool_call":
        if is_blank(item.get("tool_calls")) or not is_blank(content):
            said.calls += read_calls(content, name, unknown)
        content = ""
        if not said.calls and is_blank(item.get("tool_calls")):
            raise BadRowError("a tool call needs a name and arguments", name)
    message: Message = {"role": "assistant" if role == "tool_call" else role, "content": content}
    if given or said.thoughts or said.calls:
        _add_fields(message, given, said, name, rules, unknown)
    read = [(result, False) for result in said.results]
    # A user's message that only brings tools' results is these results.
    return read if read and is_blank(content) else [*read, (message, role == "tool_call")]


def _add_fields(
    message: Message, given: dict[str, Any], said: _Said, name: str, rules: MessageRules, unknown: list[str]
) -> None:
    """Read all that a message has beside its role and content."""
    is_assistant = message["role"] == "assistant"
    thought = _thought(given, said.thoughts, name)
    calls = _calls(given, said.calls, name, unknown)
    if not is_assistant and (thought or calls):
        raise BadRowError(f"only the assistant thinks and calls tools, this is the role {message['role']}", name)
    message |= ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": thought} if thought else {})
    for key in ("name", "tool_call_id"):
        if key in given:
            message[key] = as_text(given[key], "exact", f"{name}.{key}")
    if "tools" in given:
        if message["role"] != "system":
            raise BadRowError("tools belong to the system message or to the row", name)
        message["tools"] = given["tools"]
    weight = None if given.keys().isdisjoint(_MARKS) else _weight(given, name)
    if weight is not None:
        message["weight"] = weight
        if weight and not is_assistant:
            key = next(key for key in (*LEARNED, *NOT_LEARNED) if key in given)
            unknown.append(f"{name}.{key} ({message['role']})")
    for key in given.keys() - _USED:
        if key in MEDIA:
            raise BadRowError(f"only text can be learned, and {key} is something else", name)
        if key.lower() not in METADATA:
            unknown.append(f"{name}.{key}")


def _calls(
    given: Mapping[str, Any], calls: list[dict[str, Any]], name: str, unknown: list[str]
) -> list[dict[str, Any]]:
    """The tool calls of a message, wherever it has them."""
    for key in ("tool_calls", "function_call"):
        if key in given:
            found = read_calls(given[key], f"{name}.{key}", unknown)
            if calls and found and [call["function"] for call in calls] != [call["function"] for call in found]:
                raise BadRowError(f"{key} says other calls than the message's other fields", name)
            calls = found or calls
    return calls


def _only(given: Mapping[str, Any], keys: tuple[str, ...], name: str) -> Any:  # noqa: ANN401 - JSON is anything
    """The value of the one key that is given; two that differ contradict each other."""
    said = [key for key in keys if not is_blank(given.get(key))]
    if any(given[key] != given[said[0]] for key in said):
        raise BadRowError(f"{' and '.join(said)} differ", name)
    return given[said[0]] if said else next((given[key] for key in keys if given.get(key) is not None), None)


def _thought(given: Mapping[str, Any], thoughts: list[str], name: str) -> str:
    """The one thought of a message; empty where there is none."""
    found = ["\n\n".join(thoughts)] if thoughts else []
    for key in THOUGHTS:
        if key in given:
            if not isinstance(given[key], str):
                raise BadRowError(f"must be text, it is {kind(given[key])}", f"{name}.{key}")
            found.append(given[key])
    if any(thought.strip() != found[0].strip() for thought in found):
        raise BadRowError("has two thoughts that differ", name)
    return found[0] if found and not is_blank(found[0]) else ""


def _weight(given: Mapping[str, Any], name: str) -> int:
    """1 where the message is marked to be learned, 0 where it is marked not to be."""
    for key in ("train_detail", "training_detail"):
        if key in given:
            raise BadRowError(
                f"{key} marks parts of a turn, and a turn is learned as a whole or not at all: give the turn a weight "
                "of 0 or 1",
                name,
            )
    if "mask" in given:
        raise BadRowError("mask does not say whether 1 is learned: rename it to weight (1) or masked (0)", name)
    marks = {}
    for key in (*LEARNED, *NOT_LEARNED):
        if key in given:
            if given[key] not in (0, 1):
                raise BadRowError(f"{key} must be 0 or 1, it is {given[key]!r}", name)
            marks[key] = int(given[key]) ^ (key in NOT_LEARNED)
    if len(set(marks.values())) > 1:
        raise BadRowError(f"{' and '.join(marks)} contradict each other", name)
    return next(iter(marks.values()))


def _content(value: object, role: Role, name: str, rules: MessageRules, unknown: list[str]) -> _Said:
    """What a content says: text, a list of parts, or an object that a tool returned."""
    if isinstance(value, str):
        return _Said([value])
    if value is None or is_blank(value):
        return _Said()
    if isinstance(value, dict) and value.get("type") in _ALL_PARTS:
        value = [value]
    if isinstance(value, list) and (role not in ("tool", "tool_call") or all(_is_part(part) for part in value)):
        said = _Said()
        for part in value:
            _add_part(said, part, role, name, rules, unknown)
        return said
    if role in ("tool", "tool_call") and isinstance(value, dict | list):
        return _Said([json_text(value, name)])
    try:
        return _Said([as_text(value, rules.numbers, f"{name}.content")])
    except BadRowError as error:
        raise BadRowError(f"content {error.reason}", name) from None


_ALL_PARTS = _TEXT_PARTS | _THOUGHT_PARTS | _CALL_PARTS | _RESULT_PARTS


def _is_part(value: object) -> bool:
    return isinstance(value, dict) and value.get("type") in _ALL_PARTS


def _add_part(said: _Said, part: object, role: Role, name: str, rules: MessageRules, unknown: list[str]) -> None:
    """Read one part of a content."""
    if isinstance(part, str):
        said.text.append(part)
        return
    given = {key: item for key, item in part.items() if not is_blank(item)} if isinstance(part, dict) else {}
    sort = given.get("type", "text" if "text" in given else None)
    used: tuple[str, ...] = ("type", *PART_TEXT)
    if sort in _TEXT_PARTS and isinstance(part, dict):
        text = _only(part, PART_TEXT, name)
        if not isinstance(text, str):
            raise BadRowError(f"a text part must hold text, it holds {kind(text)}", name)
        said.text.append(text)
    elif sort in _THOUGHT_PARTS:
        used += (str(sort), "signature", "thinking")
        inner = _content(_only(given, (str(sort), *PART_TEXT), name), role, name, rules, unknown)
        said.thoughts.append("".join(inner.text))
    elif sort in _CALL_PARTS:
        used = tuple(given)
        said.calls += read_calls(given.get("value") or {**given, "type": "function"}, name, unknown)
    elif sort in _RESULT_PARTS:
        used += ("tool_use_id", "tool_call_id", "is_error", "id", "name", "output")
        inner = _content(_only(given, ("content", "output", "value", "text"), name), "tool", name, rules, unknown)
        identity = _only(given, ("tool_use_id", "tool_call_id"), name)
        result: Message = {"role": "tool", "content": "".join(inner.text)}
        said.results.append(result | ({"tool_call_id": identity} if isinstance(identity, str) else {}))
    else:
        what = f"of the type {sort!r}" if sort else kind(part)
        raise BadRowError(f"only text can be learned; a part of the content is something else, {what}", name)
    for key in given.keys() - set(used) - METADATA:
        if key in MEDIA:
            raise BadRowError(f"only text can be learned; a part of the content has {key}", name)
        unknown.append(f"{name}.content.{key}")


def _turn(item: dict[str, Any], name: str, rules: MessageRules, unknown: list[str]) -> list[Message]:
    """The messages of an object whose keys are roles, such as {human: ..., assistant: ...}."""
    given = {key: value for key, value in item.items() if key not in rules.metadata and not is_blank(value)}
    messages: list[Message] = [
        {"role": role, "content": as_text(given[key], rules.numbers, f"{name}.{key}")}
        for key, role in _TURN_WORDS.items()
        if key in given
    ]
    if not messages:
        keys = ", ".join(item) or "nothing"
        raise BadRowError(f"a message needs a role (or from) and a content (or value), this one has {keys}", name)
    unknown += [f"{name}.{key}" for key in given.keys() - _TURN_WORDS if key.lower() not in METADATA]
    return messages


def _joined(before: Message, after: Message, name: str) -> Message:
    """Two messages of one role as one."""
    if before.get("weight", 1) != after.get("weight", 1):
        raise BadRowError("can't be joined with the message before it: one is learned, the other is not", name)
    if before.get("name") != after.get("name"):
        raise BadRowError("can't be joined with the message before it: their names differ", name)
    contents = [message["content"] for message in (before, after) if not is_blank(message["content"])]
    if before.get("tool_calls") and not is_blank(after["content"]):
        raise BadRowError("can't be joined with the message before it, whose tool calls have no result yet", name)
    if after.get("reasoning_content") and any(
        before.get(key) for key in ("reasoning_content", "tool_calls", "content")
    ):
        raise BadRowError("can't be joined with the message before it: it thinks again after that", name)
    calls = [*before.get("tool_calls", ()), *after.get("tool_calls", ())]
    return before | after | {"content": "\n\n".join(contents)} | ({"tool_calls": calls} if calls else {})
