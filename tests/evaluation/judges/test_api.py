"""The api judge against an endpoint that refuses, lies, hangs and limits."""

import asyncio
import logging
import os
import time

import pytest
from aiohttp import web

from evaluation.config import ApiJudge
from evaluation.endpoint import Pace
from evaluation.errors import EvaluationError
from evaluation.judges.api import ApiEngine
from evaluation.judges.base import Unit
from evaluation.judges.budget import Budget, Prices
from evaluation.judges.forms import form_of
from evaluation.judges.language_model import PromptedJudge
from tests.evaluation.judges.endpoint import Endpoint, completion, fair

SECRET = "sk-very-secret-key"
ROW_TEXT = "the private text of a row"


def rows(num):
    for number in range(num):
        yield {"id": f"r{number}", "sample": 0, "prompt": ROW_TEXT, "reference": "a b c", "response": f"a b {number}"}


def judge_of(endpoint, budget=None, **settings):
    settings = {"api_key_env": None, "max_retries": 2, "attempts": 1, "timeout_s": 5.0} | settings
    config = ApiJudge(type="api", base_url=endpoint.url, model="m", **settings)
    form = form_of(config.protocol)
    return PromptedJudge(ApiEngine(config, form), form, repeats=1, attempts=config.attempts, budget=budget)


def run(endpoint, num=1, budget=None, **settings):
    judge = judge_of(endpoint, budget, **settings)
    return [verdict for _, verdict in judge.verdicts(Unit(judge.key(row, 0), row, 0) for row in rows(num))]


def test_scores_and_counts():
    with Endpoint() as endpoint:
        verdicts = run(endpoint, 5)
    assert [verdict.score for verdict in verdicts] == [67.0] * 5
    assert {(v.state, v.num_calls, v.num_prompt_tokens, v.num_response_tokens) for v in verdicts} == {
        ("scored", 1, 100, 5)
    }
    body = endpoint.bodies[0]
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["score"]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.0, 512, "m")


def test_free_text_without_a_temperature():
    with Endpoint(lambda body, number: completion("Two words of three.\n\n[[67]]")) as endpoint:
        (verdict,) = run(endpoint, structured_output=False, temperature=None)
    assert verdict.score == 67.0
    assert "temperature" not in endpoint.bodies[0] and "response_format" not in endpoint.bodies[0]
    assert "double brackets" in endpoint.bodies[0]["messages"][0]["content"]


def test_64_rows_at_32_at_once_and_a_fifth_of_a_second_take_less_than_one():
    with Endpoint(latency_s=0.2) as endpoint:
        walls_s = []
        # The first round loads the client's parts; after that one quiet moment of a busy machine is enough.
        while len(walls_s) < 12 and min(walls_s, default=1.0) >= 1.0:
            started = time.monotonic()
            assert len(run(endpoint, 64, concurrency=32)) == 64
            walls_s.append(time.monotonic() - started)
    assert endpoint.most_at_once == 32
    assert 0.4 <= min(walls_s) < 1.0, walls_s


@pytest.mark.parametrize("status", [401, 403, 404, 400])
def test_errors_that_no_row_survives_stop_at_once(status):
    def refuse(body, number):
        return web.json_response({"error": {"message": f"bad {ROW_TEXT}", "code": "not_good"}}, status=status)

    with Endpoint(refuse) as endpoint, pytest.raises(EvaluationError) as caught:
        run(endpoint, 200, concurrency=4)
    assert f"HTTP {status}" in str(caught.value) and "not_good" in str(caught.value)
    assert ROW_TEXT not in str(caught.value)
    assert len(endpoint.bodies) <= 4


def test_a_400_on_one_row_of_a_working_endpoint_fails_that_row():
    def refuse_third(body, number):
        return web.json_response({"error": {"message": "too long"}}, status=400) if number == 3 else fair(body, number)

    with Endpoint(refuse_third) as endpoint:
        verdicts = run(endpoint, 5, concurrency=1)
    assert [verdict.state for verdict in verdicts] == ["scored", "scored", "judge_failed", "scored", "scored"]
    assert "HTTP 400" in verdicts[2].cause


@pytest.mark.parametrize(
    "error",
    [
        {"message": "x", "code": "context_length_exceeded"},
        {"message": "This model's maximum context length is 128 tokens.", "code": 400},
    ],
)
def test_a_prompt_that_does_not_fit_the_judge_fails_alone_and_is_asked_once(error):
    def refuse_first(body, number):
        return web.json_response({"error": error}, status=400) if number == 1 else fair(body, number)

    with Endpoint(refuse_first) as endpoint:
        verdicts = run(endpoint, 3, concurrency=1, attempts=3)
        assert len(endpoint.bodies) == 3
    assert [verdict.state for verdict in verdicts] == ["judge_failed", "scored", "scored"]
    assert "too long for the model" in verdicts[0].cause


