"""Thoughts in generated responses: split from the answer, kept, counted; unclosed ones are failures with a cause."""

import os
from itertools import pairwise

import pytest
import ray
import torch
from aiohttp import web
from transformers import LlamaForCausalLM

from evaluation import generate as stage
from evaluation.config import ApiModel, GenerationConfig, ModelSource, ReferenceJudge
from evaluation.errors import EvaluationError
from evaluation.generate import generate
from evaluation.judge import judge
from evaluation.prompts import read_prompts
from evaluation.rows import read_rows, write_rows
from evaluation.vllm_cluster import Completion
from tests.evaluation import tiny_models
from tests.evaluation.judges.endpoint import Endpoint, completion

CONFIG = GenerationConfig(max_tokens=40, dtype="float32", cpu_cache_gib=0.1)
THINK = {"open": "<think>\n", "close": "\n</think>\n\n", "opened": False, "plain": ""}
HARMONY = {
    "open": "<|channel|>analysis<|message|>",
    "close": "<|end|><|start|>assistant<|channel|>final<|message|>",
    "opened": False,
    "plain": "<|channel|>final<|message|>",
}
TAGS = ("<think>", "</think>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>")


def build(folder, *, tags=TAGS):
    """Write a tiny model whose tokenizer has the tags as special tokens."""
    tiny_models.build(folder)
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tags)})
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_test_set(run_dir, *thinking, reference="42"):
    rows = []
    for number, fields in enumerate(thinking):
        question = {"role": "user", "content": f"question {number}"}
        row = {"id": f"r{number}", "category": None, "messages": [question], "prompt": f"question {number}",
               "prompt_token_ids": [1, 10 + number], "reference": reference}  # fmt: skip
        rows.append(row if fields is None else row | {"thinking": fields})
    write_rows(run_dir / "data/test.jsonl", rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return folder, build(folder)


@pytest.fixture
def engine(model, monkeypatch):
    """An engine that says what it is told to: texts by the last token of the prompt, `</s>` ends them."""
    _, tokenizer = model
    asked = []

    def complete(spec, requests):
        for request in requests:
            asked.append(request)
            ids = tokenizer(engine.says[request.token_ids[-1] - 10], add_special_tokens=False)["input_ids"]
            ids = ids[: request.sampling["max_tokens"]]
            spoken = ids[:-1] if ids and ids[-1] == 2 else ids
            # As vLLM does: special tokens are left out unless the request asks for them.
            text = tokenizer.decode(spoken, skip_special_tokens=request.sampling.get("skip_special_tokens", True))
            yield Completion(request.key, text, tuple(ids), serial=0)

    engine = type("Engine", (), {"says": [], "asked": asked})()
    monkeypatch.setattr(stage, "complete", complete)
    monkeypatch.setattr(stage, "engines_that_fit", lambda spec: spec.engines)
    return engine


def answers(run_dir, name="tuned"):
    return read_rows(run_dir / f"responses/{name}.jsonl")


def test_base_and_tuned_are_split_by_the_rows_tags(model, engine, tmp_path):
    folder, _ = model
    write_test_set(tmp_path, THINK, THINK | {"opened": True}, HARMONY, HARMONY, THINK, None)
    engine.says = [
        "<think>\nadd\n</think>\n\n42</s>",
        "add\n</think>\n\n42</s>",
        f"{HARMONY['open']}add{HARMONY['close']}42</s>",
        f"{HARMONY['plain']}42</s>",
        "it is <s>41</s>",  # without a thought, as a base may answer; <s> is a token here
        "<think>add</think>42</s>",
    ]
    models = dict.fromkeys(("base", "tuned"), ModelSource(path=str(folder)))
    counts = generate(CONFIG, tmp_path, models)["models"]
    assert counts["base"]["generated"] == counts["tuned"]["generated"] == 6
    for name in models:
        rows = answers(tmp_path, name)
        assert [row["response"] for row in rows] == ["42", "42", "42", "42", "it is 41", "add42"]
        assert [row.get("thought") for row in rows] == ["add", "add", "add", None, None, None]
        assert [row.get("thought_closed") for row in rows] == [True, True, True, None, None, None]
        assert {row["finish_reason"] for row in rows} == {"stop"}
        # A row whose template writes no thoughts is the row that it was.
        assert not {"thought", "thought_closed"} & rows[5].keys()
    judge(ReferenceJudge(), ["base", "tuned"], tmp_path)
    scores = [row["score"] for row in read_rows(tmp_path / "scores/tuned.jsonl")]
    assert scores[:4] == [100.0] * 4


def test_letters_that_spell_a_special_token_stay(model, tmp_path):
    folder, tokenizer = model
    write_test_set(tmp_path, THINK)
    letters = [token for word in ("<", "s", ">", "old") for token in tokenizer(word)["input_ids"]]
    tokens = tokenizer("<think>a</think>")["input_ids"] + letters
    spelled = Completion("", tokenizer.decode(tokens), tuple(tokens), serial=0)
    task = stage._plan("tuned", ModelSource(path=str(folder)), read_prompts(tmp_path), CONFIG, tmp_path)
    row = stage._outcome(spelled, task, task.prompts[0], CONFIG)
    assert (row["thought"], row["response"]) == ("a", "<s>old")


def test_rows_without_thinking_ask_and_answer_as_before(model, engine, tmp_path):
    folder, _ = model
    write_test_set(tmp_path, None)
    engine.says = ["<think>\nadd\n</think>\n\n 42</s>"]
    generate(CONFIG, tmp_path, {"tuned": ModelSource(path=str(folder))})
    assert answers(tmp_path)[0]["response"] == "\nadd\n\n\n 42"
    assert "skip_special_tokens" not in engine.asked[0].sampling


def test_an_unclosed_thought_is_a_failure_with_its_cause(model, engine, tmp_path):
    folder, _ = model
    write_test_set(tmp_path, THINK, THINK | {"opened": True}, THINK)
    engine.says = ["<think>" + "hm " * 90, "hm</s>", "<think>add</think>42</s>"]
    source = {"tuned": ModelSource(path=str(folder))}
    counts = generate(CONFIG, tmp_path, source)["models"]["tuned"]
    assert (counts["generated"], counts["generation_failed"], counts["cut_at_the_limit"]) == (1, 2, 1)
    cut, stopped, _ = answers(tmp_path)
    assert cut["cause"] == "the thought was not closed within generation.max_tokens=40: raise it"
    assert "the model stopped inside it" in stopped["cause"]
    for row in (cut, stopped):
        assert (row["state"], row["response"], row["thought_closed"]) == ("generation_failed", None, False)
        assert row["thought"].startswith("hm")
    with pytest.raises(EvaluationError, match=r"2 generation_failed.*1 x the thought was not closed within generation"):
        judge(ReferenceJudge(), ["tuned"], tmp_path)
    assert [row["state"] for row in read_rows(tmp_path / "scores/tuned.jsonl")] == ["generation_failed"] * 2 + [
        "scored"
    ]
    # Greedy, it would not come to an end the second time either; with more room it may.
    assert generate(CONFIG, tmp_path, source)["models"]["tuned"]["reused"] == 3
    assert generate(CONFIG.model_copy(update={"max_tokens": 41}), tmp_path, source)["models"]["tuned"]["reused"] == 0


def test_a_model_with_little_room_names_its_own_limit(model, engine, tmp_path):
    folder, _ = model
    write_test_set(tmp_path, THINK)
    engine.says = ["<think>hm"]
    generate(CONFIG, tmp_path, {"tuned": ModelSource(path=str(folder))})
    assert answers(tmp_path)[0]["cause"] == (
        "the thought was not closed within the model's limit of 128 tokens, prompt included: raise it"
    )


def test_a_model_with_its_own_template_has_its_own_tags(model, engine, tmp_path):
    folder, tokenizer = model
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][-1] }}<|channel|><think>")
    engine.says = {tokenizer("<think>")["input_ids"][0] - 10: "add</think>42</s>"}
    write_test_set(tmp_path, None, HARMONY)
    generate(CONFIG, tmp_path, {"other": ModelSource(path=str(folder), prompt="chat")})
    assert [(row["thought"], row["response"]) for row in answers(tmp_path, "other")] == [("add", "42")] * 2


