"""Rows of the embedding and the output layer for new tokens (model.new_tokens)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import gcd
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from trainer.errors import TrainerError

_CHUNK = 8192  # rows that are summed in fp64 at a time


def add_rows(network: Any, new_tokens: Mapping[int, Sequence[int]]) -> None:  # noqa: ANN401 - transformers' models
    """Give a base model a row for each new token, in the embedding and in the output layer.

    A new row begins as the mean of its pieces' rows (fast vocabulary transfer, arXiv:2402.09977): as an output its
    score is then the mean of theirs, so it is never the likeliest token before it is trained. Without pieces, and
    in rows that only pad the matrix, it is the mean of all rows (nlp.stanford.edu/~johnhew/vocab-expansion.html). The
    result depends on the weights alone, so training and export make the same. Rows that pad the base's matrix are used
    first. The number of rows stays a multiple of what it was a multiple of, up to 64.

    Args:
        network: A causal language model; changed in place. On the meta device only its shapes change.
        new_tokens: Id to the ids of its pieces.

    Raises:
        TrainerError: The model has no output layer of one row for each token.
    """
    if not new_tokens:
        return
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    if head is None:
        raise TrainerError(f"model.new_tokens: {type(network).__name__} has no output layer: leave new_tokens out")
    tied = head.weight is embedding.weight
    with whole([embedding.weight] if tied else [embedding.weight, head.weight]):
        before = embedding.weight.shape[0]
        even = gcd(before, 64)
        rows = max(before, -(-(max(new_tokens) + 1) // even) * even)
        for module in (embedding,) if tied else (embedding, head):
            weight = _extended(module.weight.detach(), rows, new_tokens)
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        if tied:
            head.weight = embedding.weight
        if getattr(head, "bias", None) is not None:
            bias = torch.cat([head.bias.detach(), head.bias.new_zeros(rows - before)])
            head.bias = nn.Parameter(bias, requires_grad=head.bias.requires_grad)
    embedding.num_embeddings = head.out_features = rows
    network.config.get_text_config().vocab_size = network.vocab_size = rows


def _extended(weight: Tensor, rows: int, new_tokens: Mapping[int, Sequence[int]]) -> Tensor:
    """A copy of the matrix with so many rows, those of new tokens initialised."""
    before, width = weight.shape
    more = weight.new_empty(rows - before, width)
    whole = torch.cat([weight, more])
    if whole.is_meta:
        return whole
    known = [number for number in range(before) if number not in new_tokens] if len(new_tokens) < before else []
    total = torch.zeros(width, dtype=torch.float64)
    for start in range(0, len(known), _CHUNK):
        total += weight[known[start : start + _CHUNK]].cpu().double().sum(0)
    mean = (total / max(1, len(known))).to(weight.dtype)
    whole[before:] = mean
    for token, pieces in new_tokens.items():
        usable = [piece for piece in pieces if piece < before and piece not in new_tokens]
        row = weight[usable].cpu().double().mean(0).to(weight.dtype) if usable else mean
        whole[token] = row.to(whole.device)
    return whole


@contextmanager
def whole(weights: list[nn.Parameter], *, changed: bool = False) -> Iterator[None]:
    """Bring weights together that ZeRO-3 has cut over the ranks.

    Args:
        weights: Of a model that is loaded, cut or not.
        changed: Whether every rank changes them alike; the change is kept.
    """
    if not any(hasattr(weight, "ds_id") for weight in weights):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights, modifier_rank=0 if changed else None):
        yield


def gather_beside_rows(model: nn.Module) -> None:
    """Have ZeRO-3 gather what PEFT's layers of trained rows read: the weight of the layer inside, and the rows.

    Both belong to modules inside them whose own forward pass is not called, so DeepSpeed would leave them cut.

    Args:
        model: With PEFT's layers, where it has any.
    """
    import deepspeed

    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            for parameter in (layer.get_base_layer().weight, *layer.trainable_tokens_delta.values()):
                deepspeed.zero.register_external_parameter(layer, parameter)


def trained_rows(network: Any, new_tokens: Sequence[int]) -> dict[str, list[int]]:  # noqa: ANN401
    """Which rows of which modules PEFT trains beside LoRA (its trainable_token_indices).

    Args:
        network: After add_rows.
        new_tokens: Their ids.

    Returns:
        Name of the embedding, and of an output layer that is not tied to it, to the ids.

    Raises:
        TrainerError: The output layer has a bias, which PEFT (0.21.2) leaves out beside trained rows.
    """
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise TrainerError(
            "model.new_tokens with lora: the model's output layer has a bias, which PEFT leaves out where single rows "
            "are trained: use tuning.method full"
        )
    names = {id(module): name for name, module in network.named_modules()}
    modules = [embedding] if head.weight is embedding.weight else [embedding, head]
    return {names[id(module)]: sorted(new_tokens) for module in modules}


def require_trained_rows(network: Any) -> None:  # noqa: ANN401
    """Refuse a model whose new rows would stay as they began.

    Args:
        network: With requires_grad set.

    Raises:
        TrainerError: The embedding or the output layer is not trained.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for module in (network.get_input_embeddings(), network.get_output_embeddings()):
        if not module.weight.requires_grad:
            name = names[id(module.weight)]
            raise TrainerError(
                f"model.new_tokens: {name} is not trained, so the new tokens would never be learned: add it to "
                "tuning.names, or use tuning.method full or lora"
            )