def test_429_waits_as_long_as_the_server_says():
    def once_busy(body, number):
        if number == 1:
            return web.json_response({"error": {}}, status=429, headers={"Retry-After": "1"})
        return fair(body, number)

    with Endpoint(once_busy) as endpoint:
        started = time.monotonic()
        (verdict,) = run(endpoint)
    assert verdict.state == "scored"
    assert 1.0 <= time.monotonic() - started < 3.0


@pytest.mark.parametrize(
    "broken",
    [
        lambda: web.json_response({"error": "try later"}, status=500),
        lambda: web.Response(text="<html>Bad gateway</html>", content_type="text/html", status=502),
        lambda: web.json_response({}, status=408),
        lambda: web.json_response({}, status=503),
    ],
)
def test_what_may_pass_is_tried_again(broken):
    with Endpoint(lambda body, number: broken() if number <= 2 else fair(body, number)) as endpoint:
        (verdict,) = run(endpoint)
    assert verdict.state == "scored"
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (lambda: web.json_response({"error": {"message": "overloaded"}}), "no message"),
        (lambda: web.Response(text="<html>Sign in</html>", content_type="text/html"), "no message"),
        (lambda: web.Response(text="{half", content_type="application/json"), "cannot be read"),
        (lambda: web.json_response({"choices": []}), "no message"),
        (lambda: web.json_response([1, 2]), "no message"),
        (lambda: completion("eighty"), "does not end in a score"),
        (lambda: completion('{"score": 8', "length"), "did not end by itself"),
        (lambda: completion('{"score": 101}'), "outside"),
        (lambda: completion(""), "empty"),
    ],
)
def test_an_answer_that_is_no_verdict_is_a_failed_row_with_its_cause(answer, cause):
    with Endpoint(lambda body, number: answer()) as endpoint:
        (verdict,) = run(endpoint)
    assert (verdict.state, verdict.score) == ("judge_failed", None)
    assert cause in verdict.cause


def reply(message, **choice):
    return web.json_response({"choices": [{"index": 0, "message": message, **choice}], "usage": {}})


VERDICT = '{"score": 90}'
PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": VERDICT}]


@pytest.mark.parametrize(
    ("message", "choice", "thought"),
    [
        ({"content": [{"type": "text", "text": VERDICT}]}, {"finish_reason": "stop"}, None),
        ({"content": PARTS}, {"finish_reason": "stop"}, "hm"),
        ({"content": VERDICT, "reasoning_content": '{"score": 1}'}, {"finish_reason": "stop"}, '{"score": 1}'),
        ({"content": f"<think>Or 40?</think>\n{VERDICT}"}, {"finish_reason": "stop"}, None),
        ({"content": VERDICT}, {"finish_reason": "eos_token"}, None),
        ({"content": VERDICT}, {"finish_reason": None}, None),
        ({"content": VERDICT}, {}, None),
    ],
)
def test_verdicts_in_the_forms_of_other_servers(message, choice, thought):
    with Endpoint(lambda body, number: reply(message, **choice)) as endpoint:
        (verdict,) = run(endpoint)
    assert (verdict.state, verdict.score, verdict.details.get("thought")) == ("scored", 90.0, thought)


@pytest.mark.parametrize(
    ("message", "finish_reason", "cause"),
    [
        ({"content": None, "reasoning_content": VERDICT}, "length", "not closed within judge.max_tokens=512: raise it"),
        ({"content": None, "reasoning_content": VERDICT}, "stop", "a thought and no answer"),
        ({"content": f"<think>{VERDICT}"}, "length", "did not end (finish reason: length): raise judge.max_tokens"),
        ({"content": VERDICT}, "abort", "finish reason: abort"),
    ],
)
def test_a_thought_alone_or_an_odd_end_is_no_verdict(message, finish_reason, cause):
    with Endpoint(lambda body, number: reply(message, finish_reason=finish_reason)) as endpoint:
        (verdict,) = run(endpoint, structured_output=False)
    assert (verdict.state, verdict.score) == ("judge_failed", None)
    assert cause in verdict.cause and "score" in verdict.raw


def test_failed_verdicts_are_asked_again_and_their_attempts_kept():
    with Endpoint(lambda body, number: completion("eighty") if number <= 2 else fair(body, number)) as endpoint:
        (verdict,) = run(endpoint, attempts=3)
    assert (verdict.state, verdict.num_calls, verdict.num_prompt_tokens) == ("scored", 3, 300)
    assert [attempt["raw"] for attempt in verdict.details["failed_attempts"]] == ["eighty", "eighty"]
    assert len({body["seed"] for body in endpoint.bodies}) == 3


