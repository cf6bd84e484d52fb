"""What a model said to one prompt, whoever carried the prompt there, and how an endpoint's reply is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from evaluation.thoughts import unclosed_cause

# Words of OpenAI, and what other servers say for them (TGI, Anthropic, Gemini, Mistral, Cohere and their proxies).
_FINISH_REASONS = {
    "stop": (
        *("stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "stop_string", "end", "end_of_text"),
        *("complete", "completed", "finish", "finished", "done"),
    ),
    "length": (
        *("length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length", "token_limit"),
        *("model_context_window_exceeded", "context_length_exceeded"),
    ),
    "content_filter": ("content_filter", "safety", "recitation", "blocklist", "prohibited_content", "refusal"),
    "tool_calls": ("tool_calls", "tool_call", "tool_use", "function_call"),
}
_THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought", "reasoning_details", "thinking_blocks")
_THOUGHT_PARTS = ("thinking", "reasoning", "thought", "redacted_thinking", "summary")
_TEXT_KEYS = ("text", "thinking", "reasoning", "reasoning_content", "summary", "content", "value")

Kind = Literal["text", "thought", "refusal", "other"]


@dataclass(frozen=True)
class Reply:
    """What came back for one prompt.

    Attributes:
        text: The model's words, without a thought that the endpoint gives apart; None where none came.
        finish_reason: Why it stopped writing, in OpenAI's words; a word that is not known as it came; None: not said.
        cause: Why no words came.
        num_prompt_tokens: Tokens of the prompt.
        num_response_tokens: Tokens written.
        is_too_long: The prompt does not fit the model; asking again is of no use.
        thought: What the endpoint gives as the model's thought, if anything.
    """

    text: str | None
    finish_reason: str | None = None
    cause: str | None = None
    num_prompt_tokens: int = 0
    num_response_tokens: int = 0
    is_too_long: bool = False
    thought: str | None = None


def read_reply(body: object, limit: str = "the limit of tokens") -> Reply:
    """Read a completion of an OpenAI-compatible endpoint, which a proxy may have written.

    The content may be a text or a list of parts. Text parts are the answer; thoughts, as parts or in fields of their
    own, are kept apart.

    Args:
        body: The reply's JSON.
        limit: The setting that limits the reply, with its value; for the cause.

    Returns:
        The reply; one with a thought alone has no text but a cause.
    """
    fields = body if isinstance(body, dict) else {}
    tokens = _tokens(fields.get("usage"))
    choices = fields.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Reply(None, None, _no_message(fields), *tokens)
    choice = choices[0]
    reason = finish_reason_of(choice.get("finish_reason"))
    if isinstance(choice.get("message"), dict):
        return _read_message(choice["message"], reason, tokens, limit)
    if isinstance(choice.get("text"), str):
        return Reply(choice["text"], reason, None, *tokens)
    return Reply(None, reason, "the endpoint's answer holds no message", *tokens)


def _read_message(message: dict[str, Any], reason: str | None, tokens: tuple[int, int], limit: str) -> Reply:
    parts = list(_parts(message.get("content")))
    text = "".join(words for kind, words in parts if kind == "text")
    thought = _thought(message, parts)
    others = sorted({words for kind, words in parts if kind == "other"})
    if message.get("refusal") or any(kind == "refusal" for kind, _ in parts):
        cause: str | None = "the model refused"
    elif thought is not None and not text.strip():
        said_stop = f"the endpoint's answer holds a thought and no answer (finish reason: {reason})"
        cause = unclosed_cause(reason, limit) if reason == "length" else said_stop
    elif others and not text:
        cause = f"the endpoint's answer holds no text, only {', '.join(others)}"
    else:
        cause = None
    return Reply(text if cause is None else None, reason, cause, *tokens, thought=thought)


def finish_reason_of(word: object) -> str | None:
    """Put a finish reason into OpenAI's words; an unknown one stays as it came, and None is none.

    >>> finish_reason_of("eos_token"), finish_reason_of("MAX_TOKENS"), finish_reason_of("odd"), finish_reason_of(None)
    ('stop', 'length', 'odd', None)
    """
    if isinstance(word, dict):  # SGLang's own form
        word = word.get("type")
    text = "" if word is None else str(word).strip()
    if text.casefold() in ("", "none", "null"):
        return None
    return next((name for name, words in _FINISH_REASONS.items() if text.casefold() in words), text)


def is_known_reason(reason: str | None) -> bool:
    """Whether a response's finish reason is one that says how it ended, or none at all."""
    return reason is None or reason in _FINISH_REASONS


def _tokens(usage: object) -> tuple[int, int]:
    counts = usage if isinstance(usage, dict) else {}
    prompt, completion = (counts.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return prompt if isinstance(prompt, int) else 0, completion if isinstance(completion, int) else 0


def _no_message(fields: dict[str, Any]) -> str:
    error = fields.get("error")
    if error is None:
        return "the endpoint's answer holds no message"
    code = error.get("code") if isinstance(error, dict) else None
    return f"the endpoint's answer holds no message but an error (code {one_word(code)})"


def one_word(code: object) -> str:
    """Let an error code through that is one word; anything longer could hold the text of a row."""
    text = str(code)
    return text if text.replace("_", "").replace("-", "").isalnum() and len(text) <= 40 else "unknown"


def _parts(content: object) -> Iterator[tuple[Kind, str]]:
    """Give each part of a message's content with what it is."""
    if isinstance(content, str):
        yield "text", content
    elif isinstance(content, list):
        for part in content:
            yield from _parts(part)
    elif isinstance(content, dict):
        name = str(content.get("type") or "text")
        if name.startswith(_THOUGHT_PARTS) or content.get("thought") is True:
            yield "thought", _flat(content)
        elif name == "refusal":
            yield "refusal", _flat(content.get("refusal"))
        elif name.endswith("text"):
            yield "text", _flat(content)
        else:
            yield "other", one_word(name)


def _thought(message: dict[str, Any], parts: list[tuple[Kind, str]]) -> str | None:
    found = [*(_flat(message.get(name)) for name in _THOUGHT_FIELDS)]
    found.append("".join(words for kind, words in parts if kind == "thought"))
    # Some servers write the same thought into two fields.
    return next((words.strip() for words in found if words.strip()), None)


def _flat(value: object) -> str:
    """Draw the texts of a nested part together."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_flat, value))
    if isinstance(value, dict):
        return next((text for key in _TEXT_KEYS if (text := _flat(value.get(key)))), "")
    return ""
