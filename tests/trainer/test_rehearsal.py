"""Export is rehearsed on a base in whatever state hubs have it: fixed and noted, or refused with the reason."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.trainer.families import FAMILIES, build
from tests.trainer.test_export import prepare, trained, write_checkpoint
from trainer.config import TrainerConfig
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import TrainerError
from trainer.export.folder import fix_generation
from trainer.export.rehearsal import rehearse
from trainer.export.stage import export

LORA = {"method": "lora", "rank": 4}
QUICK = ("gpt2", "mixtral")


@pytest.fixture
def base(tmp_path, tiny_base):
    """A folder of a tiny Llama with its tokenizer, to be brought into a state."""
    return shutil.copytree(tiny_base, tmp_path / "hub" / "base")


def change(path, **values):
    """Set keys of a JSON file; None takes a key away."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def config_for(base, tuning=None, template="alpaca", **sections):
    method = tuning or {"method": "full"}
    values = {
        "model": {"name_or_path": str(base)},
        "data": {"path": "x.json", "template": template, "packing": method["method"] != "prompt"},
        "tuning": method,
    }
    return TrainerConfig.model_validate(values | sections)


def notes_on(base, tuning=None, template="alpaca", **sections):
    config = config_for(base, tuning, template, **sections)
    return rehearse(config, base.parent, load_tokenizer(config.model, config.data))


def refusal(base, *arguments, **options):
    with pytest.raises(TrainerError) as caught:
        notes_on(base, *arguments, **options)
    return str(caught.value)


METHODS = [
    {"method": "full"},
    {"method": "freeze", "last_layers": 1, "head": True},
    LORA,
    LORA | {"dora": True, "rslora": True, "targets": ["q_proj"]},
    LORA | {"init": "orthogonal"},
    {"method": "qlora", "rank": 4},
    {"method": "prompt", "num_tokens": 4, "init_text": "Answer:"},
]


@pytest.mark.parametrize("tuning", METHODS)
def test_a_sound_base_gives_no_note(base, tuning):
    assert notes_on(base, tuning) == []
    if "lora" in tuning["method"]:
        assert notes_on(base, tuning, export={"merge": True}) == []


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_no_family_is_refused_by_mistake(tmp_path, tiny_tokenizer, family):
    base = build(family, tiny_tokenizer, tmp_path / "base")
    for tuning in ({"method": "full"}, LORA, {"method": "freeze", "last_layers": 1, "head": True}):
        assert notes_on(base, tuning) == []
    assert notes_on(base, LORA, export={"merge": True}) == []


# --- generation_config.json ------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [{"method": "full"}, LORA])
def test_sampling_that_cannot_be_saved_is_fixed_and_noted(base, tuning):
    change(base / "generation_config.json", do_sample=None, temperature=0.6, top_p=0.9)
    assert notes_on(base, tuning) == [
        "generation_config.json: do_sample is set to true, as temperature (0.6), top_p (0.9) can have an effect only "
        "then"
    ]


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": None, "top_p": None}),
        ({"temperature": 0.6}, {"do_sample": True}),
        ({"early_stopping": True, "length_penalty": 2.0}, {"early_stopping": None, "length_penalty": None}),
        ({"temperature": 0.6, "length_penalty": 2.0}, {"do_sample": True, "length_penalty": None}),
        ({"output_scores": True}, {"output_scores": None}),
        ({"do_sample": True, "temperature": 0.6}, {}),
    ],
)
def test_what_has_no_effect_is_left_out(tmp_path, values, changed):
    generation = GenerationConfig(**values)
    notes = fix_generation(generation)
    generation.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: written.get(name) for name in values | changed} == values | changed
    assert len(notes) == len(changed)


@pytest.mark.parametrize(
    "values",
    [{"num_return_sequences": 4, "do_sample": False}, {"cache_implementation": "none such"}, {"max_new_tokens": 0}],
)
def test_generation_settings_that_cannot_be_read_are_refused(base, values):
    change(base / "generation_config.json", **values)
    assert "generation_config.json that can't be read: ValueError" in refusal(base)


def test_a_base_without_generation_config_or_pad_token_passes(base):
    (base / "generation_config.json").unlink()
    change(base / "config.json", pad_token_id=None)
    change(base / "tokenizer_config.json", pad_token=None)
    assert notes_on(base) == []


