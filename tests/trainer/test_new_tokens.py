"""model.new_tokens: one token each in rows' text, a row each in the embedding, and whole weights as the export."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.run import answering_models
from tests.launcher.test_base_model import make
from tests.trainer.families import build
from tests.trainer.test_export import trained, write_checkpoint
from tests.trainer.test_rehearsal import base, config_for, notes_on, refusal  # noqa: F401 - a fixture
from trainer.config import DataConfig, ModelConfig
from trainer.data.conversation import BadRowError, Conversation
from trainer.data.fingerprint import fingerprint
from trainer.data.new_tokens import read_new_tokens
from trainer.data.renderer import Renderer
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.errors import TrainerError
from trainer.export.stage import export
from trainer.new_rows import add_rows
from trainer.prepare import prepare
from trainer.tuning import apply_tuning

TOKENS = ["<ask>", "<tell>"]
LORA = {"method": "lora", "rank": 4}
MERGED = {"tuning": LORA, "export": {"merge": True}}


def said(words):
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": "Yes."}]
    return Conversation(id="1", messages=messages, tools=None, category="all")


def with_tokens(folder, *tokens, template="alpaca"):
    return load_tokenizer(
        ModelConfig(name_or_path=str(folder), new_tokens=tokens), DataConfig(path="rows.json", template=template)
    )


def test_a_new_token_is_one_token_of_a_row_s_text(base):  # noqa: F811
    tokenizer = with_tokens(base, *TOKENS)
    (context, _) = Renderer(tokenizer, "assistant").segments(said("Now <ask>why<tell>."))
    assert "Now <ask>why<tell>." in context.text
    ids = tokenizer("<ask>why<tell>", add_special_tokens=False).input_ids
    assert [ids[0], ids[-1]] == [258, 259]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<ask>why<tell>"
    with pytest.raises(BadRowError, match="special token '</s>'"):
        Renderer(tokenizer, "assistant").segments(said("Now </s>"))


def test_a_new_token_of_the_template_is_a_control_token(base):  # noqa: F811
    tokenizer = with_tokens(base, "<|im_start|>", "<|im_end|>", "<ask>", template="chatml")
    assert tokenizer.eos_token == "<|im_end|>"
    Renderer(tokenizer, "assistant").segments(said("Now <ask>"))
    for token in ("<|im_start|>", "<|im_end|>"):
        with pytest.raises(BadRowError, match="special token"):
            Renderer(tokenizer, "assistant").segments(said(f"Now {token}"))


def test_a_scratch_tokenizer_takes_new_tokens_within_its_size():
    tokenizer = train_tokenizer(["abc abc"] * 9, "chatml", 310, TOKENS)
    assert len(tokenizer) <= 310
    assert len(tokenizer("<ask>", add_special_tokens=False).input_ids) == 1


@pytest.mark.parametrize("token", ["</s>", "a"])
def test_a_token_that_the_base_has_is_refused(base, token):  # noqa: F811
    with pytest.raises(TrainerError, match=f"has '{token}' already"):
        with_tokens(base, token)


def test_a_token_without_a_row_is_taken_as_it_is(base):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{number}>" for number in range(42)] + TOKENS})
    tokenizer.save_pretrained(base)
    assert "its tokenizer has 302 tokens and its embedding 300 rows: '<ask>', '<tell>'" in refusal(base)
    assert notes_on(base, model={"name_or_path": str(base), "new_tokens": TOKENS}) == []
    with_tokens(base, *TOKENS).save_pretrained(base.parent / "again")
    tokenizer = AutoTokenizer.from_pretrained(base.parent / "again")
    Renderer(tokenizer, "assistant").segments(said("Now <ask>"))
    with pytest.raises(BadRowError, match="special token '<1>'"):
        Renderer(tokenizer, "assistant").segments(said("Now <1>"))


NAMED = {"new_tokens": TOKENS}


@pytest.mark.parametrize(
    ("model", "sections", "words"),
    [
        ({"new_tokens": ["<a>", "<b>", "<a>"]}, {}, "names '<a>' twice"),
        ({"new_tokens": [""]}, {}, "at least 1 character"),
        ({"new_tokens": [" \n"]}, {}, "white space alone"),
        (NAMED, {"tuning": LORA}, "set export.merge: true"),
        (NAMED, {"tuning": LORA | {"method": "qlora"}}, "set export.merge: true"),
        (NAMED, {"tuning": {"method": "prompt"}}, "use lora or full"),
        (NAMED, {"tuning": {"method": "freeze"}}, "tuning.names"),
        (NAMED | {"adapter": "x"}, {}, "merge the adapter into its base first"),
    ],
)
def test_new_tokens_that_can_not_be_trained_are_refused(model, sections, words):
    method = sections.get("tuning", {"method": "full"})
    rest = {name: value for name, value in sections.items() if name != "tuning"}
    with pytest.raises(ValidationError, match=words):
        config_for("base", method, model={"name_or_path": "base"} | model, **rest)


def test_a_frozen_embedding_is_refused_in_the_rehearsal(base):  # noqa: F811
    model = {"name_or_path": str(base), "new_tokens": TOKENS}
    frozen = {"method": "freeze", "names": ["*.mlp.*"], "head": True}
    assert "model.embed_tokens.weight is not trained" in refusal(base, frozen, model=model)
    assert notes_on(base, frozen | {"names": ["*.embed_tokens.*"]}, model=model) == []


# --- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma3_text"])
def test_new_rows_begin_as_the_mean_of_their_pieces(tmp_path, tiny_tokenizer, family):
    folder = build(family, tiny_tokenizer, tmp_path / "base")
    network = AutoModelForCausalLM.from_pretrained(folder)
    before = [module.weight.detach().clone() for module in (network.get_input_embeddings(), network.lm_head)]
    add_rows(network, {301: (5, 7), 258: ()})
    assert network.config.get_text_config().vocab_size == 304  # 300 is a multiple of 4
    known = [number for number in range(300) if number != 258]
    for module, old in zip((network.get_input_embeddings(), network.lm_head), before, strict=True):
        assert module.weight.shape[0] == 304
        assert torch.allclose(module.weight[301], (old[5] + old[7]) / 2, atol=1e-6)
        assert torch.allclose(module.weight[[258, 300, 303]], old[known].mean(0).expand(3, -1), atol=1e-6)
        assert torch.equal(module.weight[:258], old[:258])
    tied = network.config.get_text_config().tie_word_embeddings
    assert (network.lm_head.weight is network.get_input_embeddings().weight) == tied
    network.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, network.lm_head.weight)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_beside_lora_only_the_new_rows_are_trained(tmp_path, tiny_tokenizer, family):
    network = AutoModelForCausalLM.from_pretrained(build(family, tiny_tokenizer, tmp_path / "base"))
    add_rows(network, {300: (5, 7)})
    config = config_for("base", LORA)
    model = apply_tuning(network, config.tuning, "base", "", new_tokens=[300])
    rows = {name: list(one.shape) for name, one in model.named_parameters() if one.requires_grad and "lora" not in name}
    assert list(rows.values()) == [[1, 64]] * (1 if "tied" in family else 2)
    ids = torch.tensor([[3, 300, 4]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(one.grad.abs().sum() > 0 for name, one in model.named_parameters() if name in rows)


# --- the stages ------------------------------------------------------------------------------------


@pytest.fixture
def prepared(base, tmp_path):  # noqa: F811
    """A run whose rows hold the new tokens, prepared."""

    def of(**sections):
        words = ["<ask>why <tell>so " + "abcdefgh"[number % 8] * 5 for number in range(40)]
        rows = [{"instruction": f"{text} {number}", "output": f"<tell>{text}"} for number, text in enumerate(words)]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        config = config_for(
            base,
            sections.pop("tuning", None),
            model={"name_or_path": str(base), "new_tokens": TOKENS},
            data={"path": str(tmp_path / "rows.json"), "sequence_length": 200, "num_processes": 1, "leaks": "warn"},
            training={"precision": "fp32"},
            **({"export": {"vllm_prompts": 0}} | sections),
        )
        prepare(config, tmp_path)
        return config

    return of


def test_the_base_reads_the_pieces_of_new_tokens(prepared, tmp_path):
    config = prepared()
    run = make(Path(config.model.name_or_path), model=config.model.model_dump())
    models = answering_models(run, tmp_path)
    pieces = read_new_tokens(config.model, tmp_path)
    assert (models["base"].spelled, models["tuned"].spelled) == (pieces, {})


def test_prepare_writes_what_the_base_reads_in_their_place(prepared, tmp_path):
    config = prepared()
    spelled = read_new_tokens(config.model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    assert [tokenizer.decode(pieces) for pieces in spelled.values()] == TOKENS
    assert list(spelled) == [258, 259]
    assert all(258 in json.loads(line)["prompt_token_ids"] for line in (tmp_path / "data" / "test.jsonl").open())
    plain = config.model_copy(update={"model": config.model.model_copy(update={"new_tokens": ()})})
    assert fingerprint(config, config.data) != fingerprint(plain, plain.data)
    (tmp_path / "data" / "new_tokens.json").unlink()
    with pytest.raises(TrainerError, match="run the prepare stage again"):
        read_new_tokens(config.model, tmp_path)


@pytest.mark.parametrize("sections", [{}, MERGED | {"export": {"merge": True, "vllm_prompts": 0}}])
def test_the_export_holds_the_trained_rows_of_new_tokens(prepared, tmp_path, sections):
    config = prepared(**sections)
    network = AutoModelForCausalLM.from_pretrained(config.model.name_or_path)
    spelled = read_new_tokens(config.model, tmp_path)
    add_rows(network, spelled)
    weights = trained(apply_tuning(network, config.tuning, "base", "", new_tokens=tuple(spelled)))
    write_checkpoint(tmp_path, weights, step=3)
    assert export(config, tmp_path)["kind"] == "weights"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [258, 259]
    embedding = model.get_input_embeddings().weight
    (name,) = (name for name in weights if "embed_tokens" in name)
    expected = weights[name] if len(weights[name]) == 2 else weights[name][258:260]
    assert torch.equal(embedding[258:260], expected)
