"""The sizes of a model that decide what it needs, read from its configuration and the heads of its files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.estimate.known_models import known_config
from launcher.estimate.weights import count_weights, decoder_of, head_size_of, stored_bytes
from trainer.config import FreezeTuning, FromScratch, FullTuning, LoraTuning, PromptTuning, QloraTuning

# Layers that keep no keys and values for each token.
_WITHOUT_CACHE = ("linear_attention", "mamba", "conv", "recurrent")
# A configuration with such a key mixes attention with states whose sizes are not known here.
_STATE_WORDS = ("mamba", "ssm", "hybrid_override_pattern", "attn_layer_period")


@dataclass(frozen=True)
class Attention:
    """What a model keeps for each token that it has read.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Heads of keys and values.
        head_size: Width of a head.
        windows: For each layer with a cache its sliding window in tokens, or None where it sees all tokens.
        latent: Width of the one vector kept in place of keys and values (multi-head latent attention); 0 without.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    windows: tuple[int | None, ...]
    latent: int = 0


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide its memory.

    Attributes:
        num_weights: all of them, embeddings included.
        hidden: width of the residual stream.
        intermediate: width of the gated MLP that a token passes through.
        num_layers: transformer layers.
        kv_width: width of the keys, and of the values.
        vocab_size: width of the logits.
        attention: what decides the key-value cache; None where it is not understood.
        max_positions: longest sequence that the model was built for, in tokens; None where it does not say.
        stored_bytes: bytes of weights that are stored in fewer bits (quantization_config); None of ordinary ones.
    """

    num_weights: int
    hidden: int
    intermediate: int
    num_layers: int
    kv_width: int
    vocab_size: int
    attention: Attention | None = None
    max_positions: int | None = None
    stored_bytes: int | None = None


def shape_of(config: RunConfig, base: Path | None = None) -> Shape | None:
    """The base model's sizes, where its configuration is at hand.

    Args:
        config: the run's configuration.
        base: folder of a base model, where it is known; None looks at model.name_or_path.

    Returns:
        The sizes; None for a model on the hub that is neither in the local cache nor a usual one, or of an unknown
        form.
    """
    if config.model.from_scratch is not None:
        return _shape_from_scratch(config.model.from_scratch)
    if base is not None:
        return _shape_in(base)
    return None if config.model.name_or_path is None else shape_named(config.model.name_or_path, config.model.revision)


def shape_named(name: str, revision: str | None = None) -> Shape | None:
    """A model's sizes, without the network.

    Args:
        name: local folder, in which a config.json is enough, or hub id.
        revision: branch, tag or commit on the hub.

    Returns:
        The sizes, from the folder, the hub's local cache or the usual models' published ones; None where none has it.
    """
    folder = model_folder(name, revision)
    if folder is not None:
        return _shape_in(folder)
    usual = None if name.count("/") != 1 else known_config(name)
    return None if usual is None else read_shape(usual)


def read_shape(config: Mapping[str, Any]) -> Shape | None:
    """A model's sizes from its config.json. Pure.

    Args:
        config: the file's content.

    Returns:
        The sizes, the weights counted from them; None where it is no decoder of a form that is understood.
    """
    read = decoder_of(config)
    try:
        num_weights, num_linear = count_weights(config)
        heads, head_size = read["num_attention_heads"], head_size_of(read)
        kv_heads = read.get("num_key_value_heads") or heads
        experts = read.get("num_experts_per_tok") or 1
        return Shape(
            num_weights=num_weights,
            hidden=read["hidden_size"],
            intermediate=max(read["intermediate_size"], experts * (read.get("moe_intermediate_size") or 0)),
            num_layers=read["num_hidden_layers"],
            kv_width=kv_heads * head_size,
            vocab_size=read["vocab_size"],
            attention=_attention(read, heads, kv_heads, head_size),
            max_positions=read.get("max_position_embeddings"),
            stored_bytes=stored_bytes(config.get("quantization_config"), num_weights, num_linear),
        )
    except (KeyError, TypeError):
        return None


def _attention(read: Mapping[str, Any], heads: int, kv_heads: int, head_size: int) -> Attention | None:
    if any(word in key for key in read for word in _STATE_WORDS):
        return None
    latent = (read.get("kv_lora_rank") or 0) and read["kv_lora_rank"] + read["qk_rope_head_dim"]
    return Attention(heads, kv_heads, head_size, _windows(read), latent)


def _windows(read: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The window of each layer that has a cache."""
    window: int | None = read.get("sliding_window")
    num_layers: int = read["num_hidden_layers"]
    if kinds := read.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in kinds if kind not in _WITHOUT_CACHE)
    family = read.get("model_type", "")
    if window is None or (family.startswith("qwen") and not read.get("use_sliding_window")):
        return (None,) * num_layers
    if family.startswith(("gemma2", "gemma3")):  # the last of each few layers sees everything
        every = read.get("sliding_window_pattern") or (2 if family.startswith("gemma2") else 6)
        return tuple(window if (layer + 1) % every else None for layer in range(num_layers))
    whole = min(num_layers, int(read.get("max_window_layers", 0))) if family.startswith("qwen") else 0
    return (None,) * whole + (window,) * (num_layers - whole)


