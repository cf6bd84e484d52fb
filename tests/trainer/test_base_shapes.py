"""Bases in every shape that they come in: trained and exported as they are, or refused with both numbers."""

import json
import shutil
import struct
from functools import partial

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.families import build
from tests.trainer.test_export import trained, write_checkpoint
from tests.trainer.test_rehearsal import change, config_for, notes_on, refusal
from trainer.base_problems import base_problems, num_positions
from trainer.config import ExportConfig, FreezeTuning, LoraTuning
from trainer.data.shards import PackedSplit
from trainer.export.stage import export
from trainer.prepare import prepare

CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def shard(base):
    """Cut the weights into two files with an index."""
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    (base / "model.safetensors").unlink()
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, base / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def set_tokens(base, **tokens):
    change(base / "tokenizer_config.json", **tokens)


def write_bos(base):
    """A tokenizer that puts a begin token before every text, and a template that writes one too."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    number = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    tokenizer.save_pretrained(base)


SHAPES = {
    "plain": lambda base: None,
    "sharded": shard,
    "stops": lambda base: change(base / "generation_config.json", eos_token_id=[256, 9]),
    "pad-is-eos": lambda base: set_tokens(base, pad_token="</s>"),
    "no-pad": lambda base: set_tokens(base, pad_token=None),
    "begin-twice": write_bos,
}


@pytest.fixture
def prepared(tmp_path, tiny_tokenizer):
    """A base in a shape, and a run on it whose rows were prepared; the base's vocabulary is padded: 300 rows."""

    def of(shape, family="llama", tuning=None, **sections):
        base = build(family, tiny_tokenizer, tmp_path / "base")
        (base / "chat_template.jinja").write_text(CHATML)
        shape(base)
        rows = [{"instruction": f"Say {number}", "output": "abcdefgh"[number % 8] * 5} for number in range(40)]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        config = config_for(
            base,
            tuning,
            data={"path": str(tmp_path / "rows.json"), "sequence_length": 96, "template": "chat", "num_processes": 1},
            training={"precision": "fp32"},
            **({"export": {"vllm_prompts": 0}} | sections),
        )
        prepare(config, tmp_path)
        return config, base

    return of


@pytest.mark.parametrize(
    ("shape", "family"), [*((shape, "llama") for shape in SHAPES), ("plain", "llama-tied"), ("sharded", "llama-tied")]
)
def test_a_base_is_prepared_and_exported_as_it_is(prepared, tmp_path, shape, family):
    config, base = prepared(SHAPES[shape], family)
    assert base_problems(base, config.tuning, config.export, served=True, on_gpu=False, model=config.model) == []
    assert notes_on(base, template="chat") == []
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    split = PackedSplit.open(tmp_path / "data" / "train")
    for row in range(split.num_rows):
        ids, labels = split.row_tokens(row)
        assert labels[-1] == ids[-1] == tokenizer.eos_token_id == 256  # the end is learned, whatever pads
        assert (ids == (tokenizer.bos_token_id or -1)).sum() == (shape == "begin-twice")
    write_checkpoint(tmp_path, trained(AutoModelForCausalLM.from_pretrained(base)), step=1)
    export(config, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 300
    assert model.config.tie_word_embeddings == (family == "llama-tied")
    stops = json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == ([256, 9] if shape == "stops" else 256)


def name_templates(base, *, in_folder):
    """A second template, for rows with tools, in either form."""
    if in_folder:
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "tool_use.jinja").write_text("T" + CHATML)
        return
    (base / "chat_template.jinja").unlink()
    both = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "T" + CHATML}]
    change(base / "tokenizer_config.json", chat_template=both)


