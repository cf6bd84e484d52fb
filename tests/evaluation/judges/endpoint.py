"""A small OpenAI-compatible endpoint in a thread, for the judges' tests: it answers, refuses and lies as told."""

import asyncio
import json
import re
import threading
from collections.abc import Callable

from aiohttp import web

from evaluation.judges.reference import token_f1

# What a judge worth its name says of the responses of the self-test.
KNOWN = {
    "Paris is the capital of France.": 95,
    "42": 90,
    "Blue and white.": 50,
    "The capital of France is Berlin.": 3,
    "17 + 25 = 53": 4,
}
_FENCED = re.compile(r"--- (\w{16}) begins ---\n\n(.*?)\n\n--- \1 ends ---", re.DOTALL)
_REFERENCE = re.compile(r"# Reference answer\n\n(.*?)\n\n#", re.DOTALL)


def judged(prompt: str) -> tuple[list[str], str]:
    """Take the fenced responses and the reference out of a judge's prompt."""
    reference = _REFERENCE.search(prompt)
    assert reference is not None
    return [match[2] for match in _FENCED.finditer(prompt)], reference[1]


def fair_score(prompt: str) -> int:
    (response,), reference = judged(prompt)
    return KNOWN.get(response, round(100 * token_f1(response, reference)))


def completion(text: str, finish_reason: str = "stop", tokens: tuple[int, int] = (100, 5)) -> web.Response:
    message = {"role": "assistant", "content": text}
    return web.json_response(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": finish_reason, "message": message}],
            "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)},
        }
    )


def fair(body: dict, number: int) -> web.Response:
    """Judge fairly, in the form of JSON."""
    return completion(json.dumps({"score": fair_score(body["messages"][0]["content"])}))


class Endpoint:
    """Serves `answer(body, number of the request)` on a free loopback port while it is entered."""

    def __init__(self, answer: Callable[[dict, int], web.Response] = fair, latency_s: float = 0.0) -> None:
        self.answer = answer
        self.latency_s = latency_s
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.most_at_once = 0
        self._at_once = 0
        self._loop = asyncio.new_event_loop()
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        number = len(self.bodies)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(self.latency_s)
            answer = self.answer(body, number)
            return await answer if asyncio.iscoroutine(answer) else answer
        finally:
            self._at_once -= 1

    def __enter__(self) -> "Endpoint":
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._handle)
        app.router.add_post("/v1/completions", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        ready = threading.Event()

        async def start() -> None:
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            self._port = self._runner.addresses[0][1]
            ready.set()

        def serve() -> None:
            self._loop.run_until_complete(start())
            self._loop.run_forever()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
