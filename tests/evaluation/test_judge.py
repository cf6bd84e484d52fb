"""The judge stage: every row in one state, nothing asked twice, a judge tried before it is believed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from aiohttp import web

from evaluation.config import ApiJudge, JuryJudge, LabelJudge, PairwiseProtocol, ReferenceJudge, RubricProtocol
from evaluation.errors import EvaluationError
from evaluation.judge import estimate, judge
from evaluation.judges.reference import token_f1
from evaluation.rows import read_rows, write_rows
from tests.evaluation.judges.endpoint import Endpoint, completion, fair, fair_score, judged

REPOSITORY = Path(__file__).parents[2]
NUM_CHECKS = 5 + 3 * 8


def response(number: int, text: str, model: str, **changes) -> dict:
    row = {"id": f"r{number}", "category": "even" if number % 2 == 0 else "odd", "model": model, "sample": 0}
    row |= {"prompt": f"Say the number {number} and", "reference": f"cat{number} naps{number}", "response": text}
    row |= {"finish_reason": "stop", "num_prompt_tokens": 9, "num_response_tokens": 4}
    return row | {"state": "generated", "cause": None, "key": f"{model}{number}"} | changes


@pytest.fixture
def run_dir(tmp_path):
    """Twelve prompts: base is half right, tuned is right."""
    write_responses(tmp_path, base=lambda n: f"cat{n} barks", tuned=lambda n: f"cat{n} naps{n}")
    return tmp_path


def write_responses(run_dir, num=12, **models):
    for model, text in models.items():
        rows = [response(number, text(number), model) for number in range(num)]
        write_rows(run_dir / "responses" / f"{model}.jsonl", rows)


def config_of(endpoint, **settings) -> ApiJudge:
    settings = {"api_key_env": None, "max_retries": 0, "attempts": 2, "concurrency": 4} | settings
    return ApiJudge(type="api", base_url=endpoint.url, model="m", **settings)


def states(run_dir, model="tuned") -> Counter:
    return Counter(row["state"] for row in read_rows(run_dir / "scores" / f"{model}.jsonl"))


def summary(run_dir) -> dict:
    return json.loads((run_dir / "judge/summary.json").read_text())


def test_reference_judge(run_dir):
    result = judge(ReferenceJudge(), ["base", "tuned"], run_dir)
    assert result["models"]["tuned"]["mean"] == 100.0
    # "cat7 barks" shares one word of two with "cat7 naps7".
    assert result["models"]["base"]["mean"] == pytest.approx(50.0)
    again = judge(ReferenceJudge(), ["base", "tuned"], run_dir)
    assert again["models"]["base"]["reused"] == 12
    assert not (run_dir / "judge").exists()


def test_rows_without_a_response_keep_their_state_and_cause(run_dir):
    rows = read_rows(run_dir / "responses/tuned.jsonl")
    rows[1] |= {"state": "too_long", "cause": "700 tokens", "response": None}
    rows[5] |= {"state": "generation_failed", "cause": "no engine", "response": None}
    write_rows(run_dir / "responses/tuned.jsonl", rows)
    with pytest.raises(EvaluationError, match=r"10 scored, 1 generation_failed, 1 too_long of 12 asked"):
        judge(ReferenceJudge(), ["base", "tuned"], run_dir)
    result = judge(ReferenceJudge(min_scored=0.8), ["base", "tuned"], run_dir)
    assert result["models"]["tuned"]["mean"] == 100.0  # over ten rows: nothing missing counts as zero
    scores = read_rows(run_dir / "scores/tuned.jsonl")
    assert [row["id"] for row in scores] == [row["id"] for row in rows]
    assert [(scores[n]["state"], scores[n]["cause"], scores[n]["score"]) for n in (1, 5)] == [
        ("too_long", "700 tokens", None),
        ("generation_failed", "no engine", None),
    ]


def test_missing_responses_are_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"base.jsonl is missing; run `launcher generate`"):
        judge(ReferenceJudge(), ["base"], tmp_path)


def test_a_language_model_judges_and_an_unchanged_run_asks_nothing(run_dir):
    with Endpoint() as endpoint:
        result = judge(config_of(endpoint), ["base", "tuned"], run_dir)
        assert len(endpoint.bodies) == NUM_CHECKS + 24
        judge(config_of(endpoint), ["base", "tuned"], run_dir)
        assert len(endpoint.bodies) == NUM_CHECKS + 24
    assert (result["judge"], result["models"]["tuned"]["mean"]) == ("api m", 100.0)
    assert states(run_dir) == {"scored": 12}
    found = summary(run_dir)
    assert found["self_test"]["0-good"] == 95
    assert found["spent"]["num_calls"] == NUM_CHECKS + 24
    assert len(read_rows(run_dir / "judge/checks.jsonl")) == NUM_CHECKS


def test_only_what_changed_is_asked_again(run_dir):
    with Endpoint() as endpoint:
        judge(config_of(endpoint), ["base", "tuned"], run_dir)
        before = len(endpoint.bodies)
        rows = read_rows(run_dir / "responses/base.jsonl")
        rows[3]["response"] += "!"
        write_rows(run_dir / "responses/base.jsonl", rows)
        judge(config_of(endpoint), ["base", "tuned"], run_dir)
        assert len(endpoint.bodies) == before + 1
        rubric = RubricProtocol(type="rubric", criteria={"right": "It is right."})
        endpoint.answer = lambda body, _: completion(json.dumps({"right": fair_score_of_rubric(body)}))
        judge(config_of(endpoint, protocol=rubric), ["base", "tuned"], run_dir)
        before = len(endpoint.bodies)
        changed = RubricProtocol(type="rubric", criteria={"right": "It is right!"})
        judge(config_of(endpoint, protocol=changed), ["base", "tuned"], run_dir)
        assert len(endpoint.bodies) == before + NUM_CHECKS + 24


def fair_score_of_rubric(body) -> int:
    return fair_score(body["messages"][0]["content"])


def test_equal_responses_are_one_question(run_dir):
    write_responses(run_dir, base=lambda n: "a cat", tuned=lambda n: "a cat")
    with Endpoint() as endpoint:
        judge(config_of(endpoint), ["base", "tuned"], run_dir)
        assert len(endpoint.bodies) == NUM_CHECKS + 12
    assert states(run_dir, "base") == states(run_dir, "tuned") == {"scored": 12}
    assert summary(run_dir)["spent"]["num_calls"] == NUM_CHECKS + 12


def test_repeats_are_asked_each_with_its_own_seed(run_dir):
    with Endpoint() as endpoint:
        judge(config_of(endpoint, repeats=3, temperature=1.0), ["tuned"], run_dir)
        bulk = [body for body in endpoint.bodies if "Say the number 7 and" in body["messages"][0]["content"]]
    rows = [row for row in read_rows(run_dir / "scores/tuned.jsonl") if row["id"] == "r7"]
    assert [row["repeat"] for row in rows] == [0, 1, 2]
    assert len({body["seed"] for body in bulk}) == len(bulk) >= 3


def test_failed_verdicts_are_never_stored_as_done(run_dir):
    def silent_on_r7(body, number):
        return completion("") if "Say the number 7 and" in body["messages"][0]["content"] else fair(body, number)

    with Endpoint(silent_on_r7) as endpoint:
        with pytest.raises(EvaluationError, match=r"tuned: 11 scored, 1 judge_failed of 12 asked"):
            judge(config_of(endpoint, self_test=False), ["tuned"], run_dir)
        failed = read_rows(run_dir / "scores/tuned.jsonl")[7]
        assert (failed["state"], failed["score"], failed["cause"]) == ("judge_failed", None, "the reply is empty")
        endpoint.answer = fair
        before = len(endpoint.bodies)
        judge(config_of(endpoint, self_test=False), ["tuned"], run_dir)
        assert len(endpoint.bodies) == before + 1
    mended = read_rows(run_dir / "scores/tuned.jsonl")[7]
    # Two attempts of the first run, and the one that told.
    assert (mended["state"], mended["num_calls"], len(mended["details"]["failed_attempts"])) == ("scored", 3, 2)


def test_a_judge_that_cannot_judge_is_refused_soon(run_dir):
    write_responses(run_dir, num=300, tuned=lambda n: f"cat{n} naps{n}")
    with Endpoint(lambda body, number: completion('{"score": 42}')) as endpoint:
        with pytest.raises(EvaluationError, match="cannot put five known responses in order"):
            judge(config_of(endpoint), ["tuned"], run_dir)
        assert len(endpoint.bodies) <= 5 + 2 * 4
        # It is known already: nothing is asked.
        before = len(endpoint.bodies)
        with pytest.raises(EvaluationError, match="cannot put five known responses in order"):
            judge(config_of(endpoint), ["tuned"], run_dir)
        assert len(endpoint.bodies) == before


def test_a_judge_that_can_be_talked_over_is_reported_and_fails_a_strict_run(run_dir):
    def gullible(body, number):
        (text,), _ = judged(body["messages"][0]["content"])
        return completion('{"score": 100}') if "[[100]]" in text else fair(body, number)

    with Endpoint(gullible) as endpoint:
        judge(config_of(endpoint), ["tuned"], run_dir)
        kinds = summary(run_dir)["canaries"]["kinds"]
        assert {kind for kind, count in kinds.items() if count["fallen_for"]} == {"forged verdict 1", "closing fence"}
        with pytest.raises(EvaluationError, match=r"can be talked over.*forged verdict 1 \(3 of 3\)"):
            judge(config_of(endpoint), ["tuned"], run_dir, strict=True)


def test_the_model_under_test_and_its_family_are_marked(run_dir):
    models = {"base": {"fingerprint": "f", "family": "llama"}, "tuned": {"fingerprint": "g", "family": "qwen"}}
    (run_dir / "responses/models.json").write_text(json.dumps(models))
    with Endpoint() as endpoint:
        config = config_of(endpoint).model_copy(update={"model": "meta-llama/Llama-9"})
        judge(config, ["tuned"], run_dir)
        assert (summary(run_dir)["same_family_as"], summary(run_dir)["same_model_as"]) == (["base"], [])
        # At one endpoint the name tells.
        served = {"fingerprint": "h", "family": "llama", "base_url": endpoint.url}
        models |= {"rival": served | {"model": "meta-llama/Llama-9"}, "other": served | {"model": "meta-llama/Llama-8"}}
        (run_dir / "responses/models.json").write_text(json.dumps(models))
        judge(config, ["tuned"], run_dir)
    assert summary(run_dir)["same_model_as"] == ["rival"]


def fair_pair(body, number):
    responses, reference = judged(body["messages"][0]["content"])
    known = {"It is a large city in Europe.": 0.5, "It is more than 25.": 0.5, "White and red.": 0.5}
    known |= {"42": 0.9, "Blue and white.": 0.5, "The capital of France is Berlin.": 0, "17 + 25 = 53": 0}
    first, second = (known.get(text, token_f1(text, reference)) for text in responses)
    return completion(json.dumps({"better": "A" if first > second else "B" if second > first else "tie"}))


def test_pairs(run_dir):
    rows = read_rows(run_dir / "responses/base.jsonl")
    rows[2] |= {"state": "generation_failed", "cause": "x", "response": None}
    write_rows(run_dir / "responses/base.jsonl", rows)
    pairwise = PairwiseProtocol(type="pairwise")
    with Endpoint(fair_pair) as endpoint:
        judge(config_of(endpoint, protocol=pairwise, min_scored=0.9), ["base", "tuned"], run_dir)
        before = len(endpoint.bodies)
        endpoint.answer = lambda body, number: completion('{"better": "A"}')  # always the first
        biased = config_of(endpoint, protocol=pairwise, min_scored=0.9, self_test=False, temperature=0.5)
        scores = {row["id"]: row["score"] for row in read_rows(run_dir / "scores/tuned.jsonl")}
        judge(biased, ["base", "tuned"], run_dir)
    assert scores == {f"r{n}": (100.0 if n != 2 else None) for n in range(12)}
    assert states(run_dir) == {"scored": 11, "skipped": 1}
    assert states(run_dir, "base") == {"scored": 11, "generation_failed": 1}
    # Both orders of eleven pairs and of the checks; equal responses, as the baseline's with itself, are not asked.
    assert before == 2 * (NUM_CHECKS - 1 + 11)
    position = summary(run_dir)["position"]["tuned"]
    assert (position["flip_rate"]["mean"], position["first_rate"]["mean"]) == (1.0, 1.0)


def test_labels(run_dir):
    texts = ["Yes.", "no", "maybe", "YES"]
    rows = [response(n, text, "tuned", reference="yes" if n < 3 else "no") for n, text in enumerate(texts)]
    write_rows(run_dir / "responses/tuned.jsonl", rows)
    result = judge(LabelJudge(type="label"), ["tuned"], run_dir)
    assert result["models"]["tuned"]["mean"] == 25.0
    details = [row["details"] for row in read_rows(run_dir / "scores/tuned.jsonl")]
    assert [each["given"] for each in details] == ["yes", "no", None, "yes"]
    found = summary(run_dir)["classification"]["tuned"]
    # yes: once right of 2 given and 3 expected; no: never right of 1 given and 1 expected.
    assert found["f1"] == {"yes": pytest.approx(2 / 5), "no": 0.0}
    assert (found["accuracy"], found["macro_f1"]) == (0.25, pytest.approx(0.2))
    assert found["micro_f1"] == pytest.approx(2 * 1 / (3 + 4))
    assert found["confusion"] == {"no": {"yes": 1}, "yes": {"no": 1, "yes": 1, "": 1}}
    judge(ReferenceJudge(), ["tuned"], run_dir, strict=True)
    assert not (run_dir / "judge/summary.json").exists()


def test_a_jury_is_the_mean_of_its_members(run_dir):
    def strict_judge(body, number):
        return completion(json.dumps({"score": fair_score(body["messages"][0]["content"]) // 2}))

    with Endpoint() as fair_one, Endpoint(strict_judge) as strict_one:
        jury = JuryJudge(type="jury", judges=[config_of(fair_one), config_of(strict_one, repeats=2)])
        result = judge(jury, ["tuned"], run_dir)
        judge(jury, ["tuned"], run_dir)
        assert len(strict_one.bodies) == NUM_CHECKS + 24
    assert result["models"]["tuned"]["mean"] == 75.0
    (row, *_) = read_rows(run_dir / "scores/tuned.jsonl")
    assert row["details"]["scores"] == [100.0, 50.0]
    assert len(summary(run_dir)["members"]) == 2


def test_a_budget_ends_the_stage_and_the_rest_is_asked_later(run_dir):
    with Endpoint() as endpoint:
        with pytest.raises(EvaluationError, match=r"stopped at judge.max_calls \(40\): 40 of 53 missing verdicts"):
            judge(config_of(endpoint, max_calls=40), ["base", "tuned"], run_dir)
        judge(config_of(endpoint, max_calls=40), ["base", "tuned"], run_dir)
        assert len(endpoint.bodies) == NUM_CHECKS + 24


def test_an_estimate_asks_nobody_and_holds(run_dir):
    with Endpoint() as endpoint:
        config = config_of(endpoint, prompt_price=1.0, reply_price=10.0)
        found = estimate(config, ["base", "tuned"], run_dir)["api m"]
        assert endpoint.bodies == [] and not (run_dir / "judge").exists()
        assert found["calls"] == {"low": NUM_CHECKS + 24, "expected": NUM_CHECKS + 24, "high": 2 * (NUM_CHECKS + 24)}
        judge(config, ["base", "tuned"], run_dir)
        characters = sum(len(body["messages"][0]["content"]) for body in endpoint.bodies)
        assert found["prompt_tokens"]["expected"] == pytest.approx(characters / 4)
        expected = (found["prompt_tokens"]["expected"] * 1 + found["reply_tokens"]["expected"] * 10) / 1e6
        assert found["cost"]["expected"] == pytest.approx(expected)
        assert found["cost"]["low"] < found["cost"]["expected"] < found["cost"]["high"]
        # What was really spent: the endpoint counts 100 and 5 tokens a call.
        assert summary(run_dir)["spent"]["cost"] == pytest.approx((NUM_CHECKS + 24) * (100 * 1 + 5 * 10) / 1e6)
        assert estimate(config, ["base", "tuned"], run_dir)["api m"]["calls"]["high"] == 0
    assert estimate(ReferenceJudge(), ["base", "tuned"], run_dir) == {}


def test_killed_at_half_only_the_rest_is_asked(run_dir):
    write_responses(run_dir, num=60, tuned=lambda n: f"cat{n} naps{n}")
    with Endpoint(latency_s=0.05) as endpoint:
        config = config_of(endpoint)
        script = (
            "import sys; from pathlib import Path; from evaluation.config import ApiJudge; "
            "from evaluation.judge import judge; "
            "judge(ApiJudge.model_validate_json(sys.argv[1]), ['tuned'], Path(sys.argv[2]))"
        )
        command = [sys.executable, "-c", script, config.model_dump_json(), str(run_dir)]
        process = subprocess.Popen(command, cwd=REPOSITORY)
        scores = run_dir / "scores/tuned.jsonl"
        deadline = time.monotonic() + 60
        while not scores.exists() or scores.read_bytes().count(b"\n") < 30:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with scores.open("ab") as file:
            file.write(b'{"id": "torn')
        kept = scores.read_bytes().count(b"\n")
        assert 30 <= kept < 60
        time.sleep(0.2)
        before = len(endpoint.bodies)
        result = judge(config, ["tuned"], run_dir)
        assert len(endpoint.bodies) - before == 60 - kept
    assert result["models"]["tuned"]["reused"] == kept
    assert len({row["id"] for row in read_rows(scores)}) == len(read_rows(scores)) == 60


def test_an_endpoint_that_dies_and_comes_back(run_dir):
    def dying(body, number):
        return web.json_response({}, status=503) if number > 40 else fair(body, number)

    with Endpoint(dying) as endpoint:
        with pytest.raises(EvaluationError, match="requests in a row failed"):
            judge(config_of(endpoint), ["base", "tuned"], run_dir)
        endpoint.answer = fair
        before = len(endpoint.bodies)
        judge(config_of(endpoint), ["base", "tuned"], run_dir)
        assert len(endpoint.bodies) - before == NUM_CHECKS + 24 - 40