def test_a_hanging_endpoint_costs_its_timeout():
    async def hang():
        await asyncio.sleep(60)

    with Endpoint(lambda body, number: hang() if number == 1 else fair(body, number)) as endpoint:
        started = time.monotonic()
        verdicts = run(endpoint, 4, timeout_s=1.0)
    assert [verdict.state for verdict in verdicts] == ["scored"] * 4
    assert time.monotonic() - started < 5


def test_an_endpoint_that_went_away_ends_the_stage():
    with Endpoint() as endpoint:
        pass
    with pytest.raises(EvaluationError, match="8 requests in a row failed"):
        run(endpoint, 100, concurrency=4, max_retries=0)


def test_verdicts_that_came_with_the_end_are_handed_on_first():
    def refuse_last(body, number):
        return web.json_response({}, status=401) if number == 20 else fair(body, number)

    with Endpoint(refuse_last) as endpoint:
        judge = judge_of(endpoint, concurrency=20)
        seen = []
        with pytest.raises(EvaluationError, match="HTTP 401"):
            for _, verdict in judge.verdicts(Unit(str(n), row, 0) for n, row in enumerate(rows(20))):
                seen.append(verdict)
    assert 0 < len(seen) <= 19


def test_neither_key_nor_row_is_logged(caplog, monkeypatch):
    monkeypatch.setitem(os.environ, "SOME_KEY", SECRET)
    caplog.set_level(logging.INFO)
    broken = web.json_response({"error": {"message": ROW_TEXT + SECRET, "code": ROW_TEXT}}, status=500)
    with Endpoint(lambda body, number: broken) as endpoint:
        (verdict,) = run(endpoint, api_key_env="SOME_KEY", max_retries=0)
    assert endpoint.headers[0]["Authorization"] == f"Bearer {SECRET}"
    for text in (caplog.text, verdict.cause):
        assert SECRET not in text and ROW_TEXT not in text


def test_a_missing_key_is_named():
    with Endpoint() as endpoint, pytest.raises(EvaluationError, match="NO_SUCH_KEY"):
        run(endpoint, api_key_env="NO_SUCH_KEY")


def test_requests_are_paced():
    with Endpoint() as endpoint:
        run(endpoint, 1)
        started = time.monotonic()
        run(endpoint, 6, requests_per_minute=600)
    assert time.monotonic() - started >= 0.5  # five gaps of a tenth of a second


def test_tokens_put_later_requests_off():
    async def second_turn_after(num_tokens):
        pace = Pace(None, 6000)  # a hundred a second
        await pace.wait_for_turn()
        pace.spend(num_tokens)
        started = time.monotonic()
        await pace.wait_for_turn()
        return time.monotonic() - started

    assert 0.25 <= asyncio.run(second_turn_after(30)) < 0.5


def test_budget_of_calls_and_cost():
    with Endpoint() as endpoint:
        budget = Budget(max_calls=7)
        assert len(run(endpoint, 20, budget, concurrency=3)) == 7
        assert "max_calls" in budget.reached
        # A call costs 100 x 1 + 5 x 20 = 200 millionths.
        budget = Budget(max_cost=0.001, prices=Prices(1.0, 20.0))
        assert len(run(endpoint, 20, budget, concurrency=1)) == 5
        assert budget.cost == pytest.approx(0.001)


def test_long_texts_are_cut_visibly_and_control_tokens_broken():
    with Endpoint() as endpoint:
        judge = judge_of(endpoint, max_answer_tokens=16)
        row = next(rows(1)) | {"response": "<|im_end|>" + "x" * 100}
        list(judge.verdicts([Unit("k", row, 0)]))
    text = endpoint.bodies[0]["messages"][0]["content"]
    assert "< |im_end|>" + "x" * 53 + "\n[... 47 characters were cut here by the examiner ...]" in text
    assert "<|im_end|>" not in text


def test_no_more_is_held_than_what_is_in_flight():
    pulled = 0

    def units(judge):
        nonlocal pulled
        for row in rows(300):
            pulled += 1
            yield Unit(judge.key(row, 0), row, 0)

    with Endpoint() as endpoint:
        judge = judge_of(endpoint, concurrency=8)
        for done, _ in enumerate(judge.verdicts(units(judge)), 1):
            # Those in flight, and those that came back in the same moment as this one.
            assert pulled - done <= 2 * 8
    assert pulled == 300
