"""What one row of instructions says, whatever form it had in its file, and what makes a row unusable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trainer.errors import TrainerError

TrainOn = Literal["assistant", "last_assistant", "all"]

Message = dict[str, Any]
"""role (system, user, assistant or tool) and content, as chat templates take them; an assistant's message may have
tool_calls and reasoning_content, and weight 0 when it is context only."""


@dataclass(frozen=True)
class Conversation:
    """Messages that end with the answer to be learned."""

    id: str
    messages: list[Message]
    category: str | None = None
    tools: list[dict[str, Any]] | None = None
    split: str | None = None
    """Which split the row says it belongs to, where the configuration asks a column."""
    template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template that the row gives, such as enable_thinking."""


class BadRowError(TrainerError):
    """A row that cannot be used: the reason, its field, its file and its number, counted from 1."""

    def __init__(self, reason: str, field: str | None = None, file: str | None = None, row: int | None = None) -> None:
        # All four are the exception's args, so it survives pickling.
        super().__init__(reason, field, file, row)
        self.reason, self.field, self.file, self.row = reason, field, file, row

    def at(self, file: str, row: int) -> BadRowError:
        """The same, with the place."""
        return BadRowError(self.reason, self.field, file, row)

    def __str__(self) -> str:
        place = "" if self.file is None else f"{self.file}, row {self.row}: "
        return place + (f"{self.field}: " if self.field else "") + self.reason


def check_conversation(messages: list[Message], train_on: TrainOn = "assistant") -> None:
    """Refuse messages that no template could write, or that hold nothing to learn.

    An optional system message comes first; then user and assistant in turns; tool messages come between an
    assistant's call and its next words; the assistant ends it.

    Args:
        messages: checked as they are.
        train_on: which turns are learned.

    Raises:
        BadRowError: names the message and the reason.
    """
    before = "the start"
    for number, message in enumerate(messages):
        role, name = message["role"], f"messages[{number}]"
        if before not in _MAY_FOLLOW[role]:
            way_out = "; data.repeated_roles: join makes one message of them" if role == before else ""
            raise BadRowError(f"role {role} cannot follow {before}{way_out}", name)
        if message.get("tool_call_id") and before == "assistant" and not messages[number - 1].get("tool_calls"):
            raise BadRowError("a tool message answers a tool call, and the assistant made none", name)
        check_text(message["content"], f"{name}.content")
        if role == "user" and not message["content"].strip():
            raise BadRowError("the question is empty", f"{name}.content")
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise BadRowError("the answer is empty", f"{name}.content")
        before = role
    if before != "assistant":
        raise BadRowError(
            f"ends with {before}, not with the assistant: take out what follows the last answer", "messages"
        )
    learned = messages[-1:] if train_on == "last_assistant" else messages
    if not any(message["role"] == "assistant" and message.get("weight") != 0 for message in learned):
        which = "the last answer" if train_on == "last_assistant" else "every answer"
        raise BadRowError(f"{which} is marked not to be learned, so nothing is", "messages")


_MAY_FOLLOW = {
    "system": ("the start",),
    "user": ("the start", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
ROLES = tuple(_MAY_FOLLOW)


def check_text(text: str, field: str) -> None:
    """Refuse text with a NUL, or that was not UTF-8 (such bytes are read as lone surrogates).

    Args:
        text: checked.
        field: for the message.

    Raises:
        BadRowError: says where in the text.
    """
    if "\0" in text:
        raise BadRowError(f"holds a NUL character at position {text.index(chr(0))}", field)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRowError(f"is not valid UTF-8 at position {error.start}", field) from None
