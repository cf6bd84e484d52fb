"""A tokenizer's chat template as a writer of conversations: what it wants to be given, and how it ends turns.

Templates differ in what they read: a call's arguments as an object or as text, an empty content as text or as null, a
thought under one key or another. What a template wants is found by rendering planted conversations.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from trainer.data.conversation import BadRowError, Message
from trainer.data.said import Talk, planted_arguments
from trainer.data.templates import arguments_read, render, special_tokens_in
from trainer.data.thoughts import ThoughtForm, find_form, inline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER: Message = {"role": "user", "content": "Zquestionz"}
_ANSWER: Message = {"role": "assistant", "content": "Zanswerz"}
_NAME, _ARGUMENTS, _RESULT = "Znamez", planted_arguments(0, 0), "Zresultz"
_CALL_ID = "abcdefgh1"  # some templates take letters and digits alone, nine of them


@dataclass(frozen=True)
class CallStyle:
    """How a template wants tool calls."""

    arguments_as_text: bool = False
    """As JSON text, not as an object."""
    no_content_as_null: bool = False
    """A message that only calls tools has no content, instead of an empty one."""


@dataclass(frozen=True)
class TurnEnds:
    """The special tokens that end an assistant's turn."""

    stop: str
    """Ends the last turn; the tokenizer's eos_token."""
    history: str
    """Ends an earlier turn."""
    call: str
    """Ends a turn that calls tools."""
    written: bool
    """Whether the template writes the stop token after the last turn; else the next turn's first token is it."""

    @property
    def all(self) -> frozenset[str]:
        """Any of them."""
        return frozenset((self.stop, self.history, self.call))

    @property
    def learned(self) -> frozenset[str]:
        """Those at which generation ends."""
        return frozenset((self.stop, self.call))


