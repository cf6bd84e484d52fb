"""Conversation -> text segments: what is context, what is learned, and a check that everything said is there.

An assistant turn's place in the text is found by rendering, never by looking for its words: the text of the messages
before it with the generation prompt must be a prefix of the text of the whole conversation, so the turn starts where
that prefix ends, and it ends with the first stop token after its last piece. What the prompt supplies of a thought is
context, so it is never a target.

Conversations of one shape (roles, thoughts, calls) are laid out once, with planted marks. A row whose text is the same
with its own words in place of the marks has the same layout; every other row is laid out by itself.

What a row says never becomes a control token: a row whose text spells a special token of the tokenizer is a bad row, or
its letters are cut apart so that they are tokenized as ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from trainer.config import LeftOut, ThinkingConfig
from trainer.data.conversation import BadRowError, Conversation, Message
from trainer.data.said import TOOLS, Found, Slot, Talk, find_marks, find_said
from trainer.data.templates import SpecialTokens, TrainOn, render
from trainer.data.thoughts import ThoughtForm, common_start, split_thought
from trainer.data.writer import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CUT = "\ufdd0"  # a noncharacter of Unicode: marks where letters that spell a special token are cut apart
_SHAPES = 10_000  # shapes that are remembered
_STRIPPED = "the chat template strips white space around what is said"
_UNCLOSED = "an answer opens a thought and does not close it"
_OTHER = "choose data.template alpaca, phi3 or chatml"


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation's text that is tokenized by itself."""

    text: str
    is_target: bool
    cuts: tuple[int, ...] = ()
    """Positions at which no token reaches over: they keep letters of the row from becoming a special token."""
    in_turn: bool = field(default=False, compare=False)
    """Part of an assistant's turn: it starts no text and follows no stop token."""

    @property
    def pieces(self) -> list[str]:
        """The text between the cuts."""
        edges = [0, *self.cuts, len(self.text)]
        return [self.text[start:end] for start, end in pairwise(edges)]


@dataclass(frozen=True)
class Written:
    """A conversation's segments, and what a person should know of them."""

    segments: list[Segment]
    """The segments joined are the text; the assistant's last turn starts after the last one that is in no turn."""
    notes: frozenset[str]

    @property
    def prompt(self) -> str:
        """What a model is asked with: all before the assistant's last turn."""
        return "".join(segment.text for segment in self.segments[: self._num_prompt_segments])

    @property
    def answer(self) -> str:
        """The assistant's last turn, its thought and its stop token included."""
        return "".join(segment.text for segment in self.segments[self._num_prompt_segments :])

    @property
    def _num_prompt_segments(self) -> int:
        return 1 + max(number for number, segment in enumerate(self.segments) if not segment.in_turn)


@dataclass(frozen=True)
class _Span:
    """Positions of a text that become one segment; what lies between two spans is taken out of the text."""

    start: int
    end: int
    is_target: bool
    in_turn: bool


@dataclass(frozen=True)
class _Shape:
    """The layout of all conversations of one shape."""

    text: str
    """With planted marks."""
    found: Found
    dropped: frozenset[int]
    """Messages whose thought the template leaves out."""
    spans: list[_Span]
    notes: frozenset[str]
    literals: list[str]
    """The text between the marks, where a row's text can be told from its words: where no tool is called or offered."""


