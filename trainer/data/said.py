"""What a conversation says, piece by piece, and where a rendered text says it.

A conversation's shape is rendered once with planted unique marks: this shows what the template leaves out, in which
order it writes the rest, and what is around each piece. A row of that shape is then compared with the pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.conversation import Message

TOOLS = -1
"""Takes the place of a message's number in a slot of the tools' descriptions."""
_ANCHOR = 12  # characters before a piece that tell its place from others
_SELF_EVIDENT = 8  # a text of so many characters is not found by chance

Slot = tuple[int, str]
"""Number of the message, and which part of it: content, thought, name K or arguments K of its call K."""


@dataclass(frozen=True)
class Talk:
    """A conversation as it is given to a template: thoughts apart, special tokens guarded."""

    messages: list[Message]
    """Without thoughts."""
    thoughts: dict[int, str]
    """Of the messages that have one."""
    inline: frozenset[int]
    """Messages whose row has the thought inside the content, so its white space is the row's."""
    tools: list[dict[str, Any]] | None
    arguments: Mapping[str, Any]
    """Of the template, which the row gives."""

    @property
    def slots(self) -> dict[Slot, Any]:
        """All that is said, by its place; what is empty is left out."""
        found: dict[Slot, Any] = {}
        for number, message in enumerate(self.messages):
            if message["content"].strip():
                found[number, "content"] = message["content"]
            if number in self.thoughts:
                found[number, "thought"] = self.thoughts[number]
            for at, call in enumerate(message.get("tool_calls") or ()):
                found[number, f"name {at}"] = call["function"]["name"]
                if call["function"]["arguments"]:
                    found[number, f"arguments {at}"] = call["function"]["arguments"]
        return found

    @property
    def shape(self) -> tuple[object, ...]:
        """The same for conversations that a template writes alike."""
        return (
            json.dumps(self.arguments, sort_keys=True) if self.arguments else "",
            bool(self.tools),
            *(
                (
                    message["role"],
                    message.get("weight") == 0,
                    bool(message["content"].strip()),
                    (number in self.thoughts) + (number in self.inline),
                    len(message.get("tool_calls") or ()),
                )
                for number, message in enumerate(self.messages)
            ),
        )

    def planted(self) -> Talk:
        """A conversation of the same shape that says nothing but unique marks."""
        messages = []
        for number, message in enumerate(self.messages):
            planted = message | {"content": f"Zq{number}cz" if message["content"].strip() else message["content"]}
            if message.get("tool_calls"):
                planted["tool_calls"] = [
                    call | {"function": {"name": f"Zq{number}n{at}z", "arguments": planted_arguments(number, at)}}
                    for at, call in enumerate(message["tool_calls"])
                ]
            messages.append(planted)
        thoughts = {number: f"Zq{number}tz" for number in self.thoughts}
        return Talk(messages, thoughts, self.inline, [planted_tool()] if self.tools else None, self.arguments)


def planted_arguments(number: int, at: int) -> dict[str, str]:
    """Arguments of a call that are nowhere else."""
    return {f"Zq{number}k{at}z": f"Zq{number}v{at}z"}


def planted_tool() -> dict[str, Any]:
    """A tool whose description is nowhere else."""
    parameters = {
        "type": "object",
        "properties": {"Zqparameterz": {"type": "string", "description": "Zqmeaningz"}},
        "required": ["Zqparameterz"],
    }
    return {"type": "function", "function": {"name": "Zqtoolz", "description": "Zqpurposez", "parameters": parameters}}


@dataclass(frozen=True)
class Found:
    """Where a text says the pieces of a conversation."""

    places: dict[Slot, tuple[int, int]]
    left_out: list[Slot]

    def end_of(self, number: int) -> int:
        """Where the last piece of a message ends; 0 where it says nothing."""
        return max((end for (message, _), (_, end) in self.places.items() if message == number), default=0)


def find_marks(talk: Talk, text: str) -> Found:
    """Find what a planted conversation says in any order; the places come in the order of the text.

    Args:
        talk: planted.
        text: as rendered.

    Returns:
        The first place of each piece.
    """
    places, left_out = {}, []
    for slot, value in talk.slots.items():
        marks = [*value, *value.values()] if isinstance(value, dict) else [value]
        starts = [text.find(mark) for mark in marks]
        if min(starts) < 0:
            left_out.append(slot)
        else:
            places[slot] = (min(starts), max(start + len(mark) for start, mark in zip(starts, marks, strict=True)))
    if talk.tools and not says_tools(talk.tools, text):
        left_out.append((TOOLS, "tools"))
    return Found(dict(sorted(places.items(), key=lambda item: item[1])), left_out)


