"""Base weights, and the forward pass they are trained with."""

from __future__ import annotations

import ctypes
import os
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.liger import apply_liger_kernel

from trainer.attention import PACKED_SDPA, PACKED_VARLEN, boundaries, flash_takes, register
from trainer.config import ModelConfig
from trainer.devices import attention_problems
from trainer.errors import TrainerError
from trainer.loss import summed_loss


def base_folder(config: ModelConfig, run_dir: Path) -> str:
    """Where the base weights are: a hub id or a folder.

    Args:
        config: The model section.
        run_dir: Holds base/ when the model is built from scratch.

    Returns:
        What from_pretrained takes.
    """
    return str(run_dir / "base") if config.name_or_path is None else config.name_or_path


def attention_backend(
    config: ModelConfig, base: PreTrainedConfig, device: torch.device, dtype: torch.dtype, sequence_length: int
) -> str:
    """The name transformers knows the attention by.

    Args:
        config: The model section.
        base: The base model's own configuration.
        device: Where the model will be trained.
        dtype: What is computed with.
        sequence_length: Tokens of a pack.

    Returns:
        The backend that was requested. For auto: one of this package's, which need no mask and do no work between
        documents; transformers' own where a model changes the scores before the softmax or looks back a window only.
        Of this package's the one over FlashAttention where the GPU, the dtype and the heads allow it.

    Raises:
        TrainerError: The backend can't train on this device.
    """
    if device.type == "cpu" and (problems := attention_problems(config.attention)):
        raise TrainerError(problems[0])
    if config.attention != "auto":
        return config.attention
    text = base.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) or text.model_type == "gpt_oss":  # soft caps, attention sinks
        return "eager"
    window = getattr(text, "sliding_window", None)
    if window is not None and window < sequence_length:
        return "sdpa"
    drops = any(getattr(text, name, 0.0) for name in ("attention_dropout", "attn_pdrop"))  # the latter is GPT-2's
    if device.type != "cuda" or drops:
        return PACKED_SDPA
    takes_flash = flash_takes(torch.cuda.get_device_capability(device), dtype, largest_head(text))
    return PACKED_VARLEN if takes_flash else PACKED_SDPA


