"""The usual base models' published sizes, for a machine that has neither their files nor a network."""

from __future__ import annotations

import re
from typing import Any

Config = dict[str, Any]


def _sizes(
    model_type: str, sizes: tuple[int, ...], *, positions: int, tied: bool = False, more: Config | None = None
) -> Config:
    """A config.json's keys: layers, width, MLP width, heads, key-value heads and vocabulary, and what is special."""
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        "model_type": model_type,
        **dict(zip((*keys, "vocab_size"), sizes, strict=True)),
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        **(more or {}),
    }


def _llama(*sizes: int, positions: int = 131_072, tied: bool = False) -> Config:
    return _sizes("llama", sizes, positions=positions, tied=tied)


def _qwen2(*sizes: int, tied: bool = False) -> Config:
    return _sizes("qwen2", sizes, positions=32_768, tied=tied)


def _qwen3(*sizes: int, tied: bool = False, positions: int = 40_960) -> Config:
    return _sizes("qwen3", sizes, positions=positions, tied=tied, more={"head_dim": 128})


def _mistral(vocab: int, window: int | None = None) -> Config:
    sizes = (32, 4096, 14_336, 32, 8, vocab)
    return _sizes("mistral", sizes, positions=32_768, more={"head_dim": 128, "sliding_window": window})


def _gemma3(*sizes: int, head_size: int, window: int, positions: int = 131_072) -> Config:
    more = {"head_dim": head_size, "sliding_window": window, "sliding_window_pattern": 6}
    return _sizes("gemma3_text", sizes, positions=positions, tied=True, more=more)


