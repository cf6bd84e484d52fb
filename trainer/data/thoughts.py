"""How a chat template writes an assistant's thoughts, found by rendering a planted one.

Templates read a thought from keys of different names, want it inside the content, or cut it off. What they write around
it, and what the generation prompt supplies of that, is found here once for each template and its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from trainer.data.conversation import BadRowError, Message

_THOUGHT, _ANSWER = "Zthoughtz", "Zanswerz"
_KEYS = ("reasoning_content", "thinking", "reasoning")
_OPEN, _CLOSE = "<think>", "</think>"
_OPENED = re.compile(r"(<(?P<angle>[\w:|]+)>|\[(?P<square>[A-Z]+)\])\s*\Z")
"""A tag that a generation prompt may end with."""
_CLOSED = re.compile(r"(</(?P<angle>[\w:|]+)>|\[/(?P<square>[A-Z]+)\])\s*\Z")
_INLINE = re.compile(r"\s*<think>(.*?)</think>(.*)\Z", re.DOTALL)
_UNOPENED = re.compile(r"(.*?)</think>(.*)\Z", re.DOTALL)

Render = Callable[[list[Message], bool], str]
"""Messages, and whether the generation prompt is added -> text."""


@dataclass(frozen=True)
class ThoughtForm:
    """What a chat template writes around a thought."""

    key: str | None
    """The message's key that the template reads; None where a thought is written into the content."""
    open: str
    """Written before a thought, with its white space."""
    close: str
    """Written between a thought and the answer, with its white space."""
    plain: str
    """Written between the generation prompt and an answer without a thought, mostly nothing."""
    opened: bool
    """The generation prompt ends inside an opened thought."""
    closed: bool
    """The generation prompt says that no thought follows: it writes an empty one, or closes it."""
    written: bool = True
    """The template writes the thought of the last turn; else it cuts it off."""
    splits: bool = False
    """The template itself takes what is before a closing tag in the content for a thought."""

    def supplied(self, prompt: str) -> str:
        """The end of a generation prompt that supplies a part of a thought, or nothing."""
        found = self._supplied_end.search(prompt)
        return found[0] if found else ""

    @property
    def _supplied_end(self) -> re.Pattern[str]:
        start, end = re.escape(self.open.strip()), re.escape(self.close.strip())
        lead = re.escape(self.open[: len(self.open) - len(self.open.lstrip())])
        return re.compile(rf"({lead})?({start}\s*({end}\s*)?|{end}\s*)\Z")

    def empty_block(self, text: str, supplied: str, *, as_generated: bool = True) -> int:
        """Characters of the empty thought that an assistant's turn starts with, or 0.

        Args:
            text: of the turn, after what the generation prompt supplied.
            supplied: the part of a thought that the prompt ends with.
            as_generated: False for an earlier turn, which some templates start with the closing tag alone.
        """
        is_open = bool(supplied) and not supplied.rstrip().endswith(self.close.strip())
        start = "" if is_open else re.escape(self.open.strip())
        if not as_generated:
            start = f"({start})?"
        found = re.match(rf"\s*{start}\s*{re.escape(self.close.strip())}", text)
        return found.end() + self.space_after(text[found.end() :]) if found else 0

    def space_after(self, text: str) -> int:
        """Characters of white space that belong to the closing tag before a text."""
        tail = self.close[len(self.close.rstrip()) :]
        return common_start(tail, text)


def common_start(one: str, other: str) -> int:
    """The number of characters that two texts start with alike."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def split_thought(content: str, *, may_be_unopened: bool) -> tuple[str, str] | None:
    """The thought that an answer carries in <think> tags at its start, and what follows it, both as they are.

    Args:
        content: of an assistant's message.
        may_be_unopened: the opening tag may be missing, as in answers to prompts that end with it.
    """
    if _CLOSE not in content:
        return None
    found = _INLINE.match(content) or (_UNOPENED.match(content) if may_be_unopened else None)
    return (found[1], found[2]) if found else None


def inline(thought: str, answer: str, form: ThoughtForm | None) -> str:
    """A content that carries its thought: in the template's form, or where there is none in the row's own."""
    return f"{form.open}{thought}{form.close}{answer}" if form else f"{_OPEN}{thought}{_CLOSE}{answer}"


def find_form(render: Render) -> ThoughtForm | None:
    """Find out how a template writes thoughts.

    Args:
        render: the template with its arguments.

    Returns:
        The form, or None where the template can write no thought.
    """
    user: Message = {"role": "user", "content": "Zquestionz"}
    try:
        prompt = render([user], True)
        bare = render([user, {"role": "assistant", "content": _ANSWER}], False)
    except BadRowError:
        return None
    splits = _splits(render, user)
    for key in (*_KEYS, None):
        said = (
            {key: _THOUGHT, "content": _ANSWER}
            if key
            else {"content": inline(f"\n{_THOUGHT}\n", f"\n\n{_ANSWER}", None)}
        )
        try:
            text = render([user, {"role": "assistant", **said}], False)
        except BadRowError:
            continue
        at = text.find(_THOUGHT)
        if 0 <= at < text.find(_ANSWER, at):
            return replace(_form_of(key, prompt, text, bare), splits=splits)
    form = _form_of_prompt(prompt)
    return form and replace(form, splits=splits)


def _splits(render: Render, user: Message) -> bool:
    """Whether the template cuts a content at a closing tag."""
    content = f"{_THOUGHT}{_CLOSE}{_ANSWER}"
    try:
        return content not in render([user, {"role": "assistant", "content": content}], False)
    except BadRowError:
        return False


def _form_of(key: str | None, prompt: str, text: str, bare: str) -> ThoughtForm:
    """The form that a rendered thought shows."""
    at = text.index(_THOUGHT)
    base = common_start(prompt, text[:at])
    lead = text[base:at]
    close = text[at + len(_THOUGHT) : text.index(_ANSWER, at)]
    if not lead.strip() and (tag := _OPENED.search(prompt[:base])):
        lead = prompt[tag.start() : base] + lead
    elif not key and lead.strip().startswith(_OPEN):
        lead = lead[lead.index(_OPEN) :]
    ends_open = bool(lead.strip()) and prompt.rstrip().endswith(lead.strip())
    closes = bool(close.strip()) and (prompt.rstrip().endswith(close.strip()) or bool(_CLOSED.search(prompt)))
    form = ThoughtForm(key, lead, close, "", ends_open, closes)
    plain = bare[len(prompt) : bare.find(_ANSWER)] if bare.startswith(prompt) else ""
    return replace(form, plain=plain[form.empty_block(plain, form.supplied(prompt)) :])


def _form_of_prompt(prompt: str) -> ThoughtForm | None:
    """The form of a template that cuts thoughts off, from what its generation prompt ends with."""
    if tag := _OPENED.search(prompt):
        name = f"</{tag['angle']}>" if tag["angle"] else f"[/{tag['square']}]"
        space = "\n" if tag[0].endswith("\n") else ""
        return ThoughtForm(None, tag[0], f"{space}{name}{space * 2}", "", True, False, written=False)
    if tag := _CLOSED.search(prompt):
        return ThoughtForm(None, tag[0].replace("/", "", 1), tag[0], "", False, True, written=False)
    return None
