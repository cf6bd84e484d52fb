"""What the small files of a base's folder show is named before anything is loaded."""

import json
import struct

import pytest

from trainer.base_problems import WITHOUT_ADAPTERS, base_problems
from trainer.config import ExportConfig, FullTuning, LoraTuning

LORA = LoraTuning(method="lora")


@pytest.fixture
def folder(tmp_path):
    """A sound folder: a configuration and one tensor of 8 bytes."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    write_weights(tmp_path / "model.safetensors")
    return tmp_path


def write_weights(path, num_bytes=8):
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def found(folder, tuning=None, *, merge=False, **where):
    return "\n".join(
        base_problems(
            folder, tuning or FullTuning(), ExportConfig(merge=merge), **({"served": True, "on_gpu": False} | where)
        )
    )


def test_a_sound_folder_has_no_problem(folder):
    assert found(folder) == found(folder, LORA) == ""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "weights are quantized already (gptq;"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weights are quantized already (fp8;"),
        ({"text_config": {"model_type": "x"}, "vision_config": {"a": 1}}, "more than text (text_config, vision_config"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"lm_head_multiplier": 0.04}, "scales its scores (lm_head_multiplier"),
        ({"output_router_logits": True}, "asks for a loss on its router"),
        ({"model_type": None}, "names no model_type"),
    ],
)
def test_a_configuration_that_cannot_be_tuned_is_named(folder, values, words):
    set_config(folder, **values)
    assert words in found(folder)


def test_an_adapter_is_not_a_base_and_names_its_own(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    assert found(folder).startswith("is an adapter of owner/base (adapter_config.json), not a model")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_file_that_is_no_json_object_is_named(folder, name, text):
    (folder / name).write_text(text)
    assert f"{name} can't be read" in found(folder)


def test_shards_that_a_cut_download_left_out_are_named(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert found(folder) == ("has no model-2.safetensors (1 files of weights are missing): download it again")
    assert found(folder, cached=True) == ""  # the hub's cache: what is missing will be downloaded


def test_weights_that_are_cut_or_no_weights_are_named(folder):
    path = folder / "model.safetensors"
    write_weights(path, num_bytes=3)
    assert "model.safetensors has" in found(folder)
    path.write_bytes(b"")
    assert "cut short or no safetensors file (0 bytes)" in found(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n")
    assert "pointer of Git LFS" in found(folder)
    path.write_bytes(struct.pack("<Q", 4) + b"oops")
    assert "has no header" in found(folder)


def test_an_adapter_that_vllm_cannot_serve_is_refused_with_the_way_out(folder):
    set_config(folder, architectures=["GPT2LMHeadModel"])
    assert "serves no adapters beside GPT2LMHeadModel: set export.merge: true" in found(folder, LORA)
    assert found(folder) == found(folder, LORA, merge=True) == found(folder, LORA, served=False) == ""


def test_an_adapter_beside_experts_is_served_on_gpus_only(folder):
    set_config(folder, num_local_experts=8)
    assert "a mixture of experts on GPUs only: set export.merge: true" in found(folder, LORA)
    assert "set tuning.targets to [k_proj, o_proj, q_proj, v_proj], or" in found(folder, LORA, on_gpu=True)
    attention = LoraTuning(method="lora", targets=("q_proj", "v_proj"))
    assert found(folder, attention, on_gpu=True) == found(folder) == ""


@pytest.mark.slow  # imports vLLM
def test_the_architectures_without_adapters_are_those_of_vllm():
    from vllm.model_executor.models import supports_lora
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS, ModelRegistry

    known = WITHOUT_ADAPTERS & _TEXT_GENERATION_MODELS.keys()
    assert known == WITHOUT_ADAPTERS
    for name in sorted(known | {"LlamaForCausalLM", "Gemma2ForCausalLM"}):
        loaded = ModelRegistry._try_load_model_cls(name)
        assert supports_lora(loaded) == (name not in WITHOUT_ADAPTERS), name
