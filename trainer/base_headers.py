"""Names and shapes of a folder's tensors, from the headers of its safetensors files; standard library alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[int, ...]]

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings", "tok_embeddings", "lm_head")


def tensor_shapes(files: list[Path]) -> Shapes:
    """Read the headers of safetensors files.

    Args:
        files: Whole or not; a file without a readable header counts as empty.

    Returns:
        The shape of each tensor, by name.
    """
    shapes: Shapes = {}
    for file in files:
        try:
            with file.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(length)) if length < 1 << 30 else {}
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error):
            continue
    return shapes


def matrices(shapes: Shapes) -> Shapes:
    """The modules that hold a weight of two axes, by name: linear layers, embeddings and output layers.

    Args:
        shapes: Of a base's tensors.

    Returns:
        The weight's shape, by the module's name.
    """
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def is_embedding(module: str) -> bool:
    """Whether a module is an embedding or the output layer, by the last part of its name."""
    return module.rpartition(".")[2] in _EMBEDDINGS or "position" in module.rpartition(".")[2] or module.endswith("wpe")


def linear_layers(shapes: Shapes) -> Shapes:
    """The modules that all-linear means: all but embeddings and the output layer.

    Args:
        shapes: Of a base's tensors.

    Returns:
        The weight's shape, by the module's name.
    """
    return {name: shape for name, shape in matrices(shapes).items() if not is_embedding(name)}


def fits(module: str, target: str) -> bool:
    """Whether PEFT takes a module for a target: it has this name, or ends with it."""
    return module == target or module.endswith(f".{target}")


def vocabulary_rows(config: dict[str, Any]) -> int | None:
    """Rows of a model's embedding. Pure.

    Args:
        config: The content of config.json.

    Returns:
        Their number; None where the file does not say.
    """
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return rows if isinstance(rows, int) else None
