"""The sizes of a base model that decide what a run needs, read from its configuration and the heads of its files."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from launcher.config import RunConfig
from trainer.config import FreezeTuning, FromScratch, FullTuning, LoraTuning, PromptTuning, QloraTuning


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide its memory.

    Attributes:
        num_weights: all of them, embeddings included.
        hidden: width of the residual stream.
        intermediate: width of the gated MLP.
        num_layers: transformer layers.
        kv_width: width of the keys, and of the values.
        vocab_size: width of the logits.
    """

    num_weights: int
    hidden: int
    intermediate: int
    num_layers: int
    kv_width: int
    vocab_size: int


def shape_of(config: RunConfig, base: Path | None = None) -> Shape | None:
    """The base model's sizes, where its configuration is at hand.

    Args:
        config: the run's configuration.
        base: folder of a base model, where it is known; None looks at model.name_or_path.

    Returns:
        The sizes; None for a model on the hub that is not in the local cache, or one of an unknown form.
    """
    if config.model.from_scratch is not None:
        return _shape_from_scratch(config.model.from_scratch)
    name = config.model.name_or_path
    folder = base or (_model_folder(name, config.model.revision) if name else None)
    if folder is None or not (folder / "config.json").is_file():
        return None
    read = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    read = read.get("text_config", read)
    try:
        heads = read["num_attention_heads"]
        head_size = read.get("head_dim") or read["hidden_size"] // heads
        shape = Shape(
            num_weights=0,
            hidden=read["hidden_size"],
            intermediate=read["intermediate_size"],
            num_layers=read["num_hidden_layers"],
            kv_width=(read.get("num_key_value_heads") or heads) * head_size,
            vocab_size=read["vocab_size"],
        )
    except (KeyError, TypeError):
        return None
    counted = sum(_weights_in(file) for file in sorted(folder.glob("*.safetensors")))
    num_weights = counted or _count(shape, heads * head_size, tied=bool(read.get("tie_word_embeddings")))
    return Shape(**{**vars(shape), "num_weights": num_weights})


def _shape_from_scratch(sizes: FromScratch) -> Shape:
    kv_width = sizes.num_kv_heads * (sizes.hidden_size // sizes.num_heads)
    shape = Shape(0, sizes.hidden_size, sizes.intermediate_size, sizes.num_layers, kv_width, sizes.vocab_size)
    return Shape(**{**vars(shape), "num_weights": _count(shape, sizes.hidden_size, tied=True)})


def _count(shape: Shape, query_width: int, *, tied: bool) -> int:
    """Weights of a Llama-like decoder; biases are left out."""
    attention = 2 * shape.hidden * query_width + 2 * shape.hidden * shape.kv_width
    layer = attention + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    return shape.num_layers * layer + shape.hidden + (1 if tied else 2) * shape.vocab_size * shape.hidden


def _weights_in(file: Path) -> int:
    """Number of weights in a safetensors file, from its header."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _model_folder(name: str, revision: str | None) -> Path | None:
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
            widths = [(shape.hidden, shape.hidden)] * 2 + [(shape.hidden, shape.kv_width)] * 2
            widths += [(shape.hidden, shape.intermediate)] * 3
            return shape.num_layers * sum(lora.rank * (rows + columns) for rows, columns in widths)
        case PromptTuning(num_tokens=num_tokens):
            return num_tokens * shape.hidden
        case FreezeTuning(last_layers=last_layers, head=head, names=names):
            if names:  # which weights these are, only the model itself tells: count the most
                return shape.num_weights
            layer = (shape.num_weights - shape.vocab_size * shape.hidden) // max(1, shape.num_layers)
            return min(shape.num_weights, last_layers * layer + head * shape.vocab_size * shape.hidden)


def element_bytes(config: RunConfig) -> int:
    """Bytes of a weight or an activation while it is computed with."""
    return 4 if config.training.precision == "fp32" else 2