def _gemma3_with_vision(*sizes: int, head_size: int) -> Config:
    text = _gemma3(*sizes, 262_208, head_size=head_size, window=1024)
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 896}
    vision |= {"num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False}
    return {"model_type": "gemma3", "text_config": text, "vision_config": vision}


def _phi3(*sizes: int, positions: int, window: int | None = None, tied: bool = False) -> Config:
    return _sizes("phi3", sizes, positions=positions, tied=tied, more={"sliding_window": window})


# Beginning of a hub id, in small letters, and the config.json published there. Instruct models have the base's sizes.
KNOWN: dict[str, Config] = {
    r"meta-llama/(meta-)?llama-3\.1-8b": _llama(32, 4096, 14_336, 32, 8, 128_256),
    r"meta-llama/meta-llama-3-8b": _llama(32, 4096, 14_336, 32, 8, 128_256, positions=8192),
    r"meta-llama/(meta-)?llama-3\.[13]-70b": _llama(80, 8192, 28_672, 64, 8, 128_256),
    r"meta-llama/meta-llama-3-70b": _llama(80, 8192, 28_672, 64, 8, 128_256, positions=8192),
    r"meta-llama/llama-3\.2-1b": _llama(16, 2048, 8192, 32, 8, 128_256, tied=True),
    r"meta-llama/llama-3\.2-3b": _llama(28, 3072, 8192, 24, 8, 128_256, tied=True),
    r"qwen/qwen2\.5-(coder-)?0\.5b": _qwen2(24, 896, 4864, 14, 2, 151_936, tied=True),
    r"qwen/qwen2\.5-(coder-|math-)?1\.5b": _qwen2(28, 1536, 8960, 12, 2, 151_936, tied=True),
    r"qwen/qwen2\.5-(coder-)?3b": _qwen2(36, 2048, 11_008, 16, 2, 151_936, tied=True),
    r"qwen/qwen2\.5-(coder-|math-)?7b": _qwen2(28, 3584, 18_944, 28, 4, 152_064),
    r"qwen/qwen2\.5-(coder-)?14b": _qwen2(48, 5120, 13_824, 40, 8, 152_064),
    r"qwen/qwen2\.5-(coder-)?32b": _qwen2(64, 5120, 27_648, 40, 8, 152_064),
    r"qwen/qwen2\.5-(math-)?72b": _qwen2(80, 8192, 29_568, 64, 8, 152_064),
    r"qwen/qwen3-0\.6b": _qwen3(28, 1024, 3072, 16, 8, 151_936, tied=True),
    r"qwen/qwen3-1\.7b": _qwen3(28, 2048, 6144, 16, 8, 151_936, tied=True),
    r"qwen/qwen3-4b-(instruct|thinking)-2507": _qwen3(36, 2560, 9728, 32, 8, 151_936, tied=True, positions=262_144),
    r"qwen/qwen3-4b": _qwen3(36, 2560, 9728, 32, 8, 151_936, tied=True),
    r"qwen/qwen3-8b": _qwen3(36, 4096, 12_288, 32, 8, 151_936),
    r"qwen/qwen3-14b": _qwen3(40, 5120, 17_408, 40, 8, 151_936),
    r"qwen/qwen3-32b": _qwen3(64, 5120, 25_600, 64, 8, 151_936),
    r"mistralai/mistral-7b-(instruct-)?v0\.1": _mistral(32_000, window=4096),
    r"mistralai/mistral-7b-(instruct-)?v0\.2": _mistral(32_000),
    r"mistralai/mistral-7b-(instruct-)?v0\.3": _mistral(32_768),
    r"google/gemma-3-270m": _gemma3(18, 640, 2048, 4, 1, 262_144, head_size=256, window=512, positions=32_768),
    r"google/gemma-3-1b": _gemma3(26, 1152, 6912, 4, 1, 262_144, head_size=256, window=512, positions=32_768),
    r"google/gemma-3-4b": _gemma3_with_vision(34, 2560, 10_240, 8, 4, head_size=256),
    r"google/gemma-3-12b": _gemma3_with_vision(48, 3840, 15_360, 16, 8, head_size=256),
    r"google/gemma-3-27b": _gemma3_with_vision(62, 5376, 21_504, 32, 16, head_size=128),
    r"microsoft/phi-3(\.5)?-mini.*128k|microsoft/phi-3\.5-mini": _phi3(
        32, 3072, 8192, 32, 32, 32_064, positions=131_072, window=262_144
    ),
    r"microsoft/phi-3-mini-4k": _phi3(32, 3072, 8192, 32, 32, 32_064, positions=4096, window=2047),
    r"microsoft/phi-3-medium-128k": _phi3(40, 5120, 17_920, 40, 10, 32_064, positions=131_072, window=131_072),
    r"microsoft/phi-3-medium-4k": _phi3(40, 5120, 17_920, 40, 10, 32_064, positions=4096, window=2047),
    r"microsoft/phi-4-mini": _phi3(32, 3072, 8192, 24, 8, 200_064, positions=131_072, window=262_144, tied=True),
    r"microsoft/phi-4": _phi3(40, 5120, 17_920, 40, 10, 100_352, positions=16_384),
    r"huggingfacetb/smollm2-135m": _llama(30, 576, 1536, 9, 3, 49_152, tied=True, positions=8192),
    r"huggingfacetb/smollm2-360m": _llama(32, 960, 2560, 15, 5, 49_152, tied=True, positions=8192),
    r"huggingfacetb/smollm2-1\.7b": _llama(24, 2048, 8192, 32, 32, 49_152, tied=True, positions=8192),
}
# Of a hub id's last words: how its weights are stored.
_STORED = {"awq": {"quant_method": "awq", "bits": 4, "group_size": 128}, "fp8": {"quant_method": "fp8"}}
_STORED |= {"gptq-int4": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
_STORED |= {"gptq-int8": {"quant_method": "gptq", "bits": 8, "group_size": 128}}


def known_config(name: str) -> Config | None:
    """The published configuration of a usual model. Pure.

    >>> known_config("Qwen/Qwen3-32B-AWQ")["quantization_config"]["bits"]
    4
    >>> known_config("Qwen/Qwen3-30B-A3B")

    Args:
        name: Its hub id.

    Returns:
        The keys of its config.json that decide its sizes; None of a model that is not listed.
    """
    text = name.casefold()
    for pattern, config in KNOWN.items():
        if re.match(rf"(?:{pattern})(?![a-z0-9])(?!.*-1m)", text):  # -1M: of another length
            stored = next((how for word, how in _STORED.items() if text.endswith(f"-{word}")), None)
            return config if stored is None else config | {"quantization_config": stored}
    return None
