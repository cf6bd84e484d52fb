"""Export: what lies in run_dir/model is what the checkpoint holds, and it answers as it was trained."""

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.splits import write_split
from trainer import sealed
from trainer.base_files import base_digests
from trainer.config import ExportConfig, FromScratch, TrainerConfig
from trainer.data.shards import PackedSplit
from trainer.data.templates import set_template
from trainer.errors import TrainerError
from trainer.export import stage as export_module
from trainer.export.check import Question, ask_vllm, check_loss, row_by_row_loss
from trainer.export.device import DeviceUse, device_map_of, memory_in_words
from trainer.export.stage import export
from trainer.scratch import build_from_scratch
from trainer.tuning import apply_tuning, keep_weights_trainable_on_cpu, quantization


def write_checkpoint(run_dir, weights, step, loss=None, base=None) -> Path:
    """A checkpoint as two ranks write it: each parameter cut in two in the middle of a row."""
    final = run_dir / "checkpoints" / f"step-{step}"
    partial = final.with_name(final.name + ".partial")
    partial.mkdir(parents=True)
    files = []
    for rank in (0, 1):
        tensors = {}
        for name, weight in weights.items():
            cut = weight.numel() // 3
            start, part = (0, weight.flatten()[:cut]) if rank == 0 else (cut, weight.flatten()[cut:])
            tensors[f"weight/{start}/{name}"] = part
        files.append(sealed.write_tensors(partial / f"rank-{rank}.safetensors", tensors))
    content = {
        "format": 1,
        "progress": {"step": step, "epoch": 0, "step_in_epoch": step, "total_tokens": 1},
        "validation_loss": loss,
        "base": base,
        "parameters": {name: list(weight.shape) for name, weight in weights.items()},
    }
    sealed.seal(partial, final, content, files)
    return final


def prepare(run_dir, base, tokenizer, **sections):
    """A run that was prepared, with a validation split and two test prompts; vLLM is asked only on demand."""
    shutil.copytree(base, run_dir / "base")
    tokenizer = copy.deepcopy(tokenizer)
    set_template(tokenizer, "alpaca")
    tokenizer.save_pretrained(run_dir / "data" / "tokenizer")
    write_split(run_dir / "data" / "validation", 5)
    prompts = [tokenizer(f"Below is instruction {number}.\n### Response:").input_ids for number in range(16)]
    lines = [json.dumps({"id": str(number), "prompt_token_ids": ids}) for number, ids in enumerate(prompts)]
    (run_dir / "data" / "test.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "model": {"from_scratch": {"vocab_size": 300}},
        "data": {"path": "x.json", "packing": False},
        "training": {"precision": "fp32"},
        "export": {"vllm_prompts": 0},
    }
    return TrainerConfig.model_validate(values | sections)