def test_the_export_of_such_a_base_ends_with_its_notes_on_record(tmp_path, tiny_base, tiny_tokenizer):
    config = prepare(tmp_path, tiny_base, tiny_tokenizer)
    path = tmp_path / "base" / "generation_config.json"
    change(path, do_sample=False, temperature=0.6, eos_token_id=[256, 9])
    write_checkpoint(tmp_path, trained(AutoModelForCausalLM.from_pretrained(tiny_base)), step=1)
    (note,) = export(config, tmp_path)["notes"]
    assert note.startswith("generation_config.json: temperature (0.6) is left out")
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert written["do_sample"] is False
    assert written["eos_token_id"] == [256, 9]


# --- config.json -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": None},
        {"dtype": None, "torch_dtype": "float16"},
        {"eos_token_id": [256, 3], "temperature": 0.7, "do_sample": False},
        {"pretraining_tp": 2, "something_new": {"a": 1}, "use_cache": False},
        {"architectures": None},
    ],
)
def test_older_and_unknown_keys_pass(base, values):
    change(base / "config.json", **values)
    assert notes_on(base) == notes_on(base, LORA) == []


def test_code_of_the_hub_is_not_run_and_left_out(base):
    change(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert notes_on(base) == [
        "config.json: auto_map is left out, because the code that it names is not exported and not needed"
    ]
    change(base / "config.json", model_type="new_kind", auto_map={"AutoConfig": "modeling_x.C"})
    assert "custom code" in refusal(base)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "new_kind"}, "does not recognize this architecture"),
        ({"rope_scaling": {"type": "none such", "factor": 2.0}, "rope_parameters": None}, "can't be loaded: KeyError"),
        ({"pad_token_id": 9999}, "can't be loaded: AssertionError"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"dtype": "float17"}, "float17"),
        ({"num_hidden_layers": 3}, "has no weights for model.layers.2.input_layernorm.weight"),
        ({"vocab_size": 290}, "config.json asks for [290, 32]: the two are not of one model"),
    ],
)
def test_a_configuration_that_is_not_the_weights_own_is_refused(base, values, words):
    change(base / "config.json", **values)
    assert words in refusal(base)


# --- weights ---------------------------------------------------------------------------------------


def rewrite(base, *, without=(), **more):
    path = base / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in without}
    save_file(tensors | more, path, metadata={"format": "pt"})


def test_a_tensor_that_is_missing_is_refused_by_name(base):
    rewrite(base, without=["model.norm.weight"])
    assert "has no weights for model.norm.weight, which config.json asks for" in refusal(base)


def test_tensors_that_the_class_has_no_use_for_are_noted(base):
    rewrite(base, **{"mtp.weight": torch.zeros(3)})
    assert notes_on(base) == ["the base's files hold mtp.weight, unused by its class: not exported"]


def test_a_head_that_is_tied_in_words_only_is_refused(base):
    change(base / "config.json", tie_word_embeddings=True)
    assert "tie_word_embeddings to false" in refusal(base)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(base, **{"lm_head.weight": embedding.clone()})
    assert notes_on(base) == []


# --- tokenizer -------------------------------------------------------------------------------------

CHAT = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"


def test_templates_in_files_and_by_name_pass(base):
    (base / "chat_template.jinja").write_text(CHAT)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("T" + CHAT)
    assert notes_on(base, template="chat") == []
    shutil.rmtree(base / "additional_chat_templates")
    (base / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "T" + CHAT}]
    change(base / "tokenizer_config.json", chat_template=named)
    assert notes_on(base, template="chat") == []


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "the tokenizer's own template can't be used"),
        ([{"name": "tool_use", "template": CHAT}], "none of them is the default: choose one of tool_use"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_the_others(base, template, reason):
    change(base / "tokenizer_config.json", chat_template=template)
    assert reason in refusal(base, template="chat")
    assert notes_on(base) == []


def test_a_special_token_beyond_the_embedding_is_refused(base, tiny_tokenizer):
    tokenizer = type(tiny_tokenizer).from_pretrained(base)
    tokenizer.add_tokens([f"<{number}>" for number in range(100)])
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(base)
    assert "the tokenizer's eos_token '<end>' has the id 358" in refusal(base)


def test_targets_that_the_model_has_not_are_refused(base):
    assert "tuning.targets: nothing fits no layer of the model" in refusal(base, LORA | {"targets": ["nothing"]})
    assert "tuning.last_layers is 3, the model has 2" in refusal(base, {"method": "freeze", "last_layers": 3})


@pytest.mark.parametrize("name", ["my model: v1 #2 [x]", "- 'a' {b: c}", "modèle", "a%20b%s"])
def test_an_odd_name_of_the_base_is_no_obstacle(base, name):
    assert notes_on(base.rename(base.parent / name), LORA) == []
