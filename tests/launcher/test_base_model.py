from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from launcher import base_model, plan
from launcher.config import RunConfig
from launcher.errors import ConfigError
from tests.trainer.conftest import tiny_base, tiny_tokenizer  # noqa: F401 - fixtures

LORA = {"method": "lora"}
UNSEEN = plan.FirstLook()  # of a check that is not about rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What looks like a Llama: a configuration and a file of weights that holds none."""
    folder = tmp_path / "base"
    folder.mkdir()
    set_config(folder, model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=64, num_attention_heads=2)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return folder


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | values))


def make(folder: Path, **sections: Any) -> RunConfig:
    rows = folder.parent / "rows.json"
    rows.write_text("[]")
    tree = {"run": {"name": "small"}, "model": {"name_or_path": str(folder)}, "data": {"path": str(rows)}}
    return RunConfig.model_validate(tree | {"cluster": {"device": "cpu"}} | sections)


def test_plan_refuses_what_the_small_files_show(folder: Path) -> None:
    plan.check(make(folder), look=UNSEEN)
    set_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConfigError, match=r"model\.name_or_path = .*/base: its weights are quantized already \(gptq"):
        plan.check(make(folder), look=UNSEEN)


def test_an_adapter_is_refused_only_where_vllm_would_serve_it(folder: Path) -> None:
    set_config(folder, architectures=["GPT2LMHeadModel"])
    with pytest.raises(ConfigError, match="no adapters beside GPT2LMHeadModel"):
        plan.check(make(folder, tuning=LORA), look=UNSEEN)
    plan.check(make(folder, tuning=LORA), ["prepare", "train"], look=UNSEEN)
    plan.check(make(folder, tuning=LORA, export={"vllm_prompts": 0}), ["prepare", "train", "export"], look=UNSEEN)
    plan.check(make(folder, tuning=LORA, export={"merge": True}), look=UNSEEN)


def test_shards_that_the_hub_s_cache_lacks_are_left_to_the_download(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert len(base_model.problems(make(folder), ["train"], on_gpu=False)) == 1
    monkeypatch.setattr(base_model, "model_folder", lambda *_: folder)
    cached = make(folder, model={"name_or_path": "owner/base"})
    assert base_model.problems(cached, ["train"], on_gpu=False) == []
    assert base_model.rehearse(cached, tmp_path / "run", ["train"]) == []


def test_nothing_is_rehearsed_where_no_stage_needs_it(folder: Path, tmp_path: Path) -> None:
    assert base_model.rehearse(make(folder), tmp_path / "run", ["judge", "report"]) == []


def test_a_base_that_can_not_be_loaded_is_refused_before_a_run_starts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer could be loaded from .*/base(.|\n)*nothing was started"):
        base_model.rehearse(make(folder), tmp_path / "run", ["prepare", "train"])


@pytest.mark.slow  # loads transformers twice
def test_what_export_will_fix_is_told_before_a_run_starts(tiny_base: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    config = make(folder)
    assert base_model.rehearse(config, tmp_path / "run", ["train"]) == [
        "export: generation_config.json: do_sample is set to true, as temperature (0.6) can have an effect only then"
    ]
    set_config(folder, num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"has no weights for model\.layers\.2\.input_layernorm\.weight"):
        base_model.rehearse(config, tmp_path / "run", ["export"])
