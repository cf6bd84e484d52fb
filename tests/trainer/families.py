"""Tiny models of the architecture families that transformers and vLLM share, with random weights, as folders."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

VOCABULARY = 300
# Heads of 32, which vLLM's attention on CPUs takes; windows shorter than most documents of the tests.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24, "tie_word_embeddings": True}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"head_dim": 32, "sliding_window": 24},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "gpt2": {"num_key_value_heads": None, "n_inner": 96},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": _EXPERTS | {"head_dim": 32, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "olmoe": _EXPERTS | {"num_key_value_heads": 2},
}
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")


def five_steps(lr: float) -> dict[str, object]:
    """The training section of a run of five steps on two ranks, the same for every family."""
    return {
        "num_workers": 2,
        "precision": "fp32",
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "num_epochs": 50,
        "max_steps": 5,
        "lr": lr,
    }


def build(family: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write a model of a family and the tokenizer; larger weights than usual make answers differ."""
    sizes = {name: value for name, value in (_SIZES | FAMILIES[family]).items() if value is not None}
    stop = tokenizer.eos_token_id
    config = AutoConfig.for_model(
        family.partition("-")[0], **sizes, eos_token_id=stop, bos_token_id=stop, pad_token_id=tokenizer.pad_token_id
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.ndim > 1 else 1)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