def trained(model):
    """The parameters of a model that are trained, moved away from where they began."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: parameter.detach() + 0.3 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.fixture
def run(tmp_path, tiny_base, tiny_tokenizer):
    """A run that was prepared and trained: configuration, folder, and the trained fp32 weights."""
    config = prepare(tmp_path, tiny_base, tiny_tokenizer)
    return config, tmp_path, trained(AutoModelForCausalLM.from_pretrained(tiny_base))


def test_what_is_exported_is_what_was_trained(run):
    config, run_dir, weights = run
    write_checkpoint(run_dir, {name: weight * 0 for name, weight in weights.items()}, step=3)
    write_checkpoint(run_dir, weights, step=12)
    counts = export(config, run_dir)
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype="auto")
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dict.fromkeys(
        weights, torch.float32
    )
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert counts["checkpoint"] == "step-12"
    assert counts["num_parameters"] == sum(weight.numel() for weight in weights.values())
    assert not list(run_dir.glob("model.*"))


def test_each_use_of_the_device_is_a_process_of_its_own(run):
    config, run_dir, weights = run
    write_checkpoint(run_dir, weights, step=12)
    before, uses = psutil.Process().children(), []  # an earlier test may have left a resource tracker

    def claim():
        uses.append([child for child in psutil.Process().children() if child not in before])

    counts = export(config, run_dir, DeviceUse(claim=claim, apart=True))
    assert uses == [[], []]  # each is claimed when the process before it is gone
    assert counts == export(config, run_dir)


def test_all_files_of_an_export_follow_the_umask(run):
    config, run_dir, weights = run
    write_checkpoint(run_dir, weights, step=1)
    before = os.umask(0o027)
    try:
        export(config, run_dir)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (run_dir / "model").iterdir()} == {0o640}


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_16_bit_training_exports_the_rounded_weights_of_its_forward_pass(run, precision, dtype):
    config, run_dir, weights = run
    write_checkpoint(run_dir, weights, step=1)
    export(config.model_copy(update={"training": config.training.model_copy(update={"precision": precision})}), run_dir)
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype="auto")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, weights[name].to(dtype))


def test_stop_token_template_and_cache_are_set_for_generation(run):
    config, run_dir, weights = run
    write_checkpoint(run_dir, weights, step=1)
    export(config, run_dir)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    trained_with = AutoTokenizer.from_pretrained(run_dir / "data" / "tokenizer")
    messages = [{"role": "user", "content": "Say a."}]
    ask = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(messages, **ask) == trained_with.apply_chat_template(messages, **ask)
    generation = json.loads((run_dir / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    model_config = json.loads((run_dir / "model" / "config.json").read_text())
    assert model_config["use_cache"] is True
    assert model_config["eos_token_id"] == tokenizer.eos_token_id


def test_the_stops_of_the_base_stay_behind_the_trained_one(run):
    config, run_dir, weights = run
    path = run_dir / "base" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [7, 9]}))
    write_checkpoint(run_dir, weights, step=1)
    export(config, run_dir)
    stop = AutoTokenizer.from_pretrained(run_dir / "model").eos_token_id
    assert json.loads((run_dir / "model" / "generation_config.json").read_text())["eos_token_id"] == [stop, 7, 9]


def test_a_second_export_replaces_the_first(run):
    config, run_dir, weights = run
    write_checkpoint(run_dir, weights, step=1)
    export(config, run_dir)
    write_checkpoint(run_dir, {name: weight + 1 for name, weight in weights.items()}, step=2)
    assert export(config, run_dir)["step"] == 2
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    assert torch.equal(model.get_input_embeddings().weight, weights["model.embed_tokens.weight"] + 1)


def test_without_a_checkpoint_it_says_what_to_do(run):
    config, run_dir, _ = run
    with pytest.raises(TrainerError, match="no checkpoint to export: train first"):
        export(config, run_dir)


def test_a_checkpoint_of_another_model_is_refused_and_names_the_parameter(run):
    config, run_dir, weights = run
    weights["model.norm.weight"] = torch.ones(33)
    write_checkpoint(run_dir, weights, step=1)
    with pytest.raises(TrainerError, match=r"model\.norm\.weight of shape \[33\], which is of shape \[32\]"):
        export(config, run_dir)


def test_a_tensor_that_was_written_wrong_is_named_and_no_model_appears(run, monkeypatch):
    config, run_dir, weights = run
    write_checkpoint(run_dir, weights, step=1)
    write = export_module._write

    def write_wrong(model, tokenizer, folder):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
        write(model, tokenizer, folder)

    monkeypatch.setattr(export_module, "_write", write_wrong)
    with pytest.raises(TrainerError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* is not what was trained"):
        export(config, run_dir)
    assert not (run_dir / "model").exists()


def test_a_setting_that_was_written_wrong_is_named_and_no_model_appears(run, monkeypatch):
    config, run_dir, weights = run
    write_checkpoint(run_dir, weights, step=1)
    write = export_module._write

    def write_wrong(model, tokenizer, folder):
        write(model, tokenizer, folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"rms_norm_eps": 0.25}))

    monkeypatch.setattr(export_module, "_write", write_wrong)
    with pytest.raises(TrainerError, match=r"rms_norm_eps is 1e-06 and 0\.25 \(trained first, exported second\)"):
        export(config, run_dir)
    assert not (run_dir / "model").exists()


@pytest.fixture(scope="module")
def servable_base(tmp_path_factory, tiny_tokenizer):
    """A model whose heads are as wide as vLLM's CPU attention wants them: 32."""
    folder = tmp_path_factory.mktemp("servable") / "base"
    sizes = FromScratch(vocab_size=300, hidden_size=64, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1)
    build_from_scratch(sizes, tiny_tokenizer, seed=0, folder=folder)
    return folder


