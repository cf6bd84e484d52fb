"""model.adapter: a LoRA adapter that is continued, or merged before the weights are trained; or is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launcher.run import answering_models
from tests.launcher.test_base_model import make
from tests.trainer.families import build
from tests.trainer.test_export import loss_on_validation, prepare, trained, write_checkpoint
from tests.trainer.test_rehearsal import change, config_for, notes_on
from trainer.base_files import base_digests
from trainer.base_problems import base_problems
from trainer.config import ExportConfig, FullTuning, LoraTuning, ModelConfig
from trainer.errors import TrainerError
from trainer.export.stage import export
from trainer.tuning import apply_tuning

LORA = {"method": "lora", "rank": 4, "alpha": 16, "targets": ["q_proj", "v_proj"]}


def write_adapter(base: Path, folder: Path, **settings) -> Path:
    """An adapter as PEFT writes it, with weights that change what the base answers."""
    network = AutoModelForCausalLM.from_pretrained(base)
    values = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(network, LoraConfig(**values))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_base):
    return write_adapter(tiny_base, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def adapter(written, tmp_path):
    """A copy of the adapter, to be changed."""
    return shutil.copytree(written, tmp_path / "adapter")


def found(base, adapter, tuning=None, **where):
    method = LoraTuning.model_validate(tuning) if tuning else FullTuning()
    model = ModelConfig(name_or_path=str(base), adapter=str(adapter))
    where = {"served": True, "on_gpu": False, "model": model} | where
    return "\n".join(base_problems(Path(base), method, ExportConfig(), **where))


def test_a_sound_adapter_has_no_problem(tiny_base, adapter):
    assert found(tiny_base, adapter) == found(tiny_base, adapter, LORA) == ""
    assert notes_on(tiny_base, LORA, model={"name_or_path": str(tiny_base), "adapter": str(adapter)}) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter"),
        ({"task_type": "SEQ_CLS"}, "is for SEQ_CLS"),
        ({"use_dora": True}, "is a DoRA adapter"),
        ({"bias": "all"}, "trains biases (bias: all)"),
        ({"modules_to_save": ["lm_head"]}, "holds whole layers beside LoRA (modules_to_save)"),
        ({"trainable_token_indices": [3]}, "holds rows of the embedding"),
        ({"layer_replication": [[0, 2]]}, "repeats layers of its base"),
        ({"target_parameters": ["mlp.experts"]}, "adapts single parameters"),
        ({"init_lora_weights": "pissa"}, "began as pissa"),
        ({"rank_pattern": {"q_proj": 8}}, "has layers of rank 8 (rank_pattern) beside rank 4"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tiny_base, adapter, settings, words):
    change(adapter / "adapter_config.json", **settings)
    assert f"model.adapter = {adapter}: {words}" in found(tiny_base, adapter, LORA)


@pytest.mark.parametrize(
    ("settings", "to_set"),
    [
        ({"rank": 16}, "tuning.rank is 16: set tuning.rank: 4"),
        ({"alpha": 8}, "tuning.alpha is 8: set tuning.alpha: 16"),
        ({"rslora": True}, "tuning.rslora is true: set tuning.rslora: false"),
        ({"targets": "all-linear"}, "tuning.targets is all-linear: set tuning.targets: [q_proj, v_proj]"),
        ({"targets": ["q_proj"]}, "tuning.targets is [q_proj]: set tuning.targets: [q_proj, v_proj]"),
        ({"targets": ["q_proj", "v_proj", "up_proj"]}, "set tuning.targets: [q_proj, v_proj]"),
    ],
)
def test_settings_that_are_not_the_adapter_s_are_refused(tiny_base, adapter, settings, to_set):
    assert to_set in found(tiny_base, adapter, LORA | settings)
    assert found(tiny_base, adapter) == ""  # merged: its settings are its own


def test_an_adapter_on_all_layers_is_all_linear(tiny_base, tmp_path):
    every = write_adapter(tiny_base, tmp_path / "every", target_modules="all-linear")
    assert found(tiny_base, every, LORA | {"targets": "all-linear"}) == ""


def test_an_adapter_of_another_base_is_refused(tmp_path, tiny_base, adapter, tiny_tokenizer):
    other = build("llama", tiny_tokenizer, tmp_path / "other")
    words = "is an adapter of another base"
    assert f"{words} ({tiny_base}): its model.layers.0.self_attn.q_proj has 32 inputs" in found(other, adapter, LORA)
    tensors = load_file(adapter / "adapter_model.safetensors")
    more = {name.replace("layers.1", "layers.7"): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | more, adapter / "adapter_model.safetensors")
    assert f"{words} ({tiny_base}): it has matrices for model.layers.7" in found(tiny_base, adapter, LORA)
    network = AutoModelForCausalLM.from_pretrained(tiny_base)
    with pytest.raises(TrainerError, match=r"only the adapter's file has model\.layers\.7"):
        apply_tuning(network, LoraTuning.model_validate(LORA), "base", "", adapter=str(adapter))


def test_files_that_are_no_adapter_are_refused(tiny_base, adapter, tmp_path):
    assert "no such folder: give a local folder" in found(tiny_base, tmp_path / "owner" / "name")
    assert "adapter_config.json can't be read (no such file)" in found(tiny_base, tiny_base)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "has its weights in adapter_model.bin, and opening that can run code" in found(tiny_base, adapter)


@pytest.mark.parametrize(
    ("tuning", "model", "words"),
    [
        ({"method": "prompt"}, {}, "use lora or full"),
        (LORA | {"dora": True}, {}, "tuning.dora: false"),
        (LORA, {"name_or_path": None, "from_scratch": {}}, "leave adapter out"),
    ],
)
def test_what_can_not_take_an_adapter_is_refused(tuning, model, words):
    with pytest.raises(ValidationError, match=words):
        config_for("base", tuning, model={"name_or_path": "base", "adapter": "x"} | model)


def test_the_base_of_a_folder_of_an_adapter_is_named(adapter):
    problems = base_problems(adapter, FullTuning(), ExportConfig(), served=True, on_gpu=False)
    assert "give the base model as model.name_or_path, and this folder as model.adapter" in problems[0]


# --- tuning ----------------------------------------------------------------------------------------


def run_with(tmp_path, base, tokenizer, adapter, tuning, **sections):
    """A prepared run on the base with the adapter, and the model as it begins."""
    config = prepare(tmp_path, base, tokenizer, tuning=tuning, **sections)
    model = ModelConfig(name_or_path=str(base), adapter=str(adapter))
    config = config.model_copy(update={"model": model})
    network = AutoModelForCausalLM.from_pretrained(base)
    return config, apply_tuning(network, config.tuning, str(base), "", adapter=str(adapter)).eval()


@pytest.mark.parametrize("tuning", [LORA, {"method": "full"}, {"method": "freeze", "last_layers": 1}])
def test_tuning_begins_as_the_base_with_its_adapter(tmp_path, tiny_base, tiny_tokenizer, adapter, tuning):
    _, model = run_with(tmp_path, tiny_base, tiny_tokenizer, adapter, tuning)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    before = loss_on_validation(plain, tmp_path)
    adapted = PeftModel.from_pretrained(plain, adapter).eval()
    expected = loss_on_validation(adapted, tmp_path)
    assert loss_on_validation(model, tmp_path) == pytest.approx(expected, abs=1e-5)
    assert before != pytest.approx(expected, abs=1e-3)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in names) == (tuning is LORA)


@pytest.mark.parametrize("merge", [False, True])
def test_a_continued_adapter_is_exported_on_the_plain_base(tmp_path, tiny_base, tiny_tokenizer, adapter, merge):
    sections = {"export": {"vllm_prompts": 0, "merge": merge}}
    config, model = run_with(tmp_path, tiny_base, tiny_tokenizer, adapter, LORA | {"dropout": 0.1}, **sections)
    weights = trained(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    loss = loss_on_validation(model, tmp_path)
    write_checkpoint(tmp_path, weights, step=2, loss=loss)
    assert export(config, tmp_path)["exported_loss"] == pytest.approx(loss, abs=1e-4)
    loader = AutoModelForCausalLM if merge else AutoPeftModelForCausalLM
    assert loss_on_validation(loader.from_pretrained(tmp_path / "model").eval(), tmp_path) == pytest.approx(
        loss, abs=1e-4
    )
    if not merge:
        settings = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
        assert (settings["base_model_name_or_path"], settings["r"]) == (str(tiny_base), 4)
    digests = base_digests(config.model, tmp_path, weights=True)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= digests.keys()


def test_the_base_answers_with_its_adapter(tiny_base, adapter, tmp_path):
    config = make(tiny_base, model={"name_or_path": str(tiny_base), "adapter": str(adapter)}, tuning=LORA)
    models = answering_models(config, tmp_path)
    assert (models["base"].path, models["base"].adapter) == (str(tiny_base), str(adapter))
    assert models["tuned"].adapter is None
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    assert answering_models(config, tmp_path)["tuned"].adapter == str(tmp_path / "model")
