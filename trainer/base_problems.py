"""What the small files of a base model's folder show that can't be tuned or exported; nothing is loaded.

The command line asks this before anything starts, so it imports no more than the standard library. What only the
libraries can decide is left to trainer.export.rehearsal.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from trainer.config import ExportConfig, LoraTuning, TuningConfig

_INDEX = "model.safetensors.index.json"
_JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", _INDEX)
# vLLM 0.32: text models of its registry whose class serves no LoRA adapter.
WITHOUT_ADAPTERS = frozenset(
    {
        *("BailingMoeV2_5ForCausalLM", "BloomForCausalLM", "Cohere2MoeForCausalLM", "DbrxForCausalLM"),
        *("FalconForCausalLM", "FalconMambaForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM", "Gemma3nForCausalLM"),
        *("Mamba2ForCausalLM", "MambaForCausalLM", "StableLmForCausalLM", "Zamba2ForCausalLM"),
    }
)
# Under these keys configurations name the number of experts.
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})


def base_problems(
    folder: Path,
    tuning: TuningConfig,
    export: ExportConfig,
    *,
    served: bool,
    on_gpu: bool,
    cached: bool = False,
) -> list[str]:
    """Why a base model can't be tuned, or what comes out of it can't be exported.

    Args:
        folder: A Hugging Face folder.
        tuning: The tuning section.
        export: The export section.
        served: Whether vLLM is to serve the tuned model.
        on_gpu: Whether vLLM runs on GPUs.
        cached: Whether it is the hub's cache, where weights that are missing will be downloaded.

    Returns:
        A phrase for each problem, to be put after the folder's name.
    """
    if (folder / "adapter_config.json").is_file():
        return [_adapter_problem(folder / "adapter_config.json")]
    contents: dict[str, Any] = {}
    problems = []
    for name in _JSON_FILES:
        try:
            contents[name] = _json_object(folder / name)
        except ValueError as error:
            problems.append(f"{name} can't be read ({error}): download it again")
    config = contents.get("config.json")
    if config is not None:
        problems += _config_problems(config)
        problems += _serving_problems(config, tuning, export, on_gpu=on_gpu) if served else []
    return problems if cached else problems + _weights_problems(folder)


def missing_weights(folder: Path) -> list[str]:
    """The files of weights that a model's folder should have and has not.

    Args:
        folder: A Hugging Face folder.

    Returns:
        Their names, without the folder.
    """
    single = "model.safetensors"
    try:
        index = _json_object(folder / _INDEX)
    except ValueError:
        index = None
    listed = {single} if index is None or (folder / single).is_file() else set(index.get("weight_map", {}).values())
    return sorted(name for name in listed if not (folder / name).is_file())


def _json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file. Other content raises ValueError."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _adapter_problem(path: Path) -> str:
    try:
        base = (_json_object(path) or {}).get("base_model_name_or_path")
    except ValueError:
        base = None
    of = f" of {base}" if base else ""
    return (
        f"is an adapter{of} (adapter_config.json), not a model: give the base model, or merge the adapter into it "
        "first (PEFT's merge_and_unload, then save_pretrained)"
    )


def _config_problems(config: dict[str, Any]) -> list[str]:
    """What config.json alone shows."""
    problems = []
    if not config.get("model_type"):
        problems.append("config.json names no model_type, so no library can tell what model this is")
    quantized = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "an unknown method") if isinstance(quantized, dict) else quantized
        problems.append(
            f"its weights are quantized already ({method}; quantization_config in config.json), and can't be trained "
            "or exported: give the model that it was made from; tuning.method qlora holds that one in 4 bits by itself"
        )
    if nested := [name for name in ("text_config", "vision_config", "audio_config") if config.get(name)]:
        problems.append(
            f"is a model of more than text ({', '.join(nested)} in config.json): only text models are tuned; give the "
            "text model of this family, if there is one"
        )
    if config.get("is_encoder_decoder"):
        problems.append("is an encoder-decoder (config.json), not a causal language model: give a decoder-only model")
    if (config.get("lm_head_multiplier") or 1.0) != 1.0:  # Falcon-H1
        problems.append("scales its scores (lm_head_multiplier in config.json), which training does not: not supported")
    if config.get("output_router_logits"):
        problems.append(
            "asks for a loss on its router (output_router_logits in config.json), which is not computed here: set it "
            "to false in a copy of the folder; experts are then trained on the tokens' loss alone"
        )
    return problems


def _serving_problems(config: dict[str, Any], tuning: TuningConfig, export: ExportConfig, *, on_gpu: bool) -> list[str]:
    """Adapters that vLLM does not serve."""
    if not isinstance(tuning, LoraTuning) or export.merge:
        return []
    way_out = "set export.merge: true, which writes whole weights, or tuning.method: full"
    architecture = next(iter(config.get("architectures") or []), "")
    if architecture in WITHOUT_ADAPTERS:
        return [f"vLLM serves no adapters beside {architecture}: {way_out}"]
    if not _has_experts(config):
        return []
    if not on_gpu:
        return [f"vLLM serves adapters beside a mixture of experts on GPUs only: {way_out}"]
    if tuning.targets == "all-linear" or not _ATTENTION.issuperset(tuning.targets):
        attention = ", ".join(sorted(_ATTENTION))
        return [f"vLLM may leave out adapters on experts: set tuning.targets to [{attention}], or {way_out}"]
    return []


def _has_experts(config: dict[str, Any]) -> bool:
    return any((config.get(name) or 0) > 1 for name in _EXPERT_KEYS)


def _weights_problems(folder: Path) -> list[str]:
    """Files of weights that are missing or cut short."""
    problems = []
    if any(folder.glob("*.safetensors")) and (missing := missing_weights(folder)):
        problems.append(f"has no {missing[0]} ({len(missing)} files of weights are missing): download it again")
    for file in sorted(folder.glob("*.safetensors")):
        if (reason := _damage(file)) is not None:
            problems.append(f"{file.name} {reason}: download it again")
    return problems


def _damage(file: Path) -> str | None:
    """What is wrong with the length of a safetensors file, which its header tells; None if nothing is."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if start == b"version ":
            return "is a pointer of Git LFS, not the weights (git lfs pull)"
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return f"is cut short or no safetensors file ({size:,} bytes)"
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return "has no header of a safetensors file"
    whole = 8 + length + max(ends, default=0)
    return None if size == whole else f"has {size:,} bytes where its header tells of {whole:,}"
