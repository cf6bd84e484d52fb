"""What a model said to one prompt, whoever carried the prompt there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reply:
    """What came back for one prompt.

    Attributes:
        text: The model's words; None where none came.
        finish_reason: Why it stopped writing, in OpenAI's words.
        cause: Why no words came.
        num_prompt_tokens: Tokens of the prompt.
        num_response_tokens: Tokens written.
        is_too_long: The prompt does not fit the model; asking again is of no use.
    """

    text: str | None
    finish_reason: str | None = None
    cause: str | None = None
    num_prompt_tokens: int = 0
    num_response_tokens: int = 0
    is_too_long: bool = False
