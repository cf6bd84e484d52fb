"""Conversation -> text segments, and the chat template that is saved beside the model.

Every template is a Jinja chat template, the built-in ones too: what is trained on and what any chat API makes of the
exported tokenizer come from one text. Only the sandboxed engine of transformers renders it.

An assistant turn's place in the text is found by rendering, never by looking for its words: the text of the messages
before it with the generation prompt must be a prefix of the text of the whole conversation, so the turn starts where
that prefix ends, and it ends with the first stop token after that.

What a row says never becomes a control token: a row whose text spells a special token of the tokenizer is a bad row, or
its letters are cut apart so that they are tokenized as ordinary text.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from trainer.data.conversation import BadRowError, Conversation, Message
from trainer.errors import TrainerError

if TYPE_CHECKING:  # rows are read and checked before transformers is loaded
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["alpaca", "phi3", "chatml", "chat"]
TrainOn = Literal["assistant", "last_assistant", "all"]
SpecialTokens = Literal["refuse", "as_text"]

_RENDER_SECONDS = 10.0  # CPU time of one conversation; ten megabytes of text take well under a second
_FREE_CHARACTERS = 1_000_000  # a template may write so many, and
_CHARACTERS_A_CHARACTER = 20  # so many more for each character of the conversation
_CUT = "\ufdd0"  # a noncharacter of Unicode: marks where letters that spell a special token are cut apart

# What an assistant says: its thoughts, its words and its tool calls; and how tools are offered to it.
_MACROS = """\
{%- macro words(message) -%}
{%- if message['reasoning_content'] %}{{ '<think>\n' + message['reasoning_content'] + '\n</think>\n\n' }}{% endif %}
{{- message['content'] }}
{%- for call in message['tool_calls'] or [] -%}
{{ '\n' if message['content'] or not loop.first else '' }}
{{- '<tool_call>\n' + call['function'] | tojson + '\n</tool_call>' }}
{%- endfor %}
{%- endmacro -%}
{%- macro offer(tools) -%}
{{ 'You may call tools. To call one, write <tool_call>, a JSON object with its name and arguments, and </tool_call>.' }}
{%- for tool in tools %}{{ '\n' + tool['function'] | tojson }}{% endfor %}
{%- endmacro -%}
"""

_ALPACA = (
    _MACROS
    + """\
{%- for message in messages -%}
{%- if loop.first -%}
{%- if message['role'] == 'system' %}{{ message['content'] }}
{%- else %}{{ 'Below is an instruction that describes a task. ' }}
{{- 'Write a response that appropriately completes the request.' }}
{%- endif %}
{{- '\n\n' }}
{%- if tools %}{{ offer(tools) + '\n\n' }}{% endif %}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}
{%- elif message['role'] == 'tool' %}{{ '### Tool output:\n' + message['content'] + '\n\n' }}
{%- elif message['role'] == 'assistant' %}{{ '### Response:\n' + words(message) + eos_token + '\n\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""
)

_MARKED = (
    _MACROS
    + """\
{%- for message in messages -%}
{%- if loop.first and tools and message['role'] != 'system' -%}
{{ START + 'system' + MIDDLE + offer(tools) + END }}
{%- endif %}
{{- START + message['role'] + MIDDLE }}
{%- if message['role'] == 'assistant' %}{{ words(message) + eos_token + '\n' }}
{%- else %}{{ message['content'] }}
{%- if loop.first and tools and message['role'] == 'system' %}{{ '\n\n' + offer(tools) }}{% endif %}
{{- END }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ START + 'assistant' + MIDDLE }}{% endif %}"""
)


def _marked(start: str, middle: str, end: str) -> str:
    """A template that marks each message with the same three texts."""
    names = f"{{%- set START, MIDDLE, END = {start!r}, {middle!r}, {end!r} -%}}\n"
    return names + _MARKED


@dataclass(frozen=True)
class BuiltIn:
    """A template that comes with the product."""

    jinja: str
    stop_token: str | None
    """Ends a turn where the tokenizer knows it as one special token; else its own eos_token does."""
    special_tokens: tuple[str, ...]
    """What a tokenizer made for this template keeps whole, the stop token first."""
    input_separator: str
    """Stands between an Alpaca row's instruction and its input."""


def built_in(name: TemplateName) -> BuiltIn | None:
    """The built-in template of this name; None for `chat`, which is the tokenizer's own."""
    match name:
        case "alpaca":
            return BuiltIn(_ALPACA, None, ("<|endoftext|>",), "\n\n### Input:\n")
        case "phi3":
            tokens = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
            return BuiltIn(_marked("<|", "|>\n", "<|end|>\n"), "<|end|>", tokens, "\n\n")
        case "chatml":
            return BuiltIn(
                _marked("<|im_start|>", "\n", "<|im_end|>\n"), "<|im_end|>", ("<|im_end|>", "<|im_start|>"), "\n\n"
            )
        case "chat":
            return None


def input_separator(name: TemplateName) -> str:
    """What stands between an Alpaca row's instruction and its input under this template."""
    template = built_in(name)
    return template.input_separator if template else "\n\n"


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation's text that is tokenized by itself."""

    text: str
    is_target: bool
    cuts: tuple[int, ...] = ()
    """Positions at which no token reaches over: they keep letters of the row from becoming a special token."""

    @property
    def pieces(self) -> list[str]:
        """The text between the cuts."""
        edges = [0, *self.cuts, len(self.text)]
        return [self.text[start:end] for start, end in pairwise(edges)]


def set_template(tokenizer: PreTrainedTokenizerBase, name: TemplateName) -> None:
    """Give a tokenizer the template, and the template's stop token as its eos_token.

    A begin token that the tokenizer puts before text by itself is written into a built-in template.

    Args:
        tokenizer: changed in place.
        name: of the template.

    Raises:
        TrainerError: `chat` with a tokenizer that has no template, or no stop token can be found.
    """
    template = built_in(name)
    if template is None:
        if not tokenizer.chat_template:
            raise TrainerError(
                "data.template is chat, but the tokenizer has no chat template: choose alpaca, phi3 or chatml, or tune "
                "an instruct model"
            )
        tokenizer.eos_token = _stop_token(tokenizer)
        return
    if template.stop_token in tokenizer.get_added_vocab():
        tokenizer.eos_token = template.stop_token
    if tokenizer.eos_token is None:
        raise TrainerError(
            "the tokenizer has no eos_token, so the model could never learn to stop: choose another base"
        )
    begins = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + template.jinja


def _stop_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The first special token that the tokenizer's own template writes after an assistant's words."""
    words = "Fine words"
    messages: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": words}]
    try:
        text = _render(tokenizer, messages, None, False)
    except BadRowError as error:
        raise TrainerError(
            f"data.template is chat, but the tokenizer's own template can't be used ({error.reason}): choose "
            "alpaca, phi3 or chatml, or correct it in the tokenizer's files"
        ) from error
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    ids = tokenizer(text.rpartition(words)[2], add_special_tokens=False).input_ids
    stops = [token for token in ids if token in special]
    if not stops:
        raise TrainerError(
            "the tokenizer's chat template ends an assistant turn without a special token, so the model could never "
            "learn to stop: choose data.template alpaca, phi3 or chatml"
        )
    return str(tokenizer.convert_ids_to_tokens(stops[0]))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None, ask: bool) -> str:
    try:
        with _limited_time():
            text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise BadRowError(f"the chat template refuses the conversation: {error}", "messages") from error
    text = str(text)
    if len(text) > _FREE_CHARACTERS:
        given = len(str(messages)) + len(str(tools))
        if len(text) > _FREE_CHARACTERS + _CHARACTERS_A_CHARACTER * given:
            raise TrainerError(
                f"the chat template makes {len(text):,} characters of a conversation of {given:,}: {_OTHER_TEMPLATE}"
            )
    return text


_OTHER_TEMPLATE = "it is broken or means harm; mend it, or choose data.template alpaca, phi3 or chatml"


@contextmanager
def _limited_time() -> Iterator[None]:
    """Raise TrainerError in what takes too much CPU time; a template is code, and the sandbox lets it loop.

    Only the main thread of a process can be interrupted, which is where rows are rendered.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise TrainerError(
            f"the chat template takes more than {_RENDER_SECONDS:g} s of CPU time for one conversation: "
            f"{_OTHER_TEMPLATE}"
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _each_text(value: Any, field: str, change: Callable[[str, str], str]) -> Any:  # noqa: ANN401 - JSON is anything
    """The same JSON value, each text in it changed; the function gets the text and its field."""
    if isinstance(value, str):
        return change(value, field)
    if isinstance(value, list):
        return [_each_text(item, f"{field}[{number}]", change) for number, item in enumerate(value)]
    if isinstance(value, dict):
        return {change(key, field): _each_text(item, f"{field}.{key}", change) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class Renderer:
    """Writes conversations with the template that `set_template` gave the tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    train_on: TrainOn
    special_tokens: SpecialTokens = "refuse"

    @cached_property
    def stop_token(self) -> str:
        """Ends every assistant turn, and is a target there."""
        return str(self.tokenizer.eos_token)

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
            text = _render(self.tokenizer, messages, None, True)
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
        """The conversation's text, cut where assistant turns start and end.

        Context and assistant turns alternate, starting with context; the text ends with the last turn's stop token.
        `assistant` and `all` cut at the same places, so their token ids are the same. `last_assistant` makes one
        segment of all that stands before the last turn.

        Args:
            conversation: ends with an assistant message.

        Returns:
            Segments whose texts joined are the whole text; the one before the last is what a model is asked with.

        Raises:
            BadRowError: the template refuses the conversation or leaves a message out, or one spells a special token
                where that is refused.
            TrainerError: the template hides where a turn starts or ends, or takes too long.
        """
        messages: list[Message] = _each_text(conversation.messages, "messages", self._guarded)
        tools = _each_text(conversation.tools, "tools", self._guarded)
        text = _render(self.tokenizer, messages, tools, False)
        _check_messages(messages, tools, text)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "last_assistant":
            turns = turns[-1:]
        segments: list[Segment] = []
        at, after = 0, 0
        for number in turns:
            start = self._start(text, _render(self.tokenizer, messages[:number], tools, True), at, number)
            end = self._end(text, start, number)
            told = messages[after:number]
            context = self.train_on == "all" and all(message["role"] != "tool" for message in told)
            segments += [
                _segment(text[at:start], context),
                _segment(text[start:end], messages[number].get("weight") != 0),
            ]
            at, after = end, number + 1
        return segments

    def _guarded(self, text: str, field: str) -> str:
        """The text with a mark inside each special token that it spells, or BadRowError."""
        spelled = self.special.search(text)
        if spelled and (self.special_tokens == "refuse" or len(spelled[0]) == 1):
            raise BadRowError(
                f"spells the special token {spelled[0]!r}, which the model would read as a control token; "
                "data.special_tokens: as_text makes it ordinary letters",
                field,
            )
        if self.special_tokens == "as_text" and _CUT in text:
            raise BadRowError("holds U+FDD0, which is no character", field)
        while spelled:  # a mark in one may leave another that overlapped it
            text = self.special.sub(lambda found: found[0][0] + _CUT + found[0][1:], text)
            spelled = self.special.search(text)
        return text

    def _start(self, text: str, prompt: str, at: int, number: int) -> int:
        """Where the assistant's words of message `number` start."""
        if not text.startswith(prompt) or len(prompt) < at:
            raise TrainerError(
                f"the chat template writes what stands before message {number} otherwise in training than when it asks "
                "for that message, so where the answer starts cannot be told exactly: set data.train_on: "
                "last_assistant, or choose data.template alpaca, phi3 or chatml"
            )
        return len(prompt)

    def _end(self, text: str, start: int, number: int) -> int:
        """Where the stop token ends that ends the assistant's turn."""
        stop = text.find(self.stop_token, start)
        if stop < 0:
            raise TrainerError(
                f"the chat template writes no stop token {self.stop_token!r} after message {number}, so the model "
                "could never learn to stop there: set data.train_on: last_assistant, or choose data.template alpaca, "
                "phi3 or chatml"
            )
        return stop + len(self.stop_token)


def _segment(text: str, is_target: bool) -> Segment:
    """A segment of text in which marks say where it is to be cut."""
    *before, last = text.split(_CUT)
    cuts, at = [], 0
    for piece in before:
        at += len(piece)
        cuts.append(at)
    return Segment("".join([*before, last]), is_target, tuple(cuts))


def _check_messages(messages: list[Message], tools: list[Any] | None, text: str) -> None:
    """Refuse a conversation of which the template leaves something out."""
    for number, message in enumerate(messages):
        # A template may leave out the thoughts of earlier turns, and trims what it writes.
        said = message["content"].rpartition("</think>")[2].strip()
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if message["role"] != "tool" and not all(part in text for part in (said, *calls)):
            raise BadRowError(f"the chat template leaves out what the {message['role']} says", f"messages[{number}]")
    if tools and not all(str(tool["function"].get("name", "")) in text for tool in tools):
        raise BadRowError("the chat template leaves the tools out", "tools")