def find_said(talk: Talk, text: str, planted: Found, planted_text: str) -> Found:
    """Find what a conversation says, each piece after the one before it and after the text that leads to it.

    Args:
        talk: the conversation.
        text: as rendered.
        planted: places of the same shape's marks: their order counts.
        planted_text: what leads to each piece.

    Returns:
        The place of each piece.
    """
    slots = talk.slots
    places: dict[Slot, tuple[int, int]] = {}
    left_out = [slot for slot in slots if slot not in planted.places]
    cursor = before = 0
    for slot, (start, end) in planted.places.items():
        if slot not in slots:
            continue
        anchor = planted_text[max(before, start - _ANCHOR) : start]
        before = end
        value = slots[slot]
        place = _find_json(value, text, cursor) if isinstance(value, dict) else _find_text(value, text, cursor, anchor)
        if place is None:
            left_out.append(slot)
        else:
            places[slot] = place
            cursor = place[1]
    if talk.tools and not says_tools(talk.tools, text):
        left_out.append((TOOLS, "tools"))
    return Found(places, left_out)


def _find_text(value: str, text: str, cursor: int, anchor: str) -> tuple[int, int] | None:
    """The place of a text that the template may strip or write into JSON, without white space at its end.

    White space at the end may be the text's or the template's, and what leads to the next piece starts with the latter.
    """
    for written in _spellings(value):
        at = text.find(anchor + written, cursor)
        if at >= 0:
            return at + len(anchor), at + len(anchor) + len(written.rstrip())
    for written in _spellings(value):
        at = text.find(written, cursor) if len(written) >= _SELF_EVIDENT else -1
        if at >= 0:
            return at, at + len(written.rstrip())
    return None


def _spellings(value: str) -> Iterator[str]:
    """A text as it is, stripped at either end, and as JSON writes it."""
    stripped = value.strip()
    yield value
    if stripped != value:
        yield from (stripped, value.rstrip())
    for plain in dict.fromkeys((value, stripped)):
        escaped = json.dumps(plain, ensure_ascii=False)[1:-1]
        if escaped != plain:
            yield escaped


def _find_json(value: Any, text: str, cursor: int) -> tuple[int, int] | None:  # noqa: ANN401 - JSON is anything
    """The place of a JSON value that the template writes whole, or member by member."""
    for written in _dumps(value):
        at = text.find(written, cursor)
        if at >= 0:
            return at, at + len(written)
    start, end = len(text), cursor
    for leaf in _leaves(value):
        spelled = {*_spellings(leaf)} if isinstance(leaf, str) else {json.dumps(leaf), str(leaf)}
        places = [(at, at + len(written)) for written in spelled if (at := text.find(written, cursor)) >= 0]
        if not places:
            return None
        start, end = min(start, min(places)[0]), max(end, min(places)[1])
    return start, end


def _dumps(value: Any) -> Iterator[str]:  # noqa: ANN401 - JSON is anything
    """What the templates' tojson makes of a value."""
    yield json.dumps(value, ensure_ascii=False)
    yield json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    yield json.dumps(value, ensure_ascii=False, indent=4)
    yield json.dumps(value, ensure_ascii=False, indent=2)


def _leaves(value: Any) -> Iterator[Any]:  # noqa: ANN401 - JSON is anything
    """The keys and the values that are neither objects nor lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def says_tools(tools: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether a text describes each tool: its name, what it is for, and its parameters and what they mean.

    Args:
        tools: descriptions in OpenAI's form.
        text: as rendered.
    """
    for tool in tools:
        function = tool.get("function", tool)
        if any(written in text for written in (*_dumps(tool), *_dumps(function))):
            continue
        properties = (function.get("parameters") or {}).get("properties")
        words = [function.get("name"), function.get("description")]
        if isinstance(properties, dict):
            words += properties
            words += [schema.get("description") for schema in properties.values() if isinstance(schema, dict)]
        if not all(_is_said(word, text) for word in words if isinstance(word, str) and word.strip()):
            return False
    return True


def _is_said(words: str, text: str) -> bool:
    """Whether each line of some words is in a text: templates that write code put them into comments."""
    return all(any(written in text for written in _spellings(line)) for line in words.splitlines() if line.strip())