def _shape_in(folder: Path) -> Shape | None:
    """The sizes of a model in a folder; its weights are counted from its files where these are there."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    shape = read_shape(config)
    if shape is None:
        return None
    heads = [_header(file) for file in sorted(folder.glob("*.safetensors"))]
    if shape.stored_bytes is not None:  # several weights share an element of a tensor: bytes, but no number
        spans = [entry["data_offsets"] for head in heads for entry in head]
        return replace(shape, stored_bytes=sum(end - start for start, end in spans) or shape.stored_bytes)
    counted = sum(math.prod(entry["shape"]) for head in heads for entry in head)
    return replace(shape, num_weights=counted or shape.num_weights)


def _shape_from_scratch(sizes: FromScratch) -> Shape | None:
    return read_shape(
        {
            "model_type": "llama",
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size,
            "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.num_heads,
            "num_key_value_heads": sizes.num_kv_heads,
            "vocab_size": sizes.vocab_size,
            "max_position_embeddings": sizes.max_position_embeddings,
            "tie_word_embeddings": True,
        }
    )


def _header(file: Path) -> list[dict[str, Any]]:
    """The tensors of a safetensors file, from its header."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return [entry for name, entry in header.items() if name != "__metadata__"]


def model_folder(name: str, revision: str | None) -> Path | None:
    """Where a model's files are on this machine.

    Args:
        name: local folder or hub id.
        revision: branch, tag or commit on the hub.

    Returns:
        The folder, or the one in the hub's cache; None where neither exists.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def trained_weights(config: RunConfig, shape: Shape) -> int:
    """How many weights the optimizer moves. LoRA's are counted on all linear layers."""
    match config.tuning:
        case FullTuning():
            return shape.num_weights
        case LoraTuning() | QloraTuning() as lora:
            return adapter_weights(shape, lora.rank)
        case PromptTuning(num_tokens=num_tokens):
            return num_tokens * shape.hidden
        case FreezeTuning(last_layers=last_layers, head=head, names=names):
            if names:  # which weights these are, only the model itself tells: count the most
                return shape.num_weights
            layer = (shape.num_weights - shape.vocab_size * shape.hidden) // max(1, shape.num_layers)
            return min(shape.num_weights, last_layers * layer + head * shape.vocab_size * shape.hidden)


def adapter_weights(shape: Shape, rank: int) -> int:
    """Weights of LoRA's matrices on all linear layers but the output layer.

    Args:
        shape: the base model's sizes.
        rank: the adapters' rank.

    Returns:
        Their number.
    """
    attention = shape.attention
    query = attention.num_heads * attention.head_size if attention else shape.hidden
    widths = (
        [(shape.hidden, query)] * 2 + [(shape.hidden, shape.kv_width)] * 2 + [(shape.hidden, shape.intermediate)] * 3
    )
    return shape.num_layers * sum(rank * (rows + columns) for rows, columns in widths)


def element_bytes(config: RunConfig) -> int:
    """Bytes of a weight or an activation while it is computed with."""
    return 4 if config.training.precision == "fp32" else 2
