"""Generation on real vLLM engines over Ray Data, on the CPU, against the models' own logits."""

import json
from collections import Counter

import pytest
import ray
import torch
from aiohttp import web
from peft import PeftModel
from pydantic import ValidationError
from transformers import LlamaForCausalLM

from evaluation.config import ApiModel, GenerationConfig, ModelSource, VllmJudge
from evaluation.errors import EvaluationError
from evaluation.generate import generate
from evaluation.judge import judge
from evaluation.judges.forms import form_of
from evaluation.judges.prompts import neutralise
from evaluation.models import family_of, fingerprint_folder, render_as_chat, respell
from evaluation.prompts import Prompt
from evaluation.rows import read_rows, write_rows
from evaluation.vllm_cluster import EngineSpec, Request, complete, shares
from tests.evaluation import tiny_models
from tests.evaluation.judges.endpoint import Endpoint, completion

NUM_PROMPTS = 40
CONFIG = GenerationConfig(max_tokens=12, dtype="float32", cpu_cache_gib=0.1)


SPOKEN = tiny_models.spoken_ids()


def prompt_ids(number: int) -> list[int]:
    return [1, *(SPOKEN[(number * step * 7 + step) % len(SPOKEN)] for step in range(1, 10 + number % 7))]


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = tiny_models.build(root / "base")
    # The second model stops at a token that it is sure to say early: the third one of its answer to the first prompt.
    stop = tiny_models.greedy(LlamaForCausalLM.from_pretrained(base), prompt_ids(0), 3)[-1]
    stopping = tiny_models.build(root / "stopping", stop_token_ids=(2, stop))
    return {
        "base": base,
        "stopping": stopping,
        "adapter": tiny_models.build_adapter(base, root / "adapter"),
        "stop": stop,
    }


@pytest.fixture(scope="module")
def models(folders):
    base = str(folders["base"])
    return {
        "base": ModelSource(path=base),
        "tuned": ModelSource(path=base, adapter=str(folders["adapter"])),
        "stopping": ModelSource(path=str(folders["stopping"])),
    }


def write_test_set(run_dir, num=NUM_PROMPTS, **changes):
    rows = [
        {
            "id": f"r{number}",
            "category": "c",
            "messages": [{"role": "user", "content": f"question {number}"}],
            "prompt": f"question {number}",
            "prompt_token_ids": prompt_ids(number),
            "reference": "answer",
        }
        for number in range(num)
    ]
    rows[1]["prompt_token_ids"] = [1] + [SPOKEN[0]] * 127  # as long as the model: no room for an answer
    rows[2] |= changes
    write_rows(run_dir / "data/test.jsonl", rows)
    return rows


