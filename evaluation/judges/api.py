"""The judge's model at an OpenAI-compatible endpoint: OpenAI, Ollama, a vLLM server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from evaluation.config import ApiJudge
from evaluation.endpoint import EndpointClient
from evaluation.judges.budget import Range
from evaluation.judges.forms import Ending, Form
from evaluation.judges.language_model import Ask
from evaluation.judges.prompts import Messages, neutralise
from evaluation.reply import Reply
from evaluation.rows import Row

# The endpoint's tokenizer is not known here; English text has about four characters in a token.
_CHARACTERS_PER_TOKEN = 4
_CUT_MARK = "\n[... {} characters were cut here by the examiner ...]"


class ApiEngine:
    """Carries prompts to an endpoint.

    Args:
        config: The judge's settings.
        form: What it is asked; its schema forces the verdict where the endpoint takes one.

    Attributes:
        name: How the report calls the judge.
        identity: Endpoint, model, sampling.
        ending: JSON where the endpoint is asked for a schema, else free text.
        varies: An endpoint may answer the same prompt differently, even at temperature 0.
    """

    name: str
    identity: Row
    ending: Ending
    varies: bool

    def __init__(self, config: ApiJudge, form: Form) -> None:
        self._config = config
        self._form = form
        self._client = EndpointClient(config, config.model, "judge", "chat")
        self.name = f"api {config.model}"
        self.ending = "json" if config.structured_output else "free"
        self.varies = True
        names = ("base_url", "model", "temperature", "max_tokens", "structured_output", "max_answer_tokens")
        self.identity = {"judge": "api", **{name: getattr(config, name) for name in names}}

    def clean(self, text: str) -> str:
        """Break control tokens, and cut a text above `max_answer_tokens` (by its characters) with a visible mark."""
        text = neutralise(text)
        limit = self._config.max_answer_tokens * _CHARACTERS_PER_TOKEN
        return text if len(text) <= limit else text[:limit] + _CUT_MARK.format(len(text) - limit)

    def count_tokens(self, messages: Messages) -> Range:
        """Guess by the characters: from 5 in a token (plain English) down to 2 (code, other scripts)."""
        num_characters = sum(len(message["content"]) for message in messages)
        return Range(num_characters / 5, num_characters / _CHARACTERS_PER_TOKEN, num_characters / 2)

    def reply_tokens(self) -> Range:
        """Guess a bare verdict, or some sentences before it; at most `max_tokens`."""
        expected = 10 if self._config.structured_output else 150
        return Range(5, min(expected, self._config.max_tokens), self._config.max_tokens)

    def replies(self, asks: Iterable[Ask]) -> Iterator[tuple[Ask, Reply]]:
        """Answer the prompts, `judge.concurrency` at a time, in the order in which the replies come."""
        return self._client.replies(asks, self._request)

    def _request(self, ask: Ask) -> dict[str, Any]:
        request: dict[str, Any] = {
            "messages": ask.messages,
            "seed": ask.seed,
            self._client.limit_name: self._config.max_tokens,
        }
        if self._config.temperature is not None:
            request["temperature"] = self._config.temperature
        if self._config.structured_output:
            schema = {"name": "verdict", "strict": True, "schema": self._form.schema}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request
