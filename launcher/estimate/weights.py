"""How many weights a decoder has, and in how many bytes they are stored, from its config.json alone. Pure.

Counted as transformers builds the models: gated MLPs, biases and extra norms by family, experts, multi-head latent
attention (DeepSeek), and the vision tower that Gemma 3 carries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GATED_MATRICES = 3
# What transformers takes for a key that Gemma 3's published files leave out.
_GEMMA3_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262_208,
    "sliding_window": 4096,
    "max_position_embeddings": 131_072,
}


def decoder_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's keys of a config.json, those of a model with a vision tower among them.

    Args:
        config: The file's content.

    Returns:
        One mapping.
    """
    read = {**config, **config.get("text_config", {})}
    return {**_GEMMA3_DEFAULTS, **read} if str(read.get("model_type", "")).startswith("gemma3") else read


def count_weights(config: Mapping[str, Any]) -> tuple[int, int]:
    """All weights of a model, and those of its layers' matrices, which are what quantization shrinks.

    Args:
        config: The content of its config.json.

    Returns:
        Both numbers.

    Raises:
        KeyError: It is not the configuration of a decoder that is understood.
    """
    read = decoder_of(config)
    family, hidden, num_layers = read.get("model_type", ""), read["hidden_size"], read["num_hidden_layers"]
    attention, attention_extra = _attention(read, family)
    mlp = sum(_mlp(read, layer) for layer in range(num_layers))
    norms_each = 4 if family.startswith(("gemma2", "gemma3")) else 2
    matrices = num_layers * attention + mlp
    tied = read.get("tie_word_embeddings")
    embeddings = (1 if (family.startswith("gemma") if tied is None else tied) else 2) * read["vocab_size"] * hidden
    others = num_layers * (norms_each * hidden + attention_extra) + hidden + embeddings
    return matrices + others + _vision_tower(config, hidden), matrices


def head_size_of(read: Mapping[str, Any]) -> int:
    """Width of an attention head: named, or the residual stream cut over the heads."""
    return int(read.get("head_dim") or read["hidden_size"] // read["num_attention_heads"])


def _attention(read: Mapping[str, Any], family: str) -> tuple[int, int]:
    """Weights of one layer's attention: its matrices, and its biases and norms."""
    hidden, heads, size = read["hidden_size"], read["num_attention_heads"], head_size_of(read)
    if latent := read.get("kv_lora_rank"):
        plain, rope, value = read["qk_nope_head_dim"], read["qk_rope_head_dim"], read["v_head_dim"]
        lora = read.get("q_lora_rank")
        query = lora * (hidden + heads * (plain + rope)) if lora else hidden * heads * (plain + rope)
        keys = hidden * (latent + rope) + latent * heads * (plain + value)
        return query + keys + heads * value * hidden, latent + (lora or 0)
    query, kv = int(heads * size), int((read.get("num_key_value_heads") or heads) * size)
    extra = 0
    if family.startswith("qwen2"):
        extra += query + 2 * kv
    elif read.get("attention_bias"):
        extra += query + 2 * kv + hidden
    if family.startswith(("qwen3", "gemma3")):
        extra += 2 * size  # a norm of each head's query and key
    if family.startswith("olmo2"):
        extra += query + kv
    return 2 * hidden * query + 2 * hidden * kv, extra


def _mlp(read: Mapping[str, Any], layer: int) -> int:
    """Weights of one layer's MLP: gate, up and down, or those of all experts with their router."""
    hidden, width = int(read["hidden_size"]), int(read["intermediate_size"])
    experts = int(read.get("num_local_experts") or read.get("num_experts") or read.get("n_routed_experts") or 0)
    dense = (
        not experts
        or layer in (read.get("mlp_only_layers") or ())
        or layer < (read.get("first_k_dense_replace") or 0)
        or (layer + 1) % (read.get("decoder_sparse_step") or 1)
    )
    if dense:
        return _GATED_MATRICES * hidden * width
    each = int(read.get("moe_intermediate_size") or width)
    shared = int(read.get("shared_expert_intermediate_size") or (read.get("n_shared_experts") or 0) * each)
    gate = hidden if read.get("shared_expert_intermediate_size") else 0
    return _GATED_MATRICES * hidden * (experts * each + shared) + experts * hidden + gate


def _vision_tower(config: Mapping[str, Any], hidden: int) -> int:
    """Gemma 3's SigLIP encoder and its projection into the text model; 0 of other models."""
    vision = config.get("vision_config")
    if not vision or not str(config.get("model_type", "")).startswith("gemma3"):
        return 0
    width, inner = vision.get("hidden_size", 1152), vision.get("intermediate_size", 4304)
    patch, image = vision.get("patch_size", 14), vision.get("image_size", 896)
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    ends = 3 * patch * patch * width + width + (image // patch) ** 2 * width + 2 * width
    return int(vision.get("num_hidden_layers", 27) * layer + ends + width * hidden + width)


def stored_bytes(quantization: Mapping[str, Any] | None, num_weights: int, num_linear: int) -> int | None:
    """Bytes of weights that are stored in fewer than 16 bits; embeddings, output layer and norms stay in 16.

    >>> stored_bytes({"quant_method": "fp8"}, 1_000, 900), stored_bytes(None, 1_000, 900)
    (1100, None)

    Args:
        quantization: quantization_config of a config.json.
        num_weights: All weights.
        num_linear: Those that are quantized.

    Returns:
        The bytes; None where nothing is quantized.
    """
    if not quantization:
        return None
    return int(num_linear * _bits(quantization) / 8) + 2 * (num_weights - num_linear)


def _bits(quantization: Mapping[str, Any]) -> float:
    """Bits of a quantized weight, its scales included; 16 for a method that is not known."""
    match quantization.get("quant_method"):
        case "fp8" | "fbgemm_fp8":
            return 8
        case "awq" | "gptq":
            bits, group = quantization.get("bits", quantization.get("w_bit", 4)), quantization.get("group_size", 128)
            return float(bits + (16 + bits) / group if group > 0 else bits)
        case "bitsandbytes":
            return 4.5 if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit") else 8
        case "mxfp4":
            return 4.25
        case "compressed-tensors":
            groups = quantization.get("config_groups", {}).values()
            return float(max((group["weights"]["num_bits"] for group in groups), default=16))
        case _:
            return 16