@pytest.fixture(scope="module")
def finished(cluster, folders, models, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    write_test_set(run_dir)
    return run_dir, generate(CONFIG, run_dir, models)


def responses(run_dir, name):
    return read_rows(run_dir / "responses" / f"{name}.jsonl")


def test_every_row_is_there_once_in_order_in_one_state(finished):
    run_dir, result = finished
    for name in ("base", "tuned", "stopping"):
        rows = responses(run_dir, name)
        assert [row["id"] for row in rows] == [f"r{number}" for number in range(NUM_PROMPTS)]
        assert Counter(row["state"] for row in rows) == {"generated": NUM_PROMPTS - 1, "too_long": 1}
        assert "128 prompt tokens" in rows[1]["cause"] and rows[1]["response"] is None
        assert result["models"][name]["generated"] == NUM_PROMPTS - 1
    models = json.loads((run_dir / "responses/models.json").read_text())
    assert models["base"]["family"] == "llama"
    assert models["base"]["fingerprint"] != models["tuned"]["fingerprint"] != models["stopping"]["fingerprint"]


@pytest.mark.parametrize("name", ["base", "tuned", "stopping"])
def test_the_engine_says_what_the_models_logits_say(finished, folders, name):
    run_dir, _ = finished
    model = LlamaForCausalLM.from_pretrained(folders["stopping" if name == "stopping" else "base"])
    if name == "tuned":
        model = PeftModel.from_pretrained(model, folders["adapter"])
    stops = (2, folders["stop"]) if name == "stopping" else (2,)
    tokenizer = tiny_models.tokenizer()
    for number in (0, 3, 7, 20):
        expected = tiny_models.greedy(model, prompt_ids(number), 12, stops)
        row = responses(run_dir, name)[number]
        ended = expected[-1] in stops
        assert row["num_response_tokens"] == len(expected)
        assert row["finish_reason"] == ("stop" if ended else "length")
        text = tokenizer.decode(expected[:-1] if ended else expected, skip_special_tokens=True)
        assert row["response"] == text


def test_the_models_differ_and_one_stops(finished):
    run_dir, result = finished
    base, tuned, stopping = (responses(run_dir, name) for name in ("base", "tuned", "stopping"))
    assert sum(a["response"] != b["response"] for a, b in zip(base, tuned, strict=True)) > NUM_PROMPTS / 2
    assert stopping[0]["finish_reason"] == "stop"
    assert stopping[0]["num_response_tokens"] <= 3 < base[0]["num_response_tokens"]
    assert result["models"]["base"]["cut_at_the_limit"] > 0


def test_only_what_is_missing_is_generated(finished, cluster, models):
    run_dir, _ = finished
    only = {"stopping": models["stopping"]}
    again = generate(CONFIG, run_dir, only)
    assert again["models"]["stopping"]["reused"] == NUM_PROMPTS - 1
    assert again["models"]["stopping"]["wall_s"] == 0.0
    path = run_dir / "responses/stopping.jsonl"
    before = responses(run_dir, "stopping")
    # As a kill leaves it: rows in the order they finished, some missing, the last one torn. And one prompt changes.
    kept = [before[number] | {"response": "kept as it was"} for number in (30, 4, 2)]
    write_rows(path, kept)
    with path.open("ab") as file:
        file.write(b'{"id": "r9", "respo')
    write_test_set(run_dir, prompt_token_ids=prompt_ids(99))
    resumed = generate(CONFIG, run_dir, only)
    rows = responses(run_dir, "stopping")
    assert resumed["models"]["stopping"]["reused"] == 2
    assert [row["id"] for row in rows] == [f"r{number}" for number in range(NUM_PROMPTS)]
    assert [rows[number]["response"] == "kept as it was" for number in (30, 4, 2)] == [True, True, False]
    unchanged = [number for number in range(NUM_PROMPTS) if number not in (30, 4, 2)]
    assert [rows[number] for number in unchanged] == [before[number] for number in unchanged]
    write_test_set(run_dir)


def test_two_engines_share_the_rows_and_one_bad_row_fails_itself(cluster, folders):
    spec = EngineSpec(str(folders["base"]), dtype="float32", cpu_cache_gib=0.1, engines=2)
    sampling = {"temperature": 0.0, "max_tokens": 3}
    requests = [Request(str(number), prompt_ids(number), sampling) for number in range(40)]
    requests[7] = Request("7", [1] * 500, sampling)
    answers = {answer.key: answer for answer in complete(spec, requests)}
    assert set(answers) == {str(number) for number in range(40)}
    assert {key for key, answer in answers.items() if answer.text is None} == {"7"}
    assert "128" in answers["7"].cause
    assert sorted(shares(answer.serial for answer in answers.values())) in ([19, 20], [20, 19])


@pytest.mark.slow
def test_a_cache_too_small_for_the_model_names_the_setting(cluster, tmp_path):
    model = tiny_models.build(tmp_path / "long", max_positions=8192)
    # Two layers of 64 numbers, twice (keys, values), in 4 bytes: 1 KiB a token, and 8 MiB for 8,192 of them.
    spec = EngineSpec(str(model), dtype="float32", cpu_cache_gib=4 / 1024, max_model_len=8192, section="judge")
    with pytest.raises(
        EvaluationError, match=r"a sequence of 8192 tokens needs .* Set judge\.cpu_cache_gib: 0\.02, or"
    ):
        list(complete(spec, [Request("a", [1], {"max_tokens": 1})]))


def test_a_vllm_judge_gives_integers_only(finished, cluster, folders, tmp_path_factory):
    run_dir, _ = finished
    model = tiny_models.build(tmp_path_factory.mktemp("judge") / "judge", seed=5, max_positions=2048)
    config = VllmJudge(type="vllm", model=str(model), dtype="float32", cpu_cache_gib=0.1, self_test=False,
                       min_scored=0.9, max_answer_tokens=64)  # fmt: skip
    result = judge(config, ["base", "tuned"], run_dir)
    for name in ("base", "tuned"):
        rows = read_rows(run_dir / "scores" / f"{name}.jsonl")
        scored = [row for row in rows if row["state"] == "scored"]
        assert len(scored) == NUM_PROMPTS - 1
        assert all(row["raw"] == str(int(row["score"])) and 0 <= row["score"] <= 100 for row in scored)
    assert result["models"]["tuned"]["num_prompt_tokens"] > 0
    summary = json.loads((run_dir / "judge/summary.json").read_text())
    assert summary["same_family_as"] == ["base", "tuned", "stopping"] or summary["same_family_as"] == ["stopping"]
    # Everything is there: no engine is started for a second run.
    assert judge(config, ["base", "tuned"], run_dir)["models"]["base"]["reused"] == NUM_PROMPTS - 1


@pytest.mark.slow
def test_a_score_may_be_the_expectation_over_the_judges_probabilities(finished, cluster, tmp_path):
    run_dir, _ = finished
    (tmp_path / "responses").symlink_to(run_dir / "responses")
    folder = tiny_models.build(tmp_path / "judge", seed=3, max_positions=2048, characters="0123456789")
    config = VllmJudge(type="vllm", model=str(folder), dtype="float32", cpu_cache_gib=0.1, self_test=False,
                       min_scored=0.0, max_answer_tokens=64, expectation=True)  # fmt: skip
    judge(config, ["base"], tmp_path)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), tiny_models.tokenizer()
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    form = form_of(config.protocol, expectation=True)
    num_scored = 0
    for row, response in zip(read_rows(tmp_path / "scores/base.jsonl"), responses(run_dir, "base"), strict=True):
        if response["state"] != "generated":
            continue
        text = form.messages(response, 0, "structured", neutralise)[0]["content"]
        ids = tokenizer(f"<|user|>{text}<|assistant|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            probabilities = model(torch.tensor([ids])).logits[0, -1].softmax(-1)[digits]
        if row["state"] == "scored":
            num_scored += 1
            mean = float(probabilities @ torch.arange(10.0) / probabilities.sum())
            assert row["score"] == pytest.approx(100 * mean / 9, abs=0.1)
        else:
            assert float(probabilities.sum()) < 0.51
            assert "of its probability on a grade" in row["cause"]
    assert num_scored > 0


def test_what_cannot_work_is_refused_before_an_engine_starts(cluster, folders, tmp_path):
    write_test_set(tmp_path)
    source = {"base": ModelSource(path=str(folders["base"]))}
    with pytest.raises(EvaluationError, match=r"3 vLLM engines of 1 CPUs each were asked for, and 2 fit"):
        generate(CONFIG.model_copy(update={"engines": 3}), tmp_path, source)
    with pytest.raises(EvaluationError, match="no model can be read"):
        generate(CONFIG, tmp_path, {"base": ModelSource(path=str(tmp_path / "nothing"))})
    with pytest.raises(EvaluationError, match="attention heads of width 16"):
        list(complete(EngineSpec("x", head_dim=16), [Request("a", [1], {})]))
    write_test_set(tmp_path, prompt_token_ids=[1, 100_000])
    with pytest.raises(EvaluationError, match="token 100000 of prompt 'r2' is beyond"):
        generate(CONFIG, tmp_path, source)


def test_a_test_set_must_be_whole(tmp_path):
    with pytest.raises(EvaluationError, match="run `launcher prepare` first"):
        generate(CONFIG, tmp_path, {})
    for change, words in (({"id": "r1"}, "'r1' is there twice"), ({"prompt_token_ids": []}, "no tokens")):
        write_test_set(tmp_path, **change)
        with pytest.raises(EvaluationError, match=words):
            generate(CONFIG, tmp_path, {})


def test_a_further_model_may_have_its_own_chat_template(tmp_path):
    folder = tiny_models.build(tmp_path / "other")
    prompts = [Prompt("a", None, ({"role": "user", "content": "Below"},), "### Below", (9, 9), "x")]
    (prompt,) = render_as_chat(prompts, ModelSource(path=str(folder), prompt="chat"))
    tokenizer = tiny_models.tokenizer()
    user, *below, assistant = prompt.token_ids
    assert tokenizer.convert_ids_to_tokens([user, assistant]) == ["<|user|>", "<|assistant|>"]
    assert tokenizer.decode(below) == "Below"
    assert prompt.text == "### Below"
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(EvaluationError, match="has no chat template"):
        render_as_chat(prompts, ModelSource(path=str(folder), prompt="chat"))


def test_a_model_reads_other_tokens_for_those_it_does_not_have():
    prompts = [Prompt("a", None, (), "### Below", (9, 300, 8, 301), "x")]
    (prompt,) = respell(prompts, {300: (5, 6), 301: ()})
    assert (prompt.token_ids, prompt.text) == ((9, 5, 6, 8), "### Below")
    assert respell(prompts, {}) == prompts


def test_a_further_model_is_a_path_or_an_endpoint_with_a_name_of_its_own():
    endpoint = {"type": "api", "base_url": "http://127.0.0.1:1/v1", "model": "m"}
    models = GenerationConfig.model_validate({"models": {"one": "owner/one", "two": endpoint}}).models
    assert models["one"] == ModelSource(path="owner/one")
    assert models["two"] == ApiModel(**endpoint)
    for wrong, words in (
        ({"base": "x"}, "base is a model of the run itself"),
        ({"x": {"type": "apo"}}, "a path or hub id, or a mapping with path, or one with type: api"),
        ({"x": endpoint | {"base_url": "127.0.0.1:1/v1"}}, "must start with http"),
        ({"x": endpoint | {"base_url": "http://me:secret@host/v1"}}, "must not hold a user"),
    ):
        with pytest.raises(ValidationError, match=words):
            GenerationConfig.model_validate({"models": wrong})


def test_a_model_at_an_endpoint_answers_without_ray(tmp_path):
    write_test_set(tmp_path, num=12)

    def answer(body, number):
        asked = body["messages"][0]["content"]
        if asked == "question 3":
            return web.json_response({"error": {"message": "x", "code": "context_length_exceeded"}}, status=400)
        return web.json_response({}, status=418) if asked == "question 5" else completion(f"an answer to {asked}")

    with Endpoint(answer) as endpoint:
        source = ApiModel(type="api", base_url=endpoint.url, model="owner/Big-7", api_key_env=None, max_retries=0)
        config = CONFIG.model_copy(update={"models": {"big": source}, "temperature": 0.5, "seed": 1})
        counts = generate(config, tmp_path, {})["models"]["big"]
        assert (counts["generated"], counts["too_long"], counts["generation_failed"]) == (10, 1, 1)
        assert counts["num_prompt_tokens"] == 10 * 100  # as the endpoint counts them
        rows = responses(tmp_path, "big")
        assert [row["id"] for row in rows] == [f"r{number}" for number in range(12)]
        assert (rows[0]["response"], rows[0]["finish_reason"]) == ("an answer to question 0", "stop")
        assert (rows[3]["state"], rows[5]["state"]) == ("too_long", "generation_failed")
        assert "HTTP 418" in rows[5]["cause"]
        body = endpoint.bodies[0]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("owner/Big-7", 0.5, 12)
        assert len({body["seed"] for body in endpoint.bodies}) == 12
        # Only what has no answer is asked again; another sampling asks for everything.
        generate(config, tmp_path, {})
        assert len(endpoint.bodies) == 12 + 2
        generate(config.model_copy(update={"seed": 2}), tmp_path, {})
        assert len(endpoint.bodies) == 12 + 2 + 12
    models = json.loads((tmp_path / "responses/models.json").read_text())
    assert (models["big"]["family"], models["big"]["model"]) == ("big", "owner/Big-7")


def test_an_endpoint_can_be_given_the_training_prompt_as_text(tmp_path):
    write_test_set(tmp_path, num=4)
    message = {"choices": [{"index": 0, "finish_reason": "length", "text": " yes"}], "object": "text_completion"}
    with Endpoint(
        lambda body, number: web.json_response(message | {"id": "1", "created": 0, "model": "m"})
    ) as endpoint:
        source = ApiModel(type="api", base_url=endpoint.url, model="m", api_key_env=None, prompt="trained",
                          send_sampling=False)  # fmt: skip
        generate(CONFIG, tmp_path, {"big": source})
    assert {body["prompt"] for body in endpoint.bodies} == {f"question {number}" for number in range(4)}
    assert not any({"temperature", "top_p", "seed", "messages"} & body.keys() for body in endpoint.bodies)
    assert [(row["response"], row["finish_reason"]) for row in responses(tmp_path, "big")] == [(" yes", "length")] * 4


def test_each_sample_is_a_row_with_a_seed_of_its_own(tmp_path):
    write_test_set(tmp_path, num=4)
    with Endpoint(lambda body, number: completion(f"answer {body['seed']}")) as endpoint:
        source = ApiModel(type="api", base_url=endpoint.url, model="m", api_key_env=None)
        config = CONFIG.model_copy(update={"num_samples": 3, "temperature": 1.0})
        counts = generate(config, tmp_path, {"big": source})["models"]["big"]
        rows = responses(tmp_path, "big")
        generate(config.model_copy(update={"num_samples": 4}), tmp_path, {"big": source})
        assert len(endpoint.bodies) == 4 * 3 + 4  # the samples that are there stay
    assert counts["asked"] == 12
    assert [(row["id"], row["sample"]) for row in rows] == [(f"r{n}", sample) for n in range(4) for sample in range(3)]
    assert len({row["response"] for row in rows}) == 12


def test_shares_of_engines():
    assert shares([0, 1, 0, 2, -1]) == [3, 1]
    assert shares([]) == []


@pytest.mark.parametrize(
    ("name", "family"),
    [("meta-llama/Llama-3.1-8B-Instruct", "llama"), ("gpt-5-mini", "gpt"), ("o3", "o3"), ("Qwen3-32B", "qwen")],
)
def test_the_family_of_a_model_at_an_endpoint_is_guessed_by_its_name(name, family):
    assert family_of(name) == family


def test_an_endpoint_that_refuses_everything_is_told_by_its_word_in_the_configuration(tmp_path):
    write_test_set(tmp_path, num=4)
    with Endpoint(lambda body, number: web.json_response({}, status=401)) as endpoint:
        source = ApiModel(type="api", base_url=endpoint.url, model="m", api_key_env=None)
        with pytest.raises(EvaluationError, match=r"HTTP 401.*generation.models.big.api_key_env"):
            generate(CONFIG.model_copy(update={"models": {"big": source}}), tmp_path, {})


def test_samples_need_a_temperature():
    with pytest.raises(ValueError, match="give a temperature"):
        GenerationConfig(num_samples=2)


def test_the_fingerprint_sees_every_file_and_large_ones_by_blocks(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    first = fingerprint_folder(tmp_path)
    (tmp_path / "b").write_bytes(b"")
    second = fingerprint_folder(tmp_path)
    large = bytearray(65 * 2**20)
    (tmp_path / "b").write_bytes(large)
    third = fingerprint_folder(tmp_path)
    large[-1] = 1
    (tmp_path / "b").write_bytes(large)
    assert len({first, second, third, fingerprint_folder(tmp_path)}) == 4
