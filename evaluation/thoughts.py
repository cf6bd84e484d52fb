"""Splits a model's thought from its answer, so that no judge sees a thought as an answer.

A chat template that lets a model think writes the thought between two texts, such as `<think>` and `</think>`. Rows of
the test set name those of the training template; models that are asked by their own template use a known pair.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

_BLANK_LINES = re.compile(r"\A(?:[ \t]*\r?\n)+")
_FIRST_TAG = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True)
class Thinking:
    """The texts that one chat template writes around a thought; compared without their outer white space.

    Attributes:
        open: Before the thought.
        close: After the thought, up to where the answer starts.
        opened: The prompt already ends inside the opened thought, so the response starts with the thought.
        plain: Before an answer without a thought.
    """

    open: str
    close: str
    opened: bool = False
    plain: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Parts:
    """A response in two parts.

    Attributes:
        thought: Without its tags and outer white space; None where there is none, or an empty one.
        answer: The rest; None where the thought was not closed, so that there is no answer.
        closed: Whether the thought was closed; None without a thought.
    """

    thought: str | None
    answer: str | None
    closed: bool | None


# What models in use write, for those that are asked by their own chat template and for answers made elsewhere.
KNOWN = (
    Thinking("<think>\n", "\n</think>\n\n"),  # DeepSeek, Qwen, GLM, Phi-4-reasoning, SmolLM3, Granite 3.3
    Thinking(
        "<|channel|>analysis<|message|>",  # GPT-OSS
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        plain="<|channel|>final<|message|>",
    ),
    Thinking("<|channel>thought\n", "<channel|>"),  # Gemma 4
    Thinking("[THINK]", "[/THINK]"),  # Magistral
    Thinking("<seed:think>", "</seed:think>"),  # Seed-OSS
    Thinking("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    Thinking("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL
    Thinking("Here is my thought process:", "Here is my response:"),  # Granite 3.2
    Thinking("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker
    Thinking("<thinking>\n", "\n</thinking>\n\n"),
    Thinking("<thought>\n", "\n</thought>\n\n"),
    Thinking("<reasoning>\n", "\n</reasoning>\n\n"),
)


def split(text: str, thinking: Thinking) -> Parts:
    """Split a response at the tags of its chat template.

    A thought starts at the response's beginning where the prompt opened it, else at its tag. A closing tag that ends a
    line closes a thought even where no tag opened it.

    >>> split("<think>17 + 25</think>42", Thinking("<think>", "</think>"))
    Parts(thought='17 + 25', answer='42', closed=True)

    Args:
        text: The response, the tags included even where they are special tokens.
        thinking: The tags.

    Returns:
        The parts; a response without a thought is the answer as it is, without the template's `plain` before it.
    """
    tag = thinking.open.strip()
    starts_open = text.lstrip().startswith(tag)
    if starts_open or thinking.opened:
        inside = text.lstrip()[len(tag) :] if starts_open else text
        return _closed("", inside, thinking)
    before, opens, after = text.partition(tag)
    if opens and _close_in(after, thinking) is not None:
        return _closed(before, after, thinking)
    alone = re.search(re.escape(thinking.close.strip()) + r"(?=[ \t]*\n|\s*\Z)", text)
    if alone is not None and not opens:
        return _parts(text[: alone.start()], text[alone.end() :], thinking)
    plain = thinking.plain.strip()
    if plain and text.lstrip().startswith(plain):
        text = text.lstrip()[len(plain) :]
    return Parts(None, text, None)


def split_known(text: str) -> Parts:
    """Split a response whose template is not known: at a known tag that it starts with, or that closes a thought."""
    for thinking in KNOWN:
        starts_open = text.lstrip().startswith(thinking.open.strip())
        if starts_open or (thinking.close.strip() in text and thinking.open.strip() not in text):
            parts = split(text, thinking)
            if parts.answer != text:
                return parts
    return Parts(None, text, None)


def thinking_of(template: str, rendered: str) -> Thinking | None:
    """Find the tags that a chat template writes around thoughts.

    Args:
        template: The template's source.
        rendered: A prompt that it wrote, up to where the response starts.

    Returns:
        The known tags that the template names, and whether this prompt opened them; None where it names none, or the
        prompt has closed the thought.
    """
    for thinking in KNOWN:
        tag, close = thinking.open.strip(), thinking.close.strip()
        if tag in template or close in template:
            end = rendered.rstrip()
            return None if end.endswith(close) else replace(thinking, opened=end.endswith(tag))
    return None


def unclosed_cause(finish_reason: str | None, limit: str) -> str:
    """Say why a response has a thought and no answer.

    Args:
        finish_reason: Why the model stopped writing, in OpenAI's words.
        limit: The setting that limits the response, with its value.

    Returns:
        The cause, and the way out where there is one.
    """
    if finish_reason == "length":
        return f"the thought was not closed within {limit}: raise it"
    return f"the thought was not closed: the model stopped inside it (finish reason: {finish_reason})"


def _closed(before: str, inside: str, thinking: Thinking) -> Parts:
    """Split a text that starts inside the thought; `before` was said in front of it."""
    place = _close_in(inside, thinking)
    if place is None:
        return Parts(inside.strip() or None, None, False)
    start, end = place
    return _parts(inside[:start], before + inside[end:], thinking)


def _close_in(text: str, thinking: Thinking) -> tuple[int, int] | None:
    """Find the first closing text, or its first tag alone: what follows the thought may be no plain answer."""
    close = thinking.close.strip()
    first = _FIRST_TAG.match(close)
    for tag in (close, *([first[0]] if first else ())):
        if (start := text.find(tag)) >= 0:
            return start, start + len(tag)
    return None


def _parts(thought: str, answer: str, thinking: Thinking) -> Parts:
    words = thought.strip()
    if answer.lstrip().startswith(thinking.open.strip()):  # a second thought follows at once
        more = split(answer, replace(thinking, opened=False))
        both = "\n\n".join(part for part in (words, more.thought) if part)
        return Parts(both or None, more.answer, more.closed)
    return Parts(words or None, _BLANK_LINES.sub("", answer), True if words else None)