# --- adapters -------------------------------------------------------------------------------------

LORA = {"method": "lora", "rank": 4, "alpha": 16.0}
QLORA = LORA | {"method": "qlora"}


def tuned(tmp_path, base, tokenizer, tuning, **export_section):
    """A prepared run of an adapter, and the model as it was trained, in evaluation mode."""
    config = prepare(tmp_path, base, tokenizer, tuning=tuning, export={"vllm_prompts": 0} | export_section)
    loaded = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization(config.tuning, torch.float32), dtype=torch.float32
    )
    keep_weights_trainable_on_cpu(loaded)
    model = apply_tuning(loaded, config.tuning, str(base), str(tmp_path / "data" / "tokenizer"))
    weights = trained(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    return config, model.eval(), weights


def loss_on_validation(model, run_dir):
    return row_by_row_loss(model, PackedSplit.open(run_dir / "data" / "validation"))


@pytest.mark.parametrize("tuning", [LORA, LORA | {"dora": True}, {"method": "prompt", "num_tokens": 3}])
def test_an_adapter_is_exported_as_peft_writes_it(tmp_path, tiny_base, tiny_tokenizer, tuning):
    config, model, weights = tuned(tmp_path, tiny_base, tiny_tokenizer, tuning)
    loss = loss_on_validation(model, tmp_path)
    write_checkpoint(tmp_path, weights, step=4, loss=loss)
    counts = export(config, tmp_path)
    assert counts["kind"] == "adapter"
    assert counts["exported_loss"] == pytest.approx(loss, abs=1e-5)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model")  # finds the base by itself
    assert loss_on_validation(again.eval(), tmp_path) == pytest.approx(loss, abs=1e-5)
    assert loss_on_validation(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path) != pytest.approx(
        loss, abs=1e-4
    )
    assert not (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("tuning", [LORA, {"method": "prompt", "num_tokens": 3}])
def test_an_adapter_trained_in_bf16_is_exported_rounded(tmp_path, tiny_base, tiny_tokenizer, tuning):
    config, _, weights = tuned(tmp_path, tiny_base, tiny_tokenizer, tuning)
    write_checkpoint(tmp_path, weights, step=4)
    bf16 = config.training.model_copy(update={"precision": "bf16"})
    assert export(config.model_copy(update={"training": bf16}), tmp_path)["dtype"] == "bf16"


@pytest.mark.parametrize("tuning", [LORA, LORA | {"dora": True}, QLORA])
def test_a_merged_adapter_is_a_model_with_the_same_loss(tmp_path, servable_base, tiny_tokenizer, tuning):
    """QLoRA's is merged into the weights that its 4 bits spell, not into the ones before quantisation."""
    config, model, weights = tuned(tmp_path, servable_base, tiny_tokenizer, tuning, merge=True)
    loss = loss_on_validation(model, tmp_path)
    write_checkpoint(tmp_path, weights, step=4, loss=loss)
    counts = export(config, tmp_path)
    assert counts["kind"] == "weights"
    assert counts["loss_before_merge"] == pytest.approx(loss, abs=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loss_on_validation(merged.eval(), tmp_path) == pytest.approx(loss, abs=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_a_qlora_adapter_tells_its_loss_on_four_bits_and_as_it_is_served(tmp_path, servable_base, tiny_tokenizer):
    config, model, weights = tuned(tmp_path, servable_base, tiny_tokenizer, QLORA)
    loss = loss_on_validation(model, tmp_path)
    write_checkpoint(tmp_path, weights, step=4, loss=loss)
    counts = export(config, tmp_path)
    assert counts["exported_loss"] == pytest.approx(loss, abs=1e-5)
    assert counts["served_loss"] != pytest.approx(loss, abs=1e-5)
    assert counts["served_loss"] == pytest.approx(loss, abs=0.1)


def test_an_adapter_whose_scale_was_written_wrong_is_refused(tmp_path, tiny_base, tiny_tokenizer, monkeypatch):
    config, _, weights = tuned(tmp_path, tiny_base, tiny_tokenizer, LORA)
    write_checkpoint(tmp_path, weights, step=4)
    write = export_module._write

    def write_wrong(model, tokenizer, folder):
        write(model, tokenizer, folder)
        content = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(content | {"lora_alpha": 15}))

    monkeypatch.setattr(export_module, "_write", write_wrong)
    with pytest.raises(TrainerError, match=r"adapter's lora_alpha is 16\.0 and 15"):
        export(config, tmp_path)


def test_an_adapter_is_not_exported_beside_another_base(tmp_path, tiny_base, tiny_tokenizer):
    config, _, weights = tuned(tmp_path, tiny_base, tiny_tokenizer, LORA)
    write_checkpoint(tmp_path, weights, step=4, base=base_digests(config.model, tmp_path, weights=True))
    path = tmp_path / "base" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(TrainerError, match=r"trained on: model\.safetensors changed since"):
        export(config, tmp_path)


def test_merging_what_has_no_adapter_is_refused(run):
    config, run_dir, _ = run
    with pytest.raises(TrainerError, match=r"tuning\.method full has nothing to merge"):
        export(config.model_copy(update={"export": ExportConfig(merge=True)}), run_dir)


def test_a_model_is_spread_over_gpus_by_whole_layers(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    places = device_map_of(model, {0: size, 1: size})
    assert set(places.values()) == {0, 1}
    assert not [name for name in places if name.startswith("model.layers.") and name.count(".") > 2]
    with pytest.raises(TrainerError, match=r"export\.tensor_parallel_size.*raise it"):
        device_map_of(model, {0: size // 8, 1: size // 8})


def test_want_of_gpu_memory_names_the_setting():
    with pytest.raises(TrainerError, match=r"allocate 2 GiB\. export\.tensor_parallel_size is 2; with 4"):  # noqa: SIM117
        with memory_in_words(ExportConfig(tensor_parallel_size=2)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


# --- the gate -------------------------------------------------------------------------------------


def test_row_by_row_loss_is_the_token_mean_of_the_cross_entropy(run, tiny_base):
    _, run_dir, _ = run
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    split = PackedSplit.open(run_dir / "data" / "validation")
    total, count = 0.0, 0
    for row in range(split.num_rows):
        ids, labels = (torch.from_numpy(array.astype("int64")) for array in split.row_tokens(row))
        targets = int((labels[1:] != -100).sum())
        total += model(input_ids=ids[None], labels=labels[None]).loss.item() * targets
        count += targets
    assert row_by_row_loss(model, split) == pytest.approx(total / count, rel=1e-5)


def test_a_folder_with_another_loss_than_the_trainer_s_is_refused(run):
    config, run_dir, weights = run
    write_checkpoint(run_dir, weights, step=1, loss=1.0)
    with pytest.raises(TrainerError, match=r"the trainer measured 1\.00000 .* its attention differs"):
        export(config, run_dir)
    assert not (run_dir / "model").exists()
    check_loss(None, 3.0, 0.001)
    check_loss(2.9995, 3.0, 0.001)
    with pytest.raises(TrainerError):
        check_loss(3.0, float("nan"), 0.001)


def agrees(counts) -> bool:
    return (
        counts["disagreements"] == []
        and counts["mean_difference"] <= counts["mean_limit"]
        and counts["far_share"] <= counts["far_share_limit"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_vllm_agrees_with_the_exported_weights(tmp_path, servable_base, tiny_tokenizer, precision):
    sections = {"training": {"precision": precision}, "deepspeed": {"stage": 1}, "export": {"vllm_prompts": 2}}
    config = prepare(tmp_path, servable_base, tiny_tokenizer, **sections)
    write_checkpoint(tmp_path, trained(AutoModelForCausalLM.from_pretrained(servable_base)), step=1)
    counts = export(config, tmp_path)["vllm"]
    assert agrees(counts)
    assert counts["num_prompts"] == 2
    assert counts["num_tokens"] == 2 * 128 * 5


def spoiled(monkeypatch, spoil):
    """vLLM is given another folder than transformers."""

    def ask_about_another(question, *arguments):
        other = Path(question.adapter or question.model).with_name("other")
        shutil.copytree(question.adapter or question.model, other)
        spoil(other)
        change = {"adapter": other} if question.adapter else {"model": str(other)}
        return ask_vllm(replace(question, **change), *arguments)

    monkeypatch.setattr(export_module, "ask_vllm", ask_about_another)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def another_rope(folder):
    change_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 3.0})


def swapped_layers(folder):
    def swap(tensors):
        for name in [name for name in tensors if ".layers.0." in name]:
            other = name.replace(".layers.0.", ".layers.1.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    change_tensors(folder / "model.safetensors", swap)


def another_epsilon(folder):
    change_json(folder / "config.json", rms_norm_eps=2e-6)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(
            another_rope, r"rope_parameters is .*3\.0.* on average \(limit", marks=pytest.mark.slow, id="another rope"
        ),
        pytest.param(
            swapped_layers, r"transformers does: log-probabilities differ .* on average \(limit", id="swapped layers"
        ),
        pytest.param(another_epsilon, r"rms_norm_eps is 1e-06 and 2e-06", marks=pytest.mark.slow, id="another epsilon"),
    ],
)
def test_another_model_in_vllm_is_refused(tmp_path, servable_base, tiny_tokenizer, monkeypatch, spoil, words):
    config = prepare(tmp_path, servable_base, tiny_tokenizer, export={"vllm_prompts": 4})
    write_checkpoint(tmp_path, trained(AutoModelForCausalLM.from_pretrained(servable_base)), step=1)
    spoiled(monkeypatch, spoil)
    with pytest.raises(TrainerError, match=words) as error:
        export(config, tmp_path)
    assert "export.on_disagreement: warn" in str(error.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_on_disagreement_warn_exports_and_records(tmp_path, servable_base, tiny_tokenizer, monkeypatch):
    section = {"vllm_prompts": 4, "on_disagreement": "warn"}
    config = prepare(tmp_path, servable_base, tiny_tokenizer, export=section)
    write_checkpoint(tmp_path, trained(AutoModelForCausalLM.from_pretrained(servable_base)), step=1)
    spoiled(monkeypatch, another_rope)
    (setting, *numbers) = export(config, tmp_path)["vllm"]["disagreements"]
    assert "rope_parameters" in setting
    assert numbers
    assert (tmp_path / "model").exists()


def test_vllm_serves_the_exported_adapter_beside_its_base(tmp_path, servable_base, tiny_tokenizer):
    config, model, weights = tuned(tmp_path, servable_base, tiny_tokenizer, LORA, vllm_prompts=16)
    write_checkpoint(tmp_path, weights, step=1, loss=loss_on_validation(model, tmp_path))
    assert agrees(export(config, tmp_path)["vllm"])


@pytest.mark.slow
def test_an_adapter_that_vllm_holds_in_part_is_refused(tmp_path, servable_base, tiny_tokenizer, monkeypatch):
    config, model, weights = tuned(tmp_path, servable_base, tiny_tokenizer, LORA, vllm_prompts=16)
    write_checkpoint(tmp_path, weights, step=1, loss=loss_on_validation(model, tmp_path))

    def without_one(folder):
        def drop(tensors):
            for name in [name for name in tensors if "layers.1.self_attn.q_proj" in name]:
                del tensors[name]

        change_tensors(folder / "adapter_model.safetensors", drop)

    spoiled(monkeypatch, without_one)
    with pytest.raises(TrainerError, match=r"on 1 of \d+ modules: model\.layers\.1\.self_attn\.q_proj"):
        export(config, tmp_path)


def test_an_error_of_vllm_has_its_last_words_and_the_way_out(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    question = Question(str(tmp_path), tmp_path, None, 0, [[1]], 16, [], "fp32")
    with pytest.raises(TrainerError, match="vLLM could not answer") as error:
        ask_vllm(question, ExportConfig())
    assert "export.vllm_prompts: 0" in str(error.value)
    assert len(str(error.value)) < 10_000
