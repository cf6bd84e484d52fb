"""Which attention is taken on which GPU, and that the ways to compute it agree."""

import pytest
import torch
from transformers import LlamaConfig

from trainer import attention
from trainer.attention import PACKED_SDPA, PACKED_VARLEN, flash_takes, packed_sdpa
from trainer.config import ModelConfig
from trainer.model import attention_backend, largest_head

AUTO = ModelConfig(name_or_path="owner/model")
V100, T4, A100, RTX_30, H100, RTX_50 = (7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "takes"),
    [
        (V100, torch.float16, 128, False),
        (T4, torch.float16, 64, False),
        (A100, torch.float16, 64, True),
        (H100, torch.bfloat16, 256, True),
        (H100, torch.float32, 128, False),
        (H100, torch.bfloat16, 100, False),
        (H100, torch.bfloat16, 512, False),
        (A100, torch.bfloat16, 224, True),
        (RTX_30, torch.bfloat16, 224, False),
        (RTX_50, torch.bfloat16, 200, False),
        (RTX_30, torch.bfloat16, 192, True),
        (RTX_30, torch.bfloat16, 256, True),
    ],
)
def test_what_flash_attention_computes(capability, dtype, head_size, takes):
    assert flash_takes(capability, dtype, head_size) is takes


@pytest.mark.parametrize(
    ("capability", "dtype", "changes", "backend"),
    [
        (V100, torch.float16, {}, PACKED_SDPA),
        (T4, torch.float16, {}, PACKED_SDPA),
        (A100, torch.bfloat16, {}, PACKED_VARLEN),
        (H100, torch.float32, {}, PACKED_SDPA),
        (H100, torch.bfloat16, {"head_dim": 320}, PACKED_SDPA),
        (H100, torch.bfloat16, {"attention_dropout": 0.1}, PACKED_SDPA),
    ],
)
def test_auto_takes_what_works_on_the_card(monkeypatch, capability, dtype, changes, backend):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    base = LlamaConfig(**changes)
    assert attention_backend(AUTO, base, torch.device("cuda", 0), dtype, 1024) == backend
    assert attention_backend(AUTO, base, torch.device("cpu"), dtype, 1024) == PACKED_SDPA


def test_a_head_s_size_follows_from_the_width_where_none_is_given():
    assert largest_head(LlamaConfig(hidden_size=96, num_attention_heads=3, head_dim=None)) == 32


def test_key_heads_that_are_repeated_give_what_grouped_ones_give(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 9, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2))

    def gradients():
        answer, _ = packed_sdpa(None, query, key, value, None, document_lengths=[4, 5])
        return [answer, *torch.autograd.grad(answer.square().sum(), (query, key, value))]

    grouped = gradients()
    monkeypatch.setattr(attention, "takes_groups", lambda _: False)
    for one, other in zip(grouped, gradients(), strict=True):
        torch.testing.assert_close(one, other)