def test_a_row_with_broken_tags_is_refused(tmp_path):
    for broken in ("<think>", {"open": "<think>"}, {"open": " ", "close": "</think>"}):
        write_test_set(tmp_path, THINK, broken)
        with pytest.raises(EvaluationError, match=r"row 2: thinking is .* run `launcher prepare` again"):
            read_prompts(tmp_path)


def test_a_thought_in_the_reference_is_no_part_of_it(tmp_path):
    for reference in ("42", "<think>\nadd\n</think>\n\n42"):
        write_test_set(tmp_path, THINK, reference=reference)
        assert read_prompts(tmp_path)[0].reference == "42"


@pytest.mark.parametrize(
    ("message", "thought", "response"),
    [
        ({"content": "42", "reasoning_content": "add"}, "add", "42"),
        ({"content": "42", "reasoning": "add"}, "add", "42"),
        ({"content": [{"type": "thinking", "thinking": "add"}, {"type": "text", "text": "42"}]}, "add", "42"),
        ({"content": "<think>add</think>\n\n42"}, "add", "42"),
        ({"content": None, "reasoning_content": "add"}, "add", None),
        ({"content": "<think>add"}, "add", None),
    ],
)
def test_thoughts_of_a_model_at_an_endpoint_are_apart(tmp_path, message, thought, response):
    write_test_set(tmp_path, THINK | {"opened": True}, None)
    told = {"choices": [{"index": 0, "message": message, "finish_reason": "MAX_TOKENS"}]}
    with Endpoint(lambda body, number: web.json_response(told)) as endpoint:
        source = ApiModel(type="api", base_url=endpoint.url, model="m", api_key_env=None, max_retries=0)
        generate(CONFIG, tmp_path, {"big": source})
    for row in answers(tmp_path, "big"):
        assert (row["thought"], row["response"]) == (thought, response)
        assert (row["thought_closed"], row["finish_reason"]) == (response is not None, "length")
        if response is None:
            assert row["cause"] == "the thought was not closed within generation.max_tokens=40: raise it"


