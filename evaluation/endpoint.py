"""Requests to an OpenAI-compatible endpoint, for models under test and for judges: OpenAI, Ollama, a vLLM server.

Real concurrency, and memory that does not grow with the number of rows: only the requests in flight are held. The
`openai` client retries what may pass (408, 409, 429, 5xx, timeouts) with back-off, jitter and the server's Retry-After.
No row text and no key is written to a log or into an error.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import openai
from openai import AsyncOpenAI

from evaluation.config import Endpoint
from evaluation.errors import EvaluationError
from evaluation.reply import Reply, one_word, read_reply
from evaluation.rows import Row

Ask = TypeVar("Ask")

# How OpenAI, vLLM, Ollama and others say that a prompt is too long for the model.
_TOO_LONG = re.compile(r"context_length_exceeded|context (length|window|size)|max\w*[ _]model[ _]len", re.IGNORECASE)


class Pace:
    """Spaces requests evenly, so that neither their number nor their tokens in a minute exceed a limit.

    The tokens of a request are known when it comes back; they put off the requests that start after that.
    """

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self._request_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token_s = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_start = 0.0

    async def wait_for_turn(self) -> None:
        """Sleep until the next request may start, and take that turn."""
        now = time.monotonic()
        start = max(self._next_start, now)
        self._next_start = start + self._request_s
        while (left_s := start - time.monotonic()) > 0:
            await asyncio.sleep(left_s)

    def spend(self, num_tokens: int) -> None:
        """Count the tokens of a request that came back."""
        self._next_start = max(self._next_start, time.monotonic()) + num_tokens * self._token_s


class EndpointClient:
    """Sends many requests to one model at an endpoint.

    Args:
        endpoint: Where it is, and how hard it may be asked.
        model: The model's name there.
        section: The part of the configuration that names the endpoint, such as judge; for messages.
        kind: Whether requests hold messages (`chat`) or text (`completions`).
    """

    def __init__(self, endpoint: Endpoint, model: str, section: str, kind: Literal["chat", "completions"]) -> None:
        self._endpoint = endpoint
        self._model = model
        self._section = section
        self._kind = kind
        self._pace = Pace(endpoint.requests_per_minute, endpoint.tokens_per_minute)
        self._num_good = 0
        self._num_lost_in_a_row = 0
        # OpenAI's own reasoning models refuse the old name, some other servers do not know the new one.
        is_openai = (urlsplit(endpoint.base_url).hostname or "").endswith("openai.com")
        self.limit_name = "max_completion_tokens" if is_openai and kind == "chat" else "max_tokens"
        # OpenAI refuses fields that it does not know; its models have no chat template to give arguments to.
        self.takes_template_kwargs = kind == "chat" and not is_openai

    def replies(self, asks: Iterable[Ask], request: Callable[[Ask], Row]) -> Iterator[tuple[Ask, Reply]]:
        """Send the requests, `concurrency` at a time.

        Args:
            asks: What is asked; read as there is room, so that no more are held than are in flight.
            request: Gives the arguments of one request, but for the model.

        Yields:
            Each ask with its reply, in the order in which they come.

        Raises:
            EvaluationError: The key is not set, the endpoint refuses everything, or it went away.
        """
        stream = self._stream(iter(asks), request)

        async def advance() -> list[tuple[Ask, Reply]] | None:
            return await anext(stream, None)

        with asyncio.Runner() as runner:
            while (batch := runner.run(advance())) is not None:
                yield from batch

    async def _stream(
        self, asks: Iterator[Ask], request: Callable[[Ask], Row]
    ) -> AsyncIterator[list[tuple[Ask, Reply]]]:
        """Keep `concurrency` requests in flight, and hand on those that have come back."""
        async with AsyncOpenAI(
            base_url=self._endpoint.base_url,
            api_key=self._read_key(),
            timeout=self._endpoint.timeout_s,
            max_retries=self._endpoint.max_retries,
        ) as client:
            flying: set[asyncio.Task[tuple[Ask, Reply]]] = set()
            try:
                while True:
                    while len(flying) < self._endpoint.concurrency and (ask := next(asks, None)) is not None:
                        flying.add(asyncio.create_task(self._answer(client, ask, request)))
                    if not flying:
                        return
                    done, flying = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
                    # What was answered is handed on before an error ends the stream: it has been paid for.
                    yield [task.result() for task in done if task.exception() is None]
                    for task in done:
                        task.result()
            finally:
                for task in flying:
                    task.cancel()

    async def _answer(self, client: AsyncOpenAI, ask: Ask, request: Callable[[Ask], Row]) -> tuple[Ask, Reply]:
        await self._pace.wait_for_turn()
        service: Any = client.chat.completions if self._kind == "chat" else client.completions
        arguments = request(ask)
        try:
            # The reply's own JSON: what proxies write is often not what the client's classes expect.
            answer = await service.with_raw_response.create(model=self._model, **arguments)
            body = json.loads(answer.content)
        except openai.APIStatusError as error:
            return ask, self._refused(error)
        except openai.APIConnectionError as error:
            return ask, Reply(None, cause=self._lost(error))
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            cause = f"the endpoint's answer cannot be read, so it holds no message ({type(error).__name__})"
            return ask, Reply(None, cause=cause)
        self._num_lost_in_a_row = 0
        reply = read_reply(body, f"{self._section.partition('.')[0]}.max_tokens={arguments.get(self.limit_name)}")
        self._pace.spend(reply.num_prompt_tokens + reply.num_response_tokens)
        self._num_good += reply.text is not None
        return ask, reply

    def _refused(self, error: openai.APIStatusError) -> Reply:
        """Decide what an HTTP error means: the end, or one row without a reply.

        Args:
            error: What the client gave up on.

        Returns:
            The cause for that row.

        Raises:
            EvaluationError: No other row would fare better.
        """
        status = error.status_code
        cause = f"the endpoint answered HTTP {status} ({type(error).__name__}, code {one_word(error.code)})"
        if status in (400, 413, 422) and _TOO_LONG.search(f"{error.code} {error.message}"):
            return Reply(None, cause=f"{cause}: too long for the model", is_too_long=True)
        if status in (401, 403, 404) or (status == 400 and not self._num_good):
            raise EvaluationError(
                f"{self._endpoint.base_url}: {cause} for model {self._model!r}; look at {self._section}.base_url, "
                f"{self._section}.model, {self._section}.api_key_env ({self._endpoint.api_key_env}), and what the "
                "endpoint does not take (structured output, sampling)"
            ) from None
        if status >= 500 or status == 429:
            self._lost(error)
        return Reply(None, cause=cause)

    def _lost(self, error: openai.APIError) -> str:
        """Count an endpoint that is away in spite of the retries.

        Args:
            error: What the client gave up on.

        Returns:
            The cause for that row.

        Raises:
            EvaluationError: As many requests in a row as can be in flight were lost: it will not be back soon.
        """
        self._num_lost_in_a_row += 1
        if self._num_lost_in_a_row >= max(self._endpoint.concurrency, 8):
            raise EvaluationError(
                f"{self._endpoint.base_url}: {self._num_lost_in_a_row} requests in a row failed, the last one with "
                f"{type(error).__name__}, after {self._endpoint.max_retries} retries each; "
                "what came so far is kept, run the stage again to go on"
            ) from None
        return f"{type(error).__name__} after {self._endpoint.max_retries} retries"

    def _read_key(self) -> str:
        variable = self._endpoint.api_key_env
        if variable is None:
            return "none"
        key = os.environ.get(variable)
        if not key:
            raise EvaluationError(
                f"the environment variable {variable} with the endpoint's key is not set; set it, or "
                f"{self._section}.api_key_env: null for an endpoint without one"
            )
        return key
