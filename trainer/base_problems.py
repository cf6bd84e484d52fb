"""What the small files of a base model's folder show that can't be tuned or exported; nothing is loaded.

The command line asks this before anything starts, so it imports no more than the standard library. What only the
libraries can decide is left to trainer.export.rehearsal.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from trainer.adapter_problems import adapter_problems
from trainer.base_headers import Shapes, fits, linear_layers, matrices, tensor_shapes, vocabulary_rows
from trainer.config import ExportConfig, FreezeTuning, LoraTuning, ModelConfig, TuningConfig

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
_LARGEST_RANK = 512  # vLLM 0.32's largest max_lora_rank
# Scaled rotary positions whose max_position_embeddings is the scaled length already, as vLLM 0.32 reads it.
_SCALED_ALREADY = frozenset({"default", "llama3", "longrope", "su", "yarn", "deepseek_yarn"})
# Tokens that a family's tokenizer has for pictures and sound, also beside its text models.
MEDIA_TOKENS = ("image_token", "audio_token", "video_token", "boi_token", "eoi_token")
_NAMED = 5


def base_problems(
    folder: Path,
    tuning: TuningConfig,
    export: ExportConfig,
    *,
    served: bool,
    on_gpu: bool,
    cached: bool = False,
    model: ModelConfig | None = None,
    sequence_length: int | None = None,
) -> list[str]:
    """Why a base model can't be tuned, or what comes out of it can't be exported.

    Args:
        folder: A Hugging Face folder.
        tuning: The tuning section.
        export: The export section.
        served: Whether vLLM is to serve the tuned model.
        on_gpu: Whether vLLM runs on GPUs.
        cached: Whether it is the hub's cache, where weights that are missing will be downloaded.
        model: The model section, where new tokens and an adapter are looked at too.
        sequence_length: data.sequence_length, where it is looked at too.

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
    shapes = tensor_shapes(sorted(folder.glob("*.safetensors"))) if not cached or not missing_weights(folder) else {}
    if config is not None:
        problems += _config_problems(config)
        problems += _serving_problems(config, tuning, export, on_gpu=on_gpu) if served else []
        problems += _position_problems(config, sequence_length)
        problems += _vocabulary_problems(folder, config, model.new_tokens if model else ())
        problems += _target_problems(config, tuning, shapes)
        problems += _base_adapter_problems(config, tuning, model, shapes, served=served)
    return problems if cached else problems + _weights_problems(folder)


def _position_problems(config: dict[str, Any], length: int | None) -> list[str]:
    """Sequences that are longer than the model has positions for."""
    positions = num_positions(config)
    if length is None or positions is None or length <= positions:
        return []
    return [
        f"has {positions:,} positions (config.json), and data.sequence_length is {length:,}: set data.sequence_length "
        f"to {positions} or less, or take a model for longer texts"
    ]


def num_positions(config: dict[str, Any]) -> int | None:
    """The longest sequence that a model is for, in tokens, scaled rotary positions included. Pure.

    Args:
        config: The content of config.json.

    Returns:
        The length; None where the configuration does not limit it.
    """
    text = config.get("text_config") or config
    positions = text.get("max_position_embeddings") or text.get("n_positions")
    if not isinstance(positions, int) or text.get("alibi"):
        return None
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    longest = float(positions)
    for each in [rope, *(one for one in rope.values() if isinstance(one, dict))]:  # some families: one a kind of layer
        kind, factor = each.get("rope_type") or each.get("type") or "default", each.get("factor") or 1.0
        if kind not in _SCALED_ALREADY and "gemma3" not in str(config.get("model_type")):
            longest = max(longest, positions * factor)
        longest = max(longest, (each.get("original_max_position_embeddings") or 0) * factor)
    return int(longest)


def _vocabulary_problems(folder: Path, config: dict[str, Any], new_tokens: tuple[str, ...]) -> list[str]:
    """New tokens that the base has, and tokens that it has no row for."""
    rows, ids = vocabulary_rows(config), _token_ids(folder)
    if rows is None or not ids:
        return []
    problems = [
        f"has the token {token!r} already (id {ids[token]}): take it out of model.new_tokens"
        for token in new_tokens
        if ids.get(token, rows) < rows
    ]
    beyond = sorted((number, token) for token, number in ids.items() if number >= rows and token not in new_tokens)
    if beyond:
        problems.append(beyond_the_embedding([token for _, token in beyond], rows))
    return problems