@pytest.mark.parametrize("in_folder", [True, False])
def test_every_template_of_the_base_is_exported(prepared, tmp_path, in_folder):
    config, base = prepared(partial(name_templates, in_folder=in_folder))
    write_checkpoint(tmp_path, trained(AutoModelForCausalLM.from_pretrained(base)), step=1)
    export(config, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.chat_template == {"default": CHATML, "tool_use": "T" + CHATML}


def add_tokens(base, tokens, **special):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(tokens)
    tokenizer.add_special_tokens(special) if special else None
    tokenizer.save_pretrained(base)


def problems(base, tuning=None, **where):
    asked = {"served": True, "on_gpu": False} | where
    return "\n".join(base_problems(base, tuning or LoraTuning(method="lora"), ExportConfig(), **asked))


@pytest.fixture
def base(tmp_path, tiny_base):
    return shutil.copytree(tiny_base, tmp_path / "hub" / "base")


def test_a_tokenizer_larger_than_the_embedding_is_refused(base):
    add_tokens(base, [f"<{number}>" for number in range(42)])
    assert problems(base) == ""
    add_tokens(base, ["<one>", "<more>"])
    words = "its tokenizer has 302 tokens and its embedding 300 rows: '<one>', '<more>' would have none"
    assert words in problems(base)
    assert "List them in model.new_tokens" in problems(base)
    assert words in refusal(base)


def test_a_token_for_pictures_needs_no_row(base):
    """Gemma 3's text models have one beyond their embedding."""
    add_tokens(base, [f"<{number}>" for number in range(42)])
    add_tokens(base, [], extra_special_tokens=["<image>"])
    assert "'<image>' would have none" in problems(base)
    change(base / "tokenizer_config.json", extra_special_tokens=None, image_token="<image>")
    assert problems(base) == ""


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({}, None),
        ({"max_position_embeddings": 256}, 256),
        ({"n_positions": 128}, 128),
        ({"text_config": {"max_position_embeddings": 64}}, 64),
        ({"max_position_embeddings": 256, "alibi": True}, None),
        ({"max_position_embeddings": 256, "rope_scaling": {"type": "linear", "factor": 4.0}}, 1024),
        ({"max_position_embeddings": 256, "rope_scaling": {"rope_type": "dynamic", "factor": 2}}, 512),
        ({"max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 256),
        (
            {
                "max_position_embeddings": 256,
                "rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 256},
            },
            1024,
        ),
        (
            {
                "max_position_embeddings": 256,
                "rope_scaling": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 32},
            },
            256,
        ),
        ({"max_position_embeddings": 256, "rope_parameters": {"full": {"rope_type": "linear", "factor": 2}}}, 512),
        (
            {
                "model_type": "gemma3_text",
                "max_position_embeddings": 256,
                "rope_scaling": {"rope_type": "linear", "factor": 8},
            },
            256,
        ),
    ],
)
def test_positions_are_counted_as_vllm_counts_them(config, positions):
    assert num_positions(config) == positions


def test_sequences_beyond_the_positions_are_refused(base):
    assert problems(base, sequence_length=256) == ""
    assert "has 256 positions (config.json), and data.sequence_length is 257" in problems(base, sequence_length=257)
    change(base / "config.json", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    assert problems(base, sequence_length=512) == ""


def test_a_rank_that_vllm_can_not_serve_is_refused(base):
    wide = LoraTuning(method="lora", rank=513)
    assert "of rank 512 at most, and tuning.rank is 513: lower it, or set export.merge: true" in problems(base, wide)
    assert problems(base, LoraTuning(method="lora", rank=512)) == problems(base, wide, served=False) == ""
    assert base_problems(base, wide, ExportConfig(merge=True), served=True, on_gpu=False) == []


@pytest.mark.slow  # imports vLLM
def test_the_largest_rank_is_vllm_s():
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    from trainer.base_problems import _LARGEST_RANK

    assert max(get_args(MaxLoRARanks)) == _LARGEST_RANK


def test_targets_that_fit_no_layer_are_refused(base):
    some = LoraTuning(method="lora", targets=("q_proj", "self_attn.k_proj", "query"))
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert f"has no layer that fits query of tuning.targets: its linear layers are {known}" in problems(base, some)
    assert "tuning.targets: query fits no layer" in refusal(base, some.model_dump())
    assert problems(base, LoraTuning(method="lora", targets=("q_proj", "self_attn.k_proj"))) == ""
    assert "has 2 layers, and tuning.last_layers is 3" in problems(base, FreezeTuning(method="freeze", last_layers=3))


def test_a_broken_header_is_reported_once(base):
    (base / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"oops")
    assert problems(base, LoraTuning(method="lora", targets=("x",))).count("\n") == 0
