"""Attention inside packs: each document attends to itself alone, without an L x L mask."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trainer.devices import AMPERE, Capability

PACKED_SDPA = "packed_sdpa"
PACKED_VARLEN = "packed_varlen"


def register() -> None:
    """Make the backends of this file known to transformers by name; calling it again changes nothing."""
    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    AttentionInterface.register(PACKED_VARLEN, packed_varlen)


def flash_takes(capability: Capability, dtype: torch.dtype, head_size: int) -> bool:
    """Whether PyTorch's FlashAttention, forward and backward, computes this on such a GPU.

    The limits of torch 2.13's aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, and of sdp_utils.cpp for
    the backward pass: its kernels for heads of 193 to 224 do not fit the shared memory of sm86, sm89 and sm12x.

    >>> flash_takes((9, 0), torch.bfloat16, 128), flash_takes((7, 5), torch.float16, 128)
    (True, False)

    Args:
        capability: Of the GPU.
        dtype: Of queries, keys and values.
        head_size: Numbers in a head.

    Returns:
        The answer.
    """
    if capability < AMPERE or dtype not in (torch.float16, torch.bfloat16):
        return False
    small_memory = capability in ((8, 6), (8, 9)) or capability[0] == 12
    return head_size % 8 == 0 and head_size <= 256 and not (small_memory and 192 < head_size <= 224)


def takes_groups(query: Tensor) -> bool:
    """Whether scaled_dot_product_attention has a fused kernel for fewer key heads than query heads here.

    On GPUs only FlashAttention has one; elsewhere PyTorch would fall back to its kernel that keeps all scores.

    Args:
        query: [batch, heads, length, head size].

    Returns:
        The answer.
    """
    if query.device.type != "cuda":
        return True
    return flash_takes(torch.cuda.get_device_capability(query.device), query.dtype, query.shape[-1])


def document_lengths(position_ids: Tensor) -> list[int]:
    """Lengths of the documents of a batch, one sequence after the other; one begins where the position is 0.

    >>> document_lengths(torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]))
    [3, 2, 1, 6]

    Args:
        position_ids: [batch, length], int64; on the CPU, so that no GPU is waited for.

    Returns:
        At least one per sequence; they add up to batch x length.
    """
    starts = position_ids == 0
    starts[:, 0] = True
    edges = [*starts.flatten().nonzero().flatten().tolist(), starts.numel()]
    return [last - first for first, last in pairwise(edges)]


def boundaries(position_ids: Tensor, backend: str, device: torch.device) -> dict[str, Any]:
    """What a backend is told about where documents end, beside the position_ids.

    transformers' flash_attention finds boundaries in position_ids only in batches of one sequence, so it is told.

    Args:
        position_ids: [batch, length], int64, on the CPU.
        backend: Name of the attention.
        device: Where the model is.

    Returns:
        Keyword arguments of the decoder's forward pass; none for backends that read the position_ids.
    """
    if backend in ("eager", "sdpa", "flex_attention"):
        return {}
    lengths = document_lengths(position_ids)
    if backend == PACKED_SDPA:
        return {"document_lengths": lengths}
    edges = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    document_lengths: list[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention of every document by itself: the cost is the sum of squared document lengths.

    On the CPU the scores are computed in fp32 whatever the input is: PyTorch's bf16 backward pass takes about five
    times as long there.

    Args:
        module: The attention layer that calls (part of transformers' interface).
        query: [batch, heads, length, head size].
        key: [batch, key heads, length, head size].
        value: As key.
        attention_mask: Must be None: the lengths say what a mask would.
        document_lengths: What the function of that name returned for this batch.
        scaling: Factor on the scores; None means 1 / sqrt(head size).
        dropout: Share of the attention weights set to 0.
        sliding_window: Must be at least the longest document.

    Returns:
        [batch, length, heads, head size], and None for the attention weights.

    Raises:
        ValueError: A mask, or a window that would cut a document.
    """
    if attention_mask is not None:
        raise ValueError(f"{PACKED_SDPA} takes no attention mask")
    if sliding_window is not None and sliding_window < max(document_lengths):
        raise ValueError(f"{PACKED_SDPA} knows no sliding window (of {sliding_window}): set model.attention to sdpa")
    batch, heads, length, head_size = query.shape
    compute_type = torch.float32 if query.device.type == "cpu" else query.dtype
    if key.shape[1] != heads and not takes_groups(query):
        key, value = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (key, value))
    documents = (_documents(tensor.to(compute_type), document_lengths) for tensor in (query, key, value))
    answers = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True)
        for q, k, v in zip(*documents, strict=True)
    ]
    flat = torch.cat(answers, dim=2).to(query.dtype)
    return flat.transpose(1, 2).reshape(batch, length, heads, head_size), None


def _documents(tensor: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Each document's part of [batch, heads, length, head size], as [1, heads, document's length, head size]."""
    return tensor.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2).split(lengths, dim=2)


def packed_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The same by PyTorch's own variable-length FlashAttention: one kernel for all documents, GPU and 16 bit only.

    Args:
        module: The attention layer that calls.
        query: [batch, heads, length, head size].
        key: [batch, key heads, length, head size].
        value: As key.
        attention_mask: Must be None.
        cu_seq_lens_q: [documents + 1], int32: where each document begins in the flattened batch, and the end.
        max_length_q: Longest document, in tokens.
        scaling: Factor on the scores; None means 1 / sqrt(head size).
        dropout: Must be 0.
        sliding_window: Tokens that a token sees, itself included; None means all before it.

    Returns:
        [batch, length, heads, head size], and None for the attention weights.

    Raises:
        ValueError: A mask, or dropout.
    """
    if attention_mask is not None or dropout:
        raise ValueError(
            f"{PACKED_VARLEN} takes no attention mask and no attention dropout: set model.attention to sdpa"
        )
    batch, heads, length, head_size = query.shape
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    seen = -1 if sliding_window is None else sliding_window - 1
    edges = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    answer = varlen_attn(q, k, v, *edges, scale=scaling, window_size=(seen, 0), enable_gqa=True)
    return answer.view(batch, length, heads, head_size), None