def beyond_the_embedding(tokens: list[str], rows: int) -> str:
    """A phrase for tokens of a tokenizer that the model has no row for. Pure.

    Args:
        tokens: The tokens in the order of their ids.
        rows: Rows of the embedding.

    Returns:
        Both numbers and the way out.
    """
    shown = ", ".join(map(repr, tokens[:_NAMED])) + (", ..." if len(tokens) > _NAMED else "")
    return (
        f"its tokenizer has {rows + len(tokens):,} tokens and its embedding {rows:,} rows: {shown} would have none, "
        "and training would stop at the first of them. List them in model.new_tokens, which gives them trained rows, "
        "or take them out of the tokenizer's files"
    )


def _token_ids(folder: Path) -> dict[str, int]:
    """The tokens of a folder's tokenizer.json by id, without those for pictures and sound; empty without the file."""
    try:
        tokenizer = _json_object(folder / "tokenizer.json") or {}
        settings = _json_object(folder / "tokenizer_config.json") or {}
        vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
        listed = {entry[0]: number for number, entry in enumerate(vocabulary)} if isinstance(vocabulary, list) else None
        added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []}
        more = settings.get("extra_special_tokens")
        named = settings | (more if isinstance(more, dict) else {})
        media = {token for name in MEDIA_TOKENS if isinstance(token := named.get(name), str)}
        ids = {**(vocabulary if listed is None else listed), **added}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return {}
    return {token: number for token, number in ids.items() if token not in media}


def _target_problems(config: dict[str, Any], tuning: TuningConfig, shapes: Shapes) -> list[str]:
    """Parts that tuning names and the base has not."""
    problems = []
    layers = (config.get("text_config") or config).get("num_hidden_layers")
    if isinstance(tuning, FreezeTuning) and isinstance(layers, int) and tuning.last_layers > layers:
        problems.append(f"has {layers} layers, and tuning.last_layers is {tuning.last_layers}: lower it")
    modules = matrices(shapes)
    if not isinstance(tuning, LoraTuning) or tuning.targets == "all-linear" or not modules or _has_experts(config):
        return problems
    unmatched = [target for target in tuning.targets if not any(fits(module, target) for module in modules)]
    if unmatched:
        known = ", ".join(sorted({module.rpartition(".")[2] for module in linear_layers(shapes)}))
        problems.append(
            f"has no layer that fits {', '.join(unmatched)} of tuning.targets: its linear layers are {known}; name "
            "some of these, or set tuning.targets: all-linear"
        )
    return problems


def _base_adapter_problems(
    config: dict[str, Any], tuning: TuningConfig, model: ModelConfig | None, shapes: Shapes, *, served: bool
) -> list[str]:
    """What is wrong with model.adapter beside this base."""
    if model is None or model.adapter is None:
        return []
    architecture = next(iter(config.get("architectures") or []), "")
    found = adapter_problems(Path(model.adapter), shapes, tuning, checks_names=not _has_experts(config))
    if served and not found and architecture in WITHOUT_ADAPTERS:
        found = [f"vLLM serves no adapters beside {architecture}, so the base could not answer with it: merge it into "
                 "the base first (PEFT's merge_and_unload, then save_pretrained)"]  # fmt: skip
    return [f"model.adapter = {model.adapter}: {problem}" for problem in found]


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
        f"is an adapter{of} (adapter_config.json), not a model: give the base model as model.name_or_path, and this "
        "folder as model.adapter to tune on from it"
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
    found = []
    if tuning.rank > _LARGEST_RANK:
        found.append(
            f"vLLM serves adapters of rank {_LARGEST_RANK} at most, and tuning.rank is {tuning.rank}: lower it, or "
            f"{way_out}"
        )
    return found + (_expert_problems(tuning, way_out, on_gpu=on_gpu) if _has_experts(config) else [])


def _expert_problems(tuning: LoraTuning, way_out: str, *, on_gpu: bool) -> list[str]:
    """Adapters that vLLM does not serve beside a mixture of experts."""
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