def test_an_endpoint_may_leave_the_opened_tag_out(tmp_path):
    write_test_set(tmp_path, THINK | {"opened": True})
    told = {"choices": [{"index": 0, "finish_reason": "stop", "text": "add\n</think>\n\n42"}]}
    with Endpoint(lambda body, number: web.json_response(told)) as endpoint:
        source = ApiModel(type="api", base_url=endpoint.url, model="m", api_key_env=None, prompt="trained")
        generate(CONFIG, tmp_path, {"big": source})
    assert [(row["thought"], row["response"]) for row in answers(tmp_path, "big")] == [("add", "42")]


def test_a_rows_template_arguments_go_to_the_endpoint(tmp_path):
    write_test_set(tmp_path, None, None)
    rows = read_rows(tmp_path / "data/test.jsonl")
    write_rows(tmp_path / "data/test.jsonl", [rows[0], rows[1] | {"template_kwargs": {"enable_thinking": False}}])
    with Endpoint(lambda body, number: completion("42")) as endpoint:
        source = ApiModel(type="api", base_url=endpoint.url, model="m", api_key_env=None)
        generate(CONFIG, tmp_path, {"big": source})
    sent = {body["messages"][0]["content"]: body.get("chat_template_kwargs") for body in endpoint.bodies}
    assert sent == {"question 0": None, "question 1": {"enable_thinking": False}}


def script(folder, tokenizer, chains):
    """Make a model say given tokens: each chain's token is followed by the next one, whatever came before."""
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = torch.nn.functional.normalize(torch.randn_like(model.model.embed_tokens.weight), dim=-1)
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.zero_()
        for chain in chains:
            for token, follower in pairwise(chain):
                model.lm_head.weight[follower] += embedding[token]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_vllm_leaves_special_tags_to_split_at(tmp_path):
    folder = tmp_path / "tiny"
    tokenizer = build(folder)
    ids = tokenizer.convert_tokens_to_ids
    think, closed, start = ids("<think>"), ids("</think>"), ids("<|start|>")
    a, b, c, d = (ids(letter) for letter in "abcd")
    x, y = 10, 11
    # From x: <think> a b </think> c <|start|> d </s>. From y, the last token of another prompt: <think> without an end.
    script(folder, tokenizer, [(x, think, a, b, closed, c, start, d, 2), (y, ids("e"), ids("f"), ids("e"))])
    write_test_set(tmp_path, THINK, THINK | {"opened": True}, None)
    rows = read_rows(tmp_path / "data/test.jsonl")
    write_rows(tmp_path / "data/test.jsonl", [*rows[:2], rows[2] | {"prompt_token_ids": [1, x]}])
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        generate(CONFIG, tmp_path, {"tuned": ModelSource(path=str(folder))})
    finally:
        ray.shutdown()
    closed_row, cut_row, plain_row = answers(tmp_path)
    assert (closed_row["thought"], closed_row["response"], closed_row["finish_reason"]) == ("ab", "cd", "stop")
    assert cut_row["thought"] == "ef" * 20
    assert cut_row["cause"] == "the thought was not closed within generation.max_tokens=40: raise it"
    assert (plain_row["response"], "thought" in plain_row) == ("abcd", False)