@dataclass(frozen=True)
class Renderer:
    """Writes conversations with the template that `set_template` gave the tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    train_on: TrainOn
    special_tokens: SpecialTokens = "refuse"
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    left_out: LeftOut = "refuse"
    _shapes: dict[object, _Shape | BadRowError] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def stop_token(self) -> str:
        """Ends every assistant turn, and is a target there."""
        return str(self.tokenizer.eos_token)

    @cached_property
    def writer(self) -> Writer:
        """The template."""
        return Writer(self.tokenizer)

    @cached_property
    def turn_marks(self) -> tuple[str, ...]:
        """What the template writes between turns, where it does so without a special token.

        Text that spells one reads like another turn, and nothing in the token ids tells them apart.
        """
        words = ("First words", "Second words", "Third words")
        messages = [
            {"role": role, "content": said} for role, said in zip(("user", "assistant", "user"), words, strict=True)
        ]
        try:
            text = render(self.tokenizer, messages, None, True)
        except BadRowError:
            return ()
        marks = (mark.strip() for mark in re.split("|".join(words), text)[1:])
        return tuple(dict.fromkeys(mark for mark in marks if mark and not self.special.search(mark)))

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Any special token of the tokenizer, the longest first."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        known = sorted({*added, *self.tokenizer.all_special_tokens}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, known)))

    def segments(self, conversation: Conversation) -> list[Segment]:
        """The segments of `written`."""
        return self.written(conversation).segments

    def written(self, conversation: Conversation) -> Written:
        """The conversation's text, cut where assistant turns and their thoughts start and end.

        The text ends with the last turn's stop token. `last_assistant` makes one segment of all before the
        last turn.

        Args:
            conversation: ends with an assistant message.

        Returns:
            Segments, and notes of what the template does to the row by design.

        Raises:
            BadRowError: the template refuses the conversation or leaves a part of it out, hides where a turn starts or
                ends, or a message spells a special token where that is refused.
            TrainerError: the template takes too long.
        """
        talk, notes = self._talk(conversation)
        shape = self._shape(talk)
        text = self.writer.text(talk, shape.dropped)
        spans = None
        if shape.literals:
            spans, stripped = _moved(shape, talk, text)
            notes |= {_STRIPPED} if stripped else set()
        if spans is None:
            found = find_said(talk, text, shape.found, shape.text)
            notes |= self._judge(found.left_out, talk, shape.dropped)
            spans, own = _Layout(self, talk, text, found, shape.dropped).spans()
            notes |= own
        return Written([_segment(text[span.start : span.end], span) for span in spans], frozenset(notes | shape.notes))

    def test_fields(self, conversation: Conversation, written: Written) -> dict[str, Any]:
        """What a test row says of its answer and of thoughts, for those who generate and judge.

        Args:
            conversation: the row.
            written: its text.

        Returns:
            `reference`, the answer without its thought, and where they apply `reference_thought`, `thinking` (the
            template's texts around a thought), `template_kwargs` and `tools`.
        """
        talk, _ = self._talk(conversation)
        number = len(talk.messages) - 1
        said = talk.messages[number]["content"].replace(_CUT, "")
        form = self.writer.form(talk.arguments)
        thought = talk.thoughts.get(number, "").replace(_CUT, "")
        # An answer that only calls tools is compared as the template writes it.
        spoken = written.answer.removesuffix(self.stop_token)
        if form and thought and thought.strip() in spoken:
            spoken = spoken.partition(thought.strip())[2].lstrip().removeprefix(form.close.strip()).lstrip()
        fields: dict[str, Any] = {"reference": said if said.strip() else spoken}
        if thought:
            fields["reference_thought"] = thought
        if form and not form.closed:
            opened = bool(form.opened and form.supplied(written.prompt))
            fields["thinking"] = {"open": form.open, "close": form.close, "opened": opened, "plain": form.plain}
        if talk.arguments:
            fields["template_kwargs"] = dict(talk.arguments)
        if conversation.tools:
            fields["tools"] = conversation.tools
        return fields

    def _talk(self, conversation: Conversation) -> tuple[Talk, set[str]]:
        """The conversation with its thoughts apart and its special tokens guarded, and notes on its arguments."""
        given, tools = conversation.template_kwargs or {}, conversation.tools
        read = self.writer.arguments(tools) if given else set()
        notes = {f"the chat template does not read the argument {name!r}" for name in given if name not in read}
        arguments = {name: value for name, value in given.items() if name in read}
        form = self.writer.form(arguments)
        messages: list[Message] = []
        thoughts, verbatim = {}, set()
        for number, message in enumerate(conversation.messages):
            kept, thought = dict(message), None
            if message["role"] == "assistant":
                thought = kept.pop("reasoning_content", None)
                if thought and thought.strip() and "</think>" in message["content"]:
                    kept["content"] = _without_inline(message["content"], thought, f"messages[{number}]")
                elif not thought and "think>" in message["content"]:
                    kept["content"], thought, is_verbatim = self._parted(
                        message["content"], form, f"messages[{number}]"
                    )
                    verbatim |= {number} if is_verbatim else set()
                    notes |= {_UNCLOSED} if kept["content"].lstrip().startswith("<think>") and not thought else set()
            messages.append(_each_text(kept, f"messages[{number}]", self._guarded))
            if thought and thought.strip():
                thoughts[number] = self._guarded(thought, f"messages[{number}].reasoning_content")
        tools = _each_text(tools, "tools", self._guarded)
        names = [message["name"] for message in messages if message.get("name") and message["role"] != "tool"]
        notes |= (
            {"the chat template does not write a message's name"} if names and not self.writer.reads_names else set()
        )
        return Talk(messages, thoughts, frozenset(verbatim), tools, arguments), notes

    def _parted(self, content: str, form: ThoughtForm | None, where: str) -> tuple[str, str | None, bool]:
        """An answer without the thought in it, the thought, and whether the template writes both as they are."""
        may_be_unopened = form is not None and (form.opened or form.splits)
        parted = split_thought(content, may_be_unopened=may_be_unopened)
        if parted is None:
            return content, None, False
        thought, answer = parted
        as_they_are = form is not None and form.key is None and form.written
        if not thought.strip():
            if self.thinking.empty == "fail":
                raise BadRowError(
                    "has an empty thought, which data.thinking.empty: fail refuses: set drop or keep", where
                )
            keep = self.thinking.empty == "keep" and form is not None and not form.splits
            return (content, None, False) if keep else (answer.lstrip("\n"), None, False)
        return (answer, thought, True) if as_they_are else (answer.lstrip("\n"), thought.strip("\n"), False)

    def _shape(self, talk: Talk) -> _Shape:
        """The layout of conversations like this one, made at its first use."""
        key = talk.shape
        if key not in self._shapes:
            if len(self._shapes) >= _SHAPES:
                self._shapes.clear()
            try:
                self._shapes[key] = self._laid_out(talk.planted())
            except BadRowError as error:
                self._shapes[key] = error
        shape = self._shapes[key]
        if isinstance(shape, BadRowError):
            raise BadRowError(shape.reason, shape.field)
        return shape

    def _laid_out(self, talk: Talk) -> _Shape:
        text = self.writer.text(talk, ())
        found = find_marks(talk, text)
        dropped = frozenset(number for number, what in found.left_out if what == "thought")
        if dropped:
            text = self.writer.text(talk, dropped)
            found = find_marks(talk, text)
        notes = self._judge(found.left_out, talk, dropped)
        spans, own = _Layout(self, talk, text, found, dropped).spans()
        marks = [0, *(edge for place in found.places.values() for edge in place), len(text)]
        # Where the row's own white space is around a thought, its text must be cut by itself.
        simple = not talk.tools and not talk.inline and not any(message.get("tool_calls") for message in talk.messages)
        once = all(text.count(str(value)) == 1 for slot, value in talk.slots.items() if slot in found.places)
        literals = [text[start:end] for start, end in zip(marks[::2], marks[1::2], strict=True)]
        return _Shape(text, found, dropped, spans, frozenset(notes | own), literals if simple and once else [])

    def _judge(self, left_out: Iterable[Slot], talk: Talk, dropped: frozenset[int]) -> set[str]:
        """Apply data.left_out; thoughts of earlier turns are left to data.thinking.earlier_turns."""
        notes = set()
        last = len(talk.messages) - 1
        for number, what in left_out:
            if what == "thought" and number != last and number in dropped:
                continue
            if number == TOOLS and not self.writer.reads_tools:
                notes.add("the chat template does not read the tools that rows offer")
                continue
            reason = f"the chat template leaves out {_described(number, what, talk)}"
            if self.left_out == "refuse":
                advice = self._thinking_advice(talk) if what == "thought" else ""
                raise BadRowError(
                    f"{reason}: {advice}choose another data.template, or set data.left_out: warn to train on the rest",
                    "tools" if number == TOOLS else f"messages[{number}]",
                )
            notes.add(reason)
        return notes

    def _thinking_advice(self, talk: Talk, value: str = "true") -> str:
        """What to set so that the generation prompt asks for a thought, or asks for none."""
        known = [name for name in ("enable_thinking", "thinking") if name in self.writer.arguments(talk.tools)]
        return f"set data.template_kwargs: {{{known[0]}: {value}}}, " if known else ""

    def _guarded(self, text: str, where: str) -> str:
        """The text with a mark inside each special token that it spells, or BadRowError."""
        spelled = self.special.search(text)
        if spelled and (self.special_tokens == "refuse" or len(spelled[0]) == 1):
            raise BadRowError(
                f"spells the special token {spelled[0]!r}, which the model would read as a control token; "
                "data.special_tokens: as_text makes it ordinary letters",
                where,
            )
        if self.special_tokens == "as_text" and _CUT in text:
            raise BadRowError("holds U+FDD0, which is no character", where)
        while spelled:  # a mark in one may leave another that overlapped it
            text = self.special.sub(lambda found: found[0][0] + _CUT + found[0][1:], text)
            spelled = self.special.search(text)
        return text


@dataclass
class _Layout:
    """Cuts one text; its methods go through the assistant's turns in order."""

    renderer: Renderer
    talk: Talk
    text: str
    found: Found
    dropped: frozenset[int]
    notes: set[str] = field(default_factory=set)
    _spans: list[_Span] = field(default_factory=list)

    def spans(self) -> tuple[list[_Span], set[str]]:
        """The spans of the text, and notes of what the template does by design."""
        turns = [number for number, message in enumerate(self.talk.messages) if message["role"] == "assistant"]
        last = turns[-1]
        at, after = 0, 0
        for number in turns[-1:] if self.renderer.train_on == "last_assistant" else turns:
            start, supplied, as_generated = self._start(number, at, last)
            if start is None or not self._is_learned(number, last, as_generated):
                continue
            end = self._end(start, number)
            told = self.talk.messages[after:number]
            everything = self.renderer.train_on == "all" and all(
                message["role"] in ("system", "user") and message.get("weight") != 0 for message in told
            )
            own = start - len(supplied) if as_generated and everything else start
            self._add(at, own, is_target=everything)
            self._add(own, start, is_target=False)
            self._turn(number, start, end, supplied, as_generated=as_generated, is_last=number == last)
            self._check_inside(number, start, end)
            at, after = end, number + 1
        return self._spans, self.notes

    def _check_inside(self, number: int, start: int, end: int) -> None:
        """Refuse a turn that holds what another message says, or lacks a part of its own, or thinks after it spoke."""
        _, thought_ends = self.found.places.get((number, "thought"), (0, 0))
        for (message, what), (first, last) in self.found.places.items():
            own = message == number
            inside = start <= first and last <= end
            if (own and (not inside or (what != "thought" and first < thought_ends))) or (
                not own and start < last <= end
            ):
                raise BadRowError(
                    f"the chat template mixes message {message} with the assistant's turn in message {number}, so what "
                    f"is to be learned is not known: {self._last_alone(number)}{_OTHER}",
                    f"messages[{message}]",
                )

    def _last_alone(self, number: int) -> str:
        """Advice that helps with a turn before the last."""
        return "" if number == len(self.talk.messages) - 1 else "set data.train_on: last_assistant, or "

    def _add(self, start: int, end: int, *, is_target: bool, in_turn: bool = False) -> None:
        if start < end or not self._spans:
            self._spans.append(_Span(start, end, is_target, in_turn))

    @property
    def _form(self) -> ThoughtForm | None:
        return self.renderer.writer.form(self.talk.arguments)

    def _start(self, number: int, at: int, last: int) -> tuple[int | None, str, bool]:
        """Where the words of a turn start, what the prompt supplies of a thought, and whether it is in the text."""
        prompt = self.renderer.writer.prompt(self.talk, number, self.dropped)
        supplied = self._form.supplied(prompt) if self._form else ""
        if self.text.startswith(prompt) and len(prompt) >= at:
            return len(prompt), supplied, True
        header = prompt.removesuffix(supplied)
        if number != last and self.text.startswith(header) and len(header) >= at:
            return len(header), supplied, False
        if number == last and number in self.talk.thoughts and supplied and self._form and self._form.closed:
            raise self._closed(number)
        if number != last and self.renderer.thinking.earlier_turns == "mask":
            return None, supplied, False
        raise BadRowError(
            f"the chat template writes the text before message {number} differently in training than in the generation "
            f"prompt, so where the answer starts is not known exactly: {self._last_alone(number)}{_OTHER}",
            f"messages[{number}]",
        )

    def _is_learned(self, number: int, last: int, as_generated: bool) -> bool:
        """Apply data.thinking.earlier_turns to a turn that is not written as it is generated."""
        if number == last or (as_generated and number not in self.dropped):
            return True
        if self.talk.messages[number].get("weight") == 0:
            return True
        what = "drops the thought of an earlier turn"
        if number not in self.dropped:
            what = "writes an earlier turn otherwise than it is generated"
        policy = self.renderer.thinking.earlier_turns
        if policy == "refuse":
            raise BadRowError(
                f"the chat template {what}: set "
                "data.thinking.earlier_turns: mask or as_template, or data.train_on: last_assistant",
                f"messages[{number}]",
            )
        how = "it is not learned" if policy == "mask" else "it is learned as the template writes it"
        self.notes.add(f"the chat template {what}: {how}")
        return policy == "as_template"

    def _end(self, start: int, number: int) -> int:
        """Where the stop token ends that ends a turn."""
        said = max(start, self.found.end_of(number))
        ends = self.renderer.writer.ends
        places = [(at, stop) for stop in ends.all if (at := self.text.find(stop, said)) >= 0]
        if not places:
            raise BadRowError(
                f"the chat template writes no stop token {ends.stop!r} after message {number}, so the model could "
                f"never learn to stop there: {self._last_alone(number)}{_OTHER}",
                f"messages[{number}]",
            )
        at, stop = min(places)
        return at + len(stop)

    def _turn(self, number: int, start: int, end: int, supplied: str, *, as_generated: bool, is_last: bool) -> None:
        """Add the spans of a turn: its thought, its answer, its stop token."""
        learned = self.talk.messages[number].get("weight") != 0
        thinking, form = self.renderer.thinking, self._form
        answer = start
        if form and (number, "thought") in self.found.places:
            if form.closed:
                raise self._closed(number)
            answer = self._thought_end(number, end, form)
            self._add(start, answer, is_target=learned and thinking.train, in_turn=True)
        elif form:
            supplied = supplied if as_generated else ""
            block = form.empty_block(self.text[start:end], supplied, as_generated=as_generated)
            open_still = form.opened and bool(supplied)
            if as_generated and (block or open_still):
                self._check_empty(number, open_still=open_still, closes=bool(block))
            answer = start + block
            if thinking.empty == "keep" or not is_last:
                kept = learned and as_generated and thinking.train and thinking.empty == "keep"
                self._add(start, answer, is_target=kept, in_turn=True)
        ends = self.renderer.writer.ends
        stop = next(stop for stop in ends.all if self.text.endswith(stop, start, end))
        if stop in ends.learned:
            self._add(answer, end, is_target=learned, in_turn=True)
        else:  # generation continues after it, so it must not be learned as the end
            self._add(answer, end - len(stop), is_target=learned, in_turn=True)
            self._add(end - len(stop), end, is_target=False, in_turn=True)
            self.notes.add(f"the chat template ends an earlier turn with {stop!r}, which is not learned")

    def _thought_end(self, number: int, end: int, form: ThoughtForm) -> int:
        """Where a thought ends, its closing tag and the white space of that included."""
        _, at = self.found.places[number, "thought"]
        close = self.text.find(form.close.strip(), at, end)
        if close < 0:  # what follows a thought before a call may be other than before an answer
            return at + common_start(form.close, self.text[at:end])
        after = close + len(form.close.strip())
        return after + form.space_after(self.text[after:end])

    def _check_empty(self, number: int, *, open_still: bool, closes: bool) -> None:
        """Apply data.thinking.empty to a turn with an empty thought, or with none where the prompt opens one."""
        policy = self.renderer.thinking.empty
        if policy == "keep" and closes:
            return
        if policy == "drop" and not open_still:
            return
        if open_still:
            ask = self.renderer._thinking_advice(self.talk, "false")
            raise BadRowError(
                "the generation prompt opens a thought, and the row has none: give it in reasoning_content, "
                f"{ask}set data.thinking.empty: keep so that the model learns to close it at once, or {_OTHER}",
                f"messages[{number}]",
            )
        raise BadRowError(
            "the chat template writes an empty thought, which data.thinking.empty: fail refuses: give the thought in "
            "reasoning_content, or set drop or keep",
            f"messages[{number}]",
        )

    def _closed(self, number: int) -> BadRowError:
        ask = self.renderer._thinking_advice(self.talk)
        return BadRowError(
            f"the row has a thought, and the generation prompt says that none follows: {ask}leave the thought out, or "
            f"{_OTHER}",
            f"messages[{number}]",
        )


def _moved(shape: _Shape, talk: Talk, text: str) -> tuple[list[_Span] | None, bool]:
    """The shape's spans for a text that differs from the planted one only in what is said, stripped or not."""
    slots = talk.slots
    said = [slots[slot] for slot in shape.found.places]
    for words in (said, [word.strip() for word in said]):
        if len(text) != sum(map(len, shape.literals)) + sum(map(len, words)):
            continue
        parts = [shape.literals[0]]
        for word, literal in zip(words, shape.literals[1:], strict=True):
            parts += word, literal
        if "".join(parts) != text:
            continue
        return _shifted(shape, words), words != said
    return None, False


def _shifted(shape: _Shape, words: list[str]) -> list[_Span]:
    """The shape's spans, each edge moved by what the words before it are longer than their marks."""
    places = list(shape.found.places.values())
    moved: list[_Span] = []
    shift = at = 0

    def edge(position: int) -> int:
        nonlocal shift, at
        while at < len(places) and places[at][1] <= position:
            shift += len(words[at]) - (places[at][1] - places[at][0])
            at += 1
        return position + shift

    for span in shape.spans:
        moved.append(_Span(edge(span.start), edge(span.end), span.is_target, span.in_turn))
    return moved


def _without_inline(content: str, thought: str, where: str) -> str:
    """The answer of a message that has a thought of its own, without the same thought in its content."""
    parted = split_thought(content, may_be_unopened=False)
    if parted is None:
        return content
    if parted[0].strip() not in ("", thought.strip()):
        raise BadRowError("has one thought of its own and another in <think> tags in its content: take one out", where)
    return parted[1].lstrip("\n")


def _described(number: int, what: str, talk: Talk) -> str:
    """What a template leaves out, for people."""
    if number == TOOLS:
        return "the tools"
    role = talk.messages[number]["role"]
    if what == "content":
        return f"what the {role} says"
    if what == "thought":
        return f"the {role}'s thought"
    part, _, at = what.partition(" ")
    return f"what the {role} says: the {part} of tool call {int(at) + 1}"


def _segment(text: str, span: _Span) -> Segment:
    """A segment of text in which marks say where it is to be cut."""
    *before, last = text.split(_CUT)
    cuts, at = [], 0
    for piece in before:
        at += len(piece)
        cuts.append(at)
    return Segment("".join([*before, last]), span.is_target, tuple(cuts), span.in_turn)


def _each_text(value: Any, field: str, change: Callable[[str, str], str]) -> Any:  # noqa: ANN401 - JSON is anything
    """The same JSON value, each text in it changed; the function gets the text and its field."""
    if isinstance(value, str):
        return change(value, field)
    if isinstance(value, list):
        return [_each_text(item, f"{field}[{number}]", change) for number, item in enumerate(value)]
    if isinstance(value, dict):
        return {change(key, field): _each_text(item, f"{field}.{key}", change) for key, item in value.items()}
    return value
