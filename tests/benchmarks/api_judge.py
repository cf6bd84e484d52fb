"""What the api judge costs beside a bare client: rows a second, memory over 10,000 rows, and 64 rows at 0.2 s.

Both ask the same small server in a process of its own, in turns; the bare client is aiohttp with a semaphore and parses
JSON. What the server itself would take, if asking cost nothing, is rows x latency / concurrency.

    python tests/benchmarks/api_judge.py --rows 10000 --concurrency 32 --latency 0.05 [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

sys.path.insert(0, str(Path(__file__).parents[2]))
from evaluation.config import ApiJudge
from evaluation.judges.api import ApiEngine
from evaluation.judges.base import Unit
from evaluation.judges.forms import form_of
from evaluation.judges.language_model import PromptedJudge

REPLY = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": '{"score": 50}'}}],
    "usage": {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105},
}


def serve(latency_s: float, port: multiprocessing.Queue[int]) -> None:
    """Answer every request with one score after a while."""

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(latency_s)
        return web.json_response(REPLY)

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port.put(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


def rows(num: int) -> Iterator[dict[str, object]]:
    """Write rows of a few hundred characters."""
    for number in range(num):
        yield {
            "id": f"r{number}",
            "sample": 0,
            "prompt": "p " * 100,
            "reference": "a " * 50,
            "response": f"{number} " * 50,
        }


def bare(url: str, judge: PromptedJudge, num: int, concurrency: int) -> float:
    """Ask the same prompts with nothing around them; seconds."""

    async def run() -> None:
        limit = asyncio.Semaphore(concurrency)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def one(row: dict[str, object]) -> None:
                messages = judge.prompts(Unit("", row, 0))[0]
                async with limit, session.post(f"{url}/chat/completions", json={"messages": messages}) as answer:
                    json.loads((await answer.json())["choices"][0]["message"]["content"])

            await asyncio.gather(*(one(row) for row in rows(num)))

    started = time.perf_counter()
    asyncio.run(run())
    return time.perf_counter() - started


def judged(judge: PromptedJudge, num: int) -> tuple[float, list[float]]:
    """Judge the rows; seconds, and the peak of memory after each quarter in MiB."""
    started = time.perf_counter()
    peaks = []
    for done, _ in enumerate(judge.verdicts(Unit(judge.key(row, 0), row, 0) for row in rows(num)), 1):
        if done % (num // 4) == 0:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return time.perf_counter() - started, peaks


@contextmanager
def served(latency_s: float) -> Iterator[str]:
    """Run the server in a process of its own; its address."""
    port: multiprocessing.Queue[int] = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(latency_s, port), daemon=True)
    server.start()
    yield f"http://127.0.0.1:{port.get()}/v1"
    server.terminate()
    server.join()


def judge_at(url: str, concurrency: int) -> PromptedJudge:
    """Build the judge as a configuration would."""
    config = ApiJudge(type="api", base_url=url, model="m", api_key_env=None, concurrency=concurrency)
    form = form_of(config.protocol)
    return PromptedJudge(ApiEngine(config, form), form, repeats=1, attempts=1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds that the server takes for a reply")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with served(0.2) as url:
        judge = judge_at(url, 32)
        burst_s = [judged(judge, 64)[0] for _ in range(5)]
    with served(options.latency) as url:
        judge = judge_at(url, options.concurrency)
        judged(judge, 4 * options.concurrency)
        # Memory is looked at in the first round, as the bare client's would be in the peak of later ones.
        ours, bares, peaks = [], [], []
        for _ in range(options.rounds):
            wall_s, of_round = judged(judge, options.rows)
            ours.append(wall_s)
            peaks = peaks or of_round
            bares.append(bare(url, judge, options.rows, options.concurrency))
    ideal_s = options.rows * options.latency / options.concurrency
    ours_s, bare_s = statistics.median(ours), statistics.median(bares)
    result = {
        "rows": options.rows, "ours_s": ours, "bare_s": bares, "ideal_s": ideal_s, "ratio": ours_s / bare_s,
        "overhead_ms_a_row": 1000 * (ours_s - bare_s) / options.rows, "peak_mib_by_quarter": peaks,
        "64_rows_at_0.2_s_and_32_at_once_s": burst_s,
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