@dataclass(frozen=True)
class Writer:
    """Writes conversations with the template that `set_template` gave the tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    _forms: dict[str, ThoughtForm | None] = field(default_factory=dict, compare=False, repr=False)

    def text(self, talk: Talk, dropped: Collection[int]) -> str:
        """The text of a whole conversation.

        Where the generation prompt opens a thought and the template cuts the last turn's thought off, the thought and
        its closing tag are put where generation would have them.

        Args:
            talk: ends with an assistant message.
            dropped: messages whose thought the template leaves out; it is not given to it.

        Returns:
            The text, which ends with the last turn's stop token or white space after it.

        Raises:
            BadRowError: the template refuses the conversation.
        """
        last = len(talk.messages) - 1
        text = self._render(talk, len(talk.messages), dropped, False)
        if not self.ends.written:
            text += self.ends.call if talk.messages[last].get("tool_calls") else self.ends.stop
        form = self.form(talk.arguments)
        if form is None or not form.opened:
            return text
        prompt = self.prompt(talk, last, dropped)
        supplied = form.supplied(prompt)
        header = prompt.removesuffix(supplied)
        if text.startswith(prompt) or not supplied or not text.startswith(header):
            return text
        rest = text[len(header) :]
        close = "" if rest.lstrip().startswith(form.close.strip()) else form.close
        return prompt + talk.thoughts.get(last, "") + close + rest

    def prompt(self, talk: Talk, number: int, dropped: Collection[int]) -> str:
        """What a model is asked with for message `number`."""
        return self._render(talk, number, dropped, True)

    def form(self, arguments: Mapping[str, Any]) -> ThoughtForm | None:
        """How thoughts are written under these arguments."""
        key = json.dumps(arguments, sort_keys=True) if arguments else ""
        if key not in self._forms:
            self._forms[key] = find_form(partial(self._plain, arguments=arguments))
        return self._forms[key]

    def arguments(self, tools: object) -> set[str]:
        """The arguments that the template reads; rows with tools may have a template of their own."""
        return self._arguments["tool_use" if tools and "tool_use" in self._arguments else "default"]

    @cached_property
    def reads_tools(self) -> bool:
        """Whether the template for rows with tools can write what the tools are."""
        named = self._templates
        return "tools" in arguments_read(named.get("tool_use", named["default"]))

    @cached_property
    def reads_names(self) -> bool:
        """Whether the template writes the name of a user."""
        try:
            return "Znamedz" in self._plain([_USER | {"name": "Znamedz"}, _ANSWER], False)
        except BadRowError:
            return False

    @property
    def _templates(self) -> dict[str, str]:
        templates: str | dict[str, str] = self.tokenizer.chat_template
        return {"default": templates} if isinstance(templates, str) else templates

    @cached_property
    def _arguments(self) -> dict[str, set[str]]:
        own = inspect.signature(self.tokenizer.apply_chat_template).parameters
        return {name: arguments_read(text) - {"messages", *own} for name, text in self._templates.items()}

    @cached_property
    def style(self) -> CallStyle:
        """The first style in which a planted call appears whole, and not as Python writes it."""
        styles = [CallStyle(text, null) for text in (False, True) for null in (False, True)]
        for style in styles:
            try:
                text = self._plain([_USER, self._call(style), _tool(), _ANSWER], False)
            except BadRowError:
                continue
            marks = [_NAME, *_ARGUMENTS, *_ARGUMENTS.values()]
            if all(mark in text for mark in marks) and repr(_ARGUMENTS) not in text:
                return style
        return styles[0]

    @cached_property
    def ends(self) -> TurnEnds:
        """How turns end, seen after planted words."""
        stop, question = str(self.tokenizer.eos_token), str(_USER["content"])
        answer, argument = str(_ANSWER["content"]), next(iter(_ARGUMENTS.values()))
        last = self._after([_USER, _ANSWER], answer, "")
        history = self._after([_USER, _ANSWER, _USER, _ANSWER], answer, question)
        called = [_USER, self._call(self.style), _tool(), _ANSWER]
        # A call may be quoted by special tokens, so the last one ends it; where none does, the tool's turn starts.
        call = self._after(called[:2], argument, "")[-1:] or self._after(called, argument, _RESULT)
        return TurnEnds(
            stop,
            history=stop if stop in history or not history else history[0],
            call=stop if stop in call or not call else call[0],
            written=stop in last,
        )

    def _after(self, messages: list[Message], said: str, following: str) -> list[str]:
        """The special tokens between two texts of a planted conversation; the second may be its end."""
        try:
            after = self._plain(messages, False).partition(said)[2]
        except BadRowError:
            return []
        between = after.partition(following)[0] if following else after
        return special_tokens_in(self.tokenizer, between, only_special=True)

    def _plain(self, messages: list[Message], ask: bool, arguments: Mapping[str, Any] | None = None) -> str:
        return render(self.tokenizer, messages, None, ask, arguments)

    def _render(self, talk: Talk, end: int, dropped: Collection[int], ask: bool) -> str:
        form = self.form(talk.arguments) if talk.thoughts else None
        messages = [
            self._given(message, None if number in dropped else talk.thoughts.get(number), form, number in talk.inline)
            for number, message in enumerate(talk.messages[:end])
        ]
        return render(self.tokenizer, messages, talk.tools, ask, talk.arguments)

    def _given(self, message: Message, thought: str | None, form: ThoughtForm | None, verbatim: bool) -> Message:
        """A message as the template wants it."""
        calls = message.get("tool_calls")
        if form is None or not form.written:
            thought = None
        if thought is None and not calls:
            return message
        given = dict(message)
        if calls:
            given["tool_calls"] = [self._given_call(call) for call in calls]
        if thought is not None and form and form.key:
            given[form.key] = thought
        elif thought is not None:
            given["content"] = inline(thought, given["content"], None if verbatim else form)
        if calls and not given["content"] and self.style.no_content_as_null:
            given["content"] = None
        return given

    def _given_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        if not self.style.arguments_as_text:
            return call
        return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    @staticmethod
    def _call(style: CallStyle) -> Message:
        arguments = json.dumps(_ARGUMENTS) if style.arguments_as_text else _ARGUMENTS
        call = {"id": _CALL_ID, "type": "function", "function": {"name": _NAME, "arguments": arguments}}
        return {"role": "assistant", "content": None if style.no_content_as_null else "", "tool_calls": [call]}


def _tool() -> Message:
    return {"role": "tool", "content": _RESULT, "name": _NAME, "tool_call_id": _CALL_ID}
