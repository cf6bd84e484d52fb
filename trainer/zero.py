"""Configuration and world size -> DeepSpeed's JSON. Pure, so that the text can be read, compared and recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config import DeepSpeedConfig, TrainingConfig
from trainer.errors import TrainerError


def deepspeed_dict(training: TrainingConfig, deepspeed: DeepSpeedConfig, world_size: int) -> dict[str, Any]:
    """What deepspeed.initialize gets; the optimizer is passed to it as an object.

    Args:
        training: Batch, precision and clipping.
        deepspeed: Stage, and the expert's additions, merged last.
        world_size: Ranks that really run.

    Returns:
        A JSON-able dictionary.

    Raises:
        TrainerError: The global batch can't be cut evenly over these ranks.
    """
    share = world_size * training.micro_batch_size
    if training.global_batch_size % share:
        raise TrainerError(
            f"training.global_batch_size ({training.global_batch_size}) must be a multiple of ranks x "
            f"training.micro_batch_size ({world_size} x {training.micro_batch_size} = {share})"
        )
    ours: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // share,
        "gradient_clipping": training.max_grad_norm or 0.0,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_optimization": zero_section(deepspeed),
        **scaling_section(training),
        **gradient_section(training, deepspeed),
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if training.optimizer != "adamw":
        ours["zero_allow_untested_optimizer"] = True  # bitsandbytes': untested by DeepSpeed, tested here
    return merged(ours, deepspeed.raw)


def scaling_section(training: TrainingConfig) -> dict[str, Any]:
    """The fp16 part: the first loss scale, static for DeepSpeed because trainer.loss_scale chooses the later ones.

    Args:
        training: Precision and first loss scale.

    Returns:
        A JSON-able dictionary, empty for the other precisions.
    """
    if training.precision != "fp16":
        return {}
    return {"fp16": {"enabled": True, "loss_scale": 2.0**training.loss_scale_power}}


def gradient_section(training: TrainingConfig, deepspeed: DeepSpeedConfig) -> dict[str, Any]:
    """The format in which 16-bit gradients are summed over micro-batches and ranks, where it is not their own.

    Both keys are needed: without the second, DeepSpeed (0.19.8) adds up the ranks' gradients in 16 bits. At stage 1 in
    bf16 it then takes its BF16_Optimizer, which holds the whole fp32 gradient on each rank;
    `immediate_grad_update` frees each 16-bit gradient as soon as it has been added.

    Args:
        training: The precision.
        deepspeed: Stage and grad_accum_dtype.

    Returns:
        A JSON-able dictionary; empty where gradients are summed in the training's precision.
    """
    if deepspeed.grad_accum_dtype == training.precision:
        return {}
    section: dict[str, Any] = {
        "data_types": {"grad_accum_dtype": deepspeed.grad_accum_dtype},
        "communication_data_type": deepspeed.grad_accum_dtype,
    }
    if training.precision == "bf16" and deepspeed.stage == 1 and deepspeed.offload_optimizer == "none":
        section["bf16"] = {"enabled": True, "immediate_grad_update": True}
    return section


def zero_section(deepspeed: DeepSpeedConfig) -> dict[str, Any]:
    """The zero_optimization part: stage, buckets, offload.

    Args:
        deepspeed: The deepspeed section.

    Returns:
        A JSON-able dictionary.
    """
    section: dict[str, Any] = {"stage": deepspeed.stage}
    if deepspeed.stage:
        section |= {
            "reduce_bucket_size": deepspeed.bucket_elements,
            "allgather_bucket_size": deepspeed.bucket_elements,
            "contiguous_gradients": True,
        }
    section |= offload_section("offload_optimizer", deepspeed.offload_optimizer, deepspeed.nvme_path)
    section |= offload_section("offload_param", deepspeed.offload_parameters, deepspeed.nvme_path)
    return section


def offload_section(name: str, device: str, nvme_path: Path | None) -> dict[str, Any]:
    """Where one of the two offloaded kinds lies.

    Args:
        name: offload_optimizer or offload_param.
        device: none, cpu or nvme.
        nvme_path: Folder for nvme.

    Returns:
        A JSON-able dictionary, empty for none.
    """
    match device:
        case "cpu":
            return {name: {"device": "cpu", "pin_memory": True}}
        case "nvme":
            return {name: {"device": "nvme", "nvme_path": str(nvme_path), "pin_memory": True}}
    return {}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A copy of base in which over's values win; dictionaries are merged key by key.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": 4})
    {'a': {'b': 1, 'c': 3}, 'd': 4}

    Args:
        base: The values that are there.
        over: The values that win.

    Returns:
        A new dictionary.
    """
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