def largest_head(text: PreTrainedConfig) -> int:
    """Numbers in a head of the attention; of the largest where layers differ."""
    sizes = [getattr(text, name, None) for name in ("head_dim", "global_head_dim")]
    return max((size for size in sizes if size), default=text.hidden_size // text.num_attention_heads)


def return_freed_memory(least: int) -> None:
    """Have the C library give large blocks back to the system as soon as they are freed, from now on.

    glibc raises its threshold for blocks of their own (`mallopt(3)`) up to 32 MiB with every such block that is freed.
    Larger ones then come from the heap too, where what stays keeps the gaps between it from being given back: a rank on
    CPUs that tuned with LoRA held twice its need, and ZeRO-3, which cuts one layer after another while it loads, a
    whole model. A threshold that is set is not raised any more. A low one costs speed, for the system must find pages
    for each block: at 1 MiB a small model trains 13% slower, at 512 KiB half as fast.

    Nothing is changed without glibc, or where MALLOC_MMAP_THRESHOLD_ is set in the environment.

    Args:
        least: Bytes of the smallest block that is given back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    mallopt(mmap_threshold, least)
    mallopt(trim_threshold, 64 << 20)  # what glibc would have raised it to


def load_base(
    config: ModelConfig,
    run_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    sequence_length: int,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The base model with its attention set up for packs, in training mode.

    Args:
        config: The model section.
        run_dir: The run's folder.
        dtype: Number format of the weights.
        device: Where it will be trained. A GPU gets the weights as they are read, so that the host never holds the
            model of every rank; under ZeRO-3 transformers reads them into the ranks' shares instead.
        sequence_length: Tokens of a pack.
        quantization: How the weights are held, where not as they are.

    Returns:
        The model; safetensors only, no code from the hub.

    Raises:
        TrainerError: There is no such model, it holds no safetensors weights, or the attention can't train here.
    """
    register()
    place = base_folder(config, run_dir)
    if config.from_scratch is not None and not Path(place, "config.json").is_file():
        raise TrainerError(f"there is no base model in {place}: run the prepare stage first")
    try:
        base = AutoConfig.from_pretrained(place, revision=config.revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            place,
            revision=config.revision,
            dtype=dtype,
            attn_implementation=attention_backend(config, base, device, dtype, sequence_length),
            use_safetensors=True,
            trust_remote_code=False,
            quantization_config=quantization,
            device_map=device_map(device),
        )
    except (OSError, ValueError, ImportError) as error:
        raise TrainerError(f"the base model {place} can't be loaded: {error}") from error
    model.config.use_cache = False
    return cast(PreTrainedModel, model.train())


def device_map(device: torch.device) -> dict[str, torch.device] | None:
    """Where from_pretrained puts each weight as it reads it.

    Args:
        device: Where the model will be trained.

    Returns:
        All of it on the GPU; None on the CPU, where transformers loads without accelerate, and under ZeRO-3, whose
        loading (HfDeepSpeedConfig) refuses a map.
    """
    return None if device.type == "cpu" or is_deepspeed_zero3_enabled() else {"": device}


def use_liger_kernels(model: PreTrainedModel) -> None:
    """Compute norms, rotary embedding and gated MLP by Liger's Triton kernels (arXiv:2410.10989), on GPUs.

    Its cross-entropy is left out: trainer.loss skips prompts and never holds all logits either.

    Args:
        model: Changed in place.

    Raises:
        TrainerError: There are none for this architecture.
    """
    from liger_kernel.transformers import monkey_patch  # an extra, for CUDA only

    if model.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise TrainerError(f"training.liger_kernels: there are none for {model.config.model_type}: leave it false")
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def causal_lm(model: torch.nn.Module) -> Any:  # noqa: ANN401 - every architecture has its own class
    """The Hugging Face model under a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_output(model: torch.nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """What the output layer gets to see for packed sequences; a tuned prompt goes in front of each.

    Args:
        model: What load_base returned, or a PEFT model around it.
        input_ids: [batch, length], int64, on the CPU.
        position_ids: [batch, length], int64, on the CPU; a document begins where it is 0.

    Returns:
        [batch, length, width], where the model is.
    """
    network = causal_lm(model)
    device = network.device
    embedded = network.get_input_embeddings()(input_ids.to(device))
    num_prompt = 0
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        prompt = model.get_prompt(len(input_ids)).to(embedded.dtype)
        num_prompt = prompt.shape[1]
        embedded = torch.cat([prompt, embedded], dim=1)
        before = torch.arange(num_prompt).expand(len(input_ids), -1)
        position_ids = torch.cat([before, position_ids + num_prompt], dim=1)
    hidden: Tensor = network.get_decoder()(
        inputs_embeds=embedded,
        position_ids=position_ids.to(device),
        use_cache=False,
        **boundaries(position_ids, network.config._attn_implementation, device),
    ).last_hidden_state
    return hidden[:, num_prompt:]


def scores(model: torch.nn.Module, hidden: Tensor) -> Tensor:
    """The output layer: next-token logits, scaled (Granite, Cohere) and soft-capped (Gemma 2) where the model does so.

    Args:
        model: See decoder_output.
        hidden: [..., width].

    Returns:
        [..., vocabulary].
    """
    network = causal_lm(model)
    text = network.config.get_text_config()
    logits: Tensor = network.get_output_embeddings()(hidden)
    scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
    if scale != 1.0:
        logits = logits * scale
    cap = getattr(text, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def return_the_loss(model: torch.nn.Module, num_chunks: int = 1) -> None:
    """Make calling the model return the summed cross-entropy of a batch, in nats, instead of logits.

    The forward pass is replaced on this one object and no module is put around it, so parameters keep the names that
    checkpoints and exports go by.

    Args:
        model: Called afterwards with input_ids, position_ids and labels, each [batch, length], int64, on the CPU.
        num_chunks: Parts in which the loss is computed.
    """

    def forward(input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = decoder_output(model, input_ids, position_ids)
        return summed_loss(hidden, labels, partial(scores, model), num_chunks)

    model.forward = forward
