"""The export check tells another model from another rounding; the answers are transformers' here, vLLM's elsewhere."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
)

from trainer.errors import TrainerError
from trainer.export.agreement import (
    LIMITS,
    Place,
    beyond_rounding,
    compare_with_vllm,
    computing_in_fp32,
    differing_adapter,
    differing_answers,
    differing_tokenizer,
    measure,
    refuse_disagreement,
)
from trainer.export.check import Served, fit_context, last_words

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.2}
PROMPTS = [[(7 * number + place) % 256 for place in range(12)] for number in range(16)]


def build(config, dtype=torch.bfloat16) -> PreTrainedModel:
    """A model with random weights, none of them an identity: norms and biases too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def adapted(model, **settings):
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, **settings), autocast_adapter_dtype=False)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    return tuned.eval()


FAMILIES = {
    "llama": lambda: build(LlamaConfig(**SIZES)),
    "tied": lambda: build(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: build(Qwen2Config(**SIZES)),
    "gpt2": lambda: build(GPT2Config(**GPT2)),
    "gemma2": lambda: build(Gemma2Config(**SIZES, head_dim=16)),
    "phi3": lambda: build(Phi3Config(**SIZES | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2})),
    "moe": lambda: build(Qwen2MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2)),
    "lora": lambda: adapted(build(LlamaConfig(**SIZES)), target_modules="all-linear"),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fp32_on_16_bit_weights_is_fp32(family):
    model = FAMILIES[family]()
    wide = copy.deepcopy(model).float()
    ids = torch.tensor([PROMPTS[0]])
    before = model(input_ids=ids).logits
    expected = wide(input_ids=ids).logits
    with computing_in_fp32(model):
        found = model(input_ids=ids).logits
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(before.float(), expected, atol=1e-3)  # so the wide weights made the difference
    assert torch.equal(model(input_ids=ids).logits, before)


def test_weights_are_narrow_again_after_an_error():
    model = build(LlamaConfig(**SIZES))
    with pytest.raises(IndexError), computing_in_fp32(model):
        model(input_ids=torch.tensor([[10_000]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# --- decisions ------------------------------------------------------------------------------------


@torch.no_grad()
def answers_of(model, tokenizer, prompts=PROMPTS, num_tokens=16) -> Served:
    """What vLLM would give, had it this model: greedy answers with the five likeliest tokens of each place."""
    ids = torch.tensor(prompts)
    likeliest, logprobs = [], []
    for _ in range(num_tokens):
        top = model(input_ids=ids).logits[:, -1].float().log_softmax(-1).topk(5)
        likeliest.append(top.indices)
        logprobs.append(top.values)
        ids = torch.cat([ids, top.indices[:, :1]], 1)
    sides = (ids[:, -num_tokens:], torch.stack(likeliest, 1), torch.stack(logprobs, 1))
    answers = [
        {"as_served": chosen, "token_ids": chosen, "likeliest": others, "logprobs": values}
        for chosen, others, values in zip(*(side.tolist() for side in sides), strict=True)
    ]
    texts = [tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids for ids in prompts]
    config = type(model.config)
    settings_class = f"{config.__module__}.{config.__name__}"
    return Served(answers, model.config.to_dict(), settings_class, None, {"chat_template": None, "token_ids": texts})


def disagreements(model, tokenizer, served, precision="bf16", prompts=PROMPTS):
    return compare_with_vllm(model, tokenizer, prompts, served, stops=set(), precision=precision)["disagreements"]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("num_prompts", [1, 2, 16])
def test_other_kernels_of_the_same_model_pass(tiny_tokenizer, precision, num_prompts):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    model = build(LlamaConfig(**SIZES), dtype)
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    prompts, num_tokens = fit_context(PROMPTS[:num_prompts], 256)
    served = answers_of(other, tiny_tokenizer, prompts, min(num_tokens, 32))
    assert disagreements(model, tiny_tokenizer, served, precision, prompts) == []


def scaled(name, factor):
    def spoil(model):
        model.get_parameter(name).data *= factor

    return spoil


def swap_layers(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


FAULTS = {
    "layers swapped": swap_layers,
    "a bias lost": scaled("model.layers.1.self_attn.q_proj.bias", 0),
    "attention scale": scaled("model.layers.1.self_attn.q_proj.weight", 0.5),
    "head lost": lambda model: model.lm_head.weight.data.normal_(0, 0.2),
    "a norm lost": lambda model: model.model.norm.weight.data.fill_(1),
}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("fault", FAULTS)
def test_another_model_is_refused_by_its_numbers(tiny_tokenizer, fault, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    model = build(Qwen2Config(**SIZES), dtype)
    other = copy.deepcopy(model)
    FAULTS[fault](other)
    found = disagreements(model, tiny_tokenizer, answers_of(other, tiny_tokenizer), precision)
    assert any("on average (limit" in words for words in found)


def test_other_prompts_are_refused_by_their_numbers(tiny_tokenizer):
    model = build(LlamaConfig(**SIZES))
    served = answers_of(model, tiny_tokenizer, [ids[:-3] for ids in PROMPTS])
    assert any("on average" in words for words in disagreements(model, tiny_tokenizer, served))


def test_a_setting_is_named_though_the_numbers_agree(tiny_tokenizer):
    model = build(LlamaConfig(**SIZES))
    served = answers_of(model, tiny_tokenizer)
    served = replace(served, settings=served.settings | {"rms_norm_eps": 1e-5})
    (words,) = disagreements(model, tiny_tokenizer, served)
    assert words == "the setting rms_norm_eps is 1e-06 and 1e-05 (transformers first, vLLM second)"
    own_class = replace(served, settings_class="vllm.transformers_utils.configs.Llama")  # with defaults of its own
    assert disagreements(model, tiny_tokenizer, own_class) == []
    own_class.answers[0]["logprobs"][0][0] += 90.0
    assert "rms_norm_eps" in disagreements(model, tiny_tokenizer, own_class)[0]


def test_the_number_is_named_with_its_limit_and_place(tiny_tokenizer):
    model = build(LlamaConfig(**SIZES))
    served = answers_of(model, tiny_tokenizer)
    served.answers[3]["logprobs"][5][0] += 90.0
    numbers = compare_with_vllm(model, tiny_tokenizer, PROMPTS, served, stops=set(), precision="bf16")
    assert numbers["num_tokens"] == 16 * 16 * 5
    assert numbers["largest_difference"] == pytest.approx(90, abs=1)
    assert numbers["mean_difference"] > numbers["mean_limit"]
    (words,) = numbers["disagreements"]
    assert "on average (limit" in words
    assert "prompt 3, token 5, where vLLM chose" in words


def test_numbers_that_are_not_finite_are_refused(tiny_tokenizer):
    model = build(LlamaConfig(**SIZES))
    served = answers_of(model, tiny_tokenizer)
    served.answers[0]["logprobs"][0][4] = float("nan")
    numbers = compare_with_vllm(model, tiny_tokenizer, PROMPTS, served, stops=set(), precision="bf16")
    assert any("nan" in words and "prompt 0, token 0" in words for words in numbers["disagreements"])
    assert numbers["mean_difference"] is None
    json.dumps(numbers, allow_nan=False)


RECORDED = json.loads((Path(__file__).parent / "measured.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RECORDED)
def test_what_a_pretrained_model_gave_is_decided_right(name):
    """Recorded by tests/benchmarks/export_check.py: of each place the gap, vLLM's five differences and the five own."""
    precision, is_honest = RECORDED[name]["precision"], RECORDED[name]["honest"]
    places = [Place(0, 0, 0, 0, gap, sides[:5], sides[5:]) for gap, *sides in RECORDED[name]["places"]]
    measured = measure(places, LIMITS[precision])
    assert (beyond_rounding(measured) == []) is is_honest
    if is_honest and precision == "bf16":
        assert measured.largest_difference > 0.25  # so one token's difference can't decide


def test_a_single_near_tie_does_not_decide():
    """An ordinary LoRA of a pretrained model in bf16: one token of 256 differed by 0.261 nats."""
    ordinary = Place(0, 0, 1, 1, 0.0, [0.02, 0.05, 0.06, 0.05, 0.06], [0.02, 0.05, 0.05, 0.06, 0.06])
    tie = replace(ordinary, gap=0.261, served=[0.261, *ordinary.served[1:]])
    assert beyond_rounding(measure([tie] + [ordinary] * 255, LIMITS["bf16"])) == []
    far = replace(tie, gap=5.0)
    (words,) = beyond_rounding(measure([far] + [ordinary] * 255, LIMITS["bf16"]))
    assert words.startswith("vLLM chose a token that is 5 nats less likely than the likeliest (limit ")


# --- what is no number ----------------------------------------------------------------------------


def served_answer(**changes):
    answer = {"as_served": [5, 6, 2], "token_ids": [5], "likeliest": [[5, 6]], "logprobs": [[-0.1, -2.0]]}
    return Served([answer | changes], {}, "", None, {"chat_template": None, "token_ids": []})


@pytest.mark.parametrize(
    ("changes", "stops", "words"),
    [
        ({}, {2}, []),
        ({"as_served": [5, 2, 6]}, {2}, ["prompt 0, token 1: vLLM goes on after the stop token 2"]),
        ({"as_served": [5, 6]}, {2}, ["prompt 0: vLLM ends after 2 tokens without a stop token"]),
        ({"as_served": list(range(10, 26))}, {2}, []),  # as long as it may be
        ({"as_served": [5, 6]}, set(), []),  # its stops are not known
        (
            {"logprobs": [[-2.0, -0.1]]},
            {2},
            ["prompt 0, token 0: vLLM did not choose the token that is likeliest to itself"],
        ),
    ],
)
def test_an_answer_that_is_not_as_it_should_be_is_named(changes, stops, words):
    assert differing_answers(served_answer(**changes), stops) == words


def test_a_module_without_its_adapter_is_named():
    model = adapted(build(LlamaConfig(**SIZES)), target_modules=["q_proj", "v_proj"])
    names = [f"model.layers.{layer}.self_attn.{part}" for layer in range(3) for part in ("q_proj", "v_proj")]
    assert differing_adapter(model, replace(served_answer(), adapter_modules=names)) == []
    found = differing_adapter(model, replace(served_answer(), adapter_modules=names[:-1]))
    assert found == ["vLLM does not apply the adapter on 1 of 6 modules: model.layers.2.self_attn.v_proj"]
    assert "on 6 of 6" in differing_adapter(model, replace(served_answer(), adapter_modules=[]))[0]
    renamed = [f"language_model.{name}" for name in names]
    assert differing_adapter(model, replace(served_answer(), adapter_modules=renamed)) == []


def test_another_tokenizer_or_template_is_named(tiny_tokenizer):
    text = "Say a."
    ids = tiny_tokenizer(text).input_ids
    same = replace(served_answer(), tokenizer={"chat_template": None, "token_ids": [ids]})
    assert differing_tokenizer(tiny_tokenizer, [text], same) == []
    other = replace(same, tokenizer={"chat_template": "{{ messages }}", "token_ids": [[1, *ids]]})
    assert differing_tokenizer(tiny_tokenizer, [text], other) == [
        "vLLM reads another chat template",
        "vLLM tokenizes the text of prompt 0 otherwise",
    ]


def test_a_refusal_names_the_way_out():
    refuse_disagreement([])
    with pytest.raises(TrainerError) as error:
        refuse_disagreement(["the setting a is 1 and 2", "b"])
    words = str(error.value)
    assert "the setting a is 1 and 2; b." in words
    for way in ("export.on_disagreement: warn", "checkpoint is kept", "resumes at export", "export.vllm_prompts: 0"):
        assert way in words


def test_few_prompts_are_followed_for_longer():
    assert fit_context([[1]] * 16, None)[1] == 16
    assert fit_context([[1]] * 2, None)[1] == 128
    prompts, num_scored = fit_context([list(range(100)), [7]], 64)
    assert num_scored == 32
    assert prompts == [list(range(68, 100)), [7]]


def test_an_error_repeats_a_bounded_end():
    words = last_words("\n".join(f"{number} {'x' * 10_000}" for number in range(100)))
    assert len(words.splitlines()) == 15
    assert len(words) < 10_000
    assert words.splitlines()[-1].startswith("99 ")
