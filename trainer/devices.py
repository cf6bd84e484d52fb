"""What a machine can't do of what is asked, told before anything is loaded."""

from __future__ import annotations

import os
import shutil
import sys
from ctypes.util import find_library
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from trainer.config import DeepSpeedConfig, ModelConfig, TrainingConfig
from trainer.errors import TrainerError

PIP = f"{sys.executable} -m pip install"
Capability = tuple[int, int]
"""Compute capability of a GPU, as CUDA counts it: (7, 0) is a V100, (7, 5) a T4, (8, 0) an A100, (9, 0) an H100."""
AMPERE: Capability = (8, 0)
"""The first GPUs that compute in bf16, and the first that FlashAttention has kernels for, PyTorch's included."""
# The distribution of each, as transformers 5.19 looks for it (utils/import_utils.py): flash_attn is the module of
# FlashAttention 4 too, so that the module alone says nothing.
FLASH_PACKAGES = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}
# A tracker's module, and what pip installs it by.
TRACKERS = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny sqlalchemy alembic"),
    "swanlab": ("swanlab", "swanlab"),
}


def device_problems(
    model: ModelConfig,
    training: TrainingConfig,
    deepspeed: DeepSpeedConfig,
    *,
    on_gpu: bool,
    capability: Capability | None = None,
) -> list[str]:
    """What this machine can't do of what is requested.

    Args:
        model: The model section.
        training: The training section.
        deepspeed: The deepspeed section.
        on_gpu: Whether the workers have GPUs.
        capability: Of these GPUs; None where it is not known here.

    Returns:
        A line for each; none where all of it can be done.
    """
    found = []
    if deepspeed.nvme_path is not None:
        found += nvme_problems(deepspeed.nvme_path)
    for tracker in training.trackers:
        module, packages = TRACKERS[tracker]
        if find_spec(module) is None:
            found.append(f"training.trackers needs {module}, which is not installed: {PIP} {packages}")
    if training.liger_kernels and find_spec("liger_kernel") is None:
        found.append(f"training.liger_kernels needs liger_kernel, which is not installed: {PIP} liger-kernel")
    if on_gpu:
        return found + gpu_problems(model, training, deepspeed, capability)
    return found + cpu_problems(model, training)


def cpu_problems(model: ModelConfig, training: TrainingConfig) -> list[str]:
    """What can't be done without a GPU.

    Args:
        model: The model section.
        training: The training section.

    Returns:
        A line for each.
    """
    found = attention_problems(model.attention)
    if training.precision == "fp16":
        found.append("training.precision: fp16 is for GPUs; on CPUs take bf16, which needs no loss scale, or fp32")
    if training.optimizer.startswith("paged"):
        instead = training.optimizer.removeprefix("paged_").removesuffix("_32bit")
        found.append(f"training.optimizer: {training.optimizer} moves states out of a GPU; on CPUs take {instead}")
    if training.liger_kernels:
        found.append("training.liger_kernels: these kernels are for GPUs; on CPUs leave it false")
    return found


def slow_precision(precision: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Why 16 bits are slow on this machine's CPU, in words; None where they are not, or it can't be known.

    oneDNN multiplies bf16 matrices with AVX-512 (BW, VL and DQ) or better. Without it PyTorch falls back to plain
    loops: 1.2 instead of 67 GFLOP/s on one core of an AVX2 machine, measured on a product of 512 x 576 x 1536.

    Args:
        precision: training.precision.
        cpuinfo: The kernel's table of processors.

    Returns:
        One line.
    """
    try:
        rows = [line.split() for line in cpuinfo.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    flags = next((set(row[2:]) for row in rows if row[:1] == ["flags"]), None)
    if precision == "fp32" or flags is None or {"avx512bw", "avx512vl", "avx512dq"} <= flags:
        return None
    return (
        f"training.precision: {precision} is far slower than fp32 on this CPU, which has no AVX-512 (about fifty times "
        "for large matrices): set training.precision to fp32"
    )


def gpu_problems(
    model: ModelConfig, training: TrainingConfig, deepspeed: DeepSpeedConfig, capability: Capability | None
) -> list[str]:
    """What these GPUs, or the packages installed beside them, can't do.

    Args:
        model: The model section.
        training: The training section.
        deepspeed: The deepspeed section.
        capability: Of the GPUs; None where it is not known here.

    Returns:
        A line for each.
    """
    found = card_problems(model, training, deepspeed, capability)
    if (package := FLASH_PACKAGES.get(model.attention)) is None:
        return found
    where = f"model.attention: {model.attention}"
    if not is_installed(package):
        found.append(
            f"{where} needs the package {package}, which is not installed, and no kernel is fetched from the hub: "
            f"take auto, which needs no package, or {PIP} {package}"
        )
    if training.precision == "fp32":
        found.append(f"{where} computes in 16 bits, training.precision is fp32: take auto, or bf16")
    return found


def card_problems(
    model: ModelConfig, training: TrainingConfig, deepspeed: DeepSpeedConfig, capability: Capability | None
) -> list[str]:
    """What a kind of GPU can't do, on whatever machine it is.

    Args:
        model: The model section.
        training: The training section.
        deepspeed: The deepspeed section.
        capability: Of the GPUs; None where it is not known.

    Returns:
        A line for each.
    """
    if capability is None or capability >= AMPERE:
        return []
    has = ".".join(map(str, capability))
    needs = f"needs GPUs of compute capability 8.0 or more (A100, RTX 30 and newer), these have {has}"
    found = []
    if training.precision == "bf16":
        way_out = "" if deepspeed.stage else " and deepspeed.stage to 1"
        found.append(f"training.precision: bf16 {needs}: set training.precision to fp16{way_out}")
    if model.attention in FLASH_PACKAGES:
        found.append(f"model.attention: {model.attention} {needs}: take auto")
    return found


def is_installed(package: str) -> bool:
    """Whether a distribution is installed; nothing of it is imported."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def attention_problems(attention: str) -> list[str]:
    """Why a backend can't train on CPUs.

    Args:
        attention: model.attention.

    Returns:
        One line, or none.
    """
    if attention.startswith("flex"):
        return ["model.attention: flex_attention has no backward pass on CPUs: take auto, sdpa or eager"]
    if attention.startswith("flash"):
        return [f"model.attention: {attention} needs a GPU: take auto, sdpa or eager"]
    return []


def nvme_problems(folder: Path) -> list[str]:
    """Why nothing can be swapped to a folder.

    Args:
        folder: deepspeed.nvme_path.

    Returns:
        One line, or none.
    """
    if not folder.is_dir():
        return [f"deepspeed.nvme_path: {folder} is no folder of this machine: make it on a local NVMe disk"]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [f"deepspeed.nvme_path: {folder} can't be written to by this user"]
    if find_library("aio") is None:
        return [
            "deepspeed.nvme_path: DeepSpeed swaps through libaio, which is not installed: apt-get install libaio-dev"
        ]
    return []


def refuse_small_disk(deepspeed: DeepSpeedConfig, num_trained: int, num_weights: int, num_ranks_here: int) -> None:
    """Check that what is offloaded to NVMe has room there.

    Args:
        deepspeed: What is offloaded, and where to.
        num_trained: Trained weights of a rank's share.
        num_weights: Weights of a rank's share.
        num_ranks_here: Ranks of this machine.

    Raises:
        TrainerError: There is less room than is needed.
    """
    if deepspeed.nvme_path is None:
        return
    # The fp32 master weight, two moments, and the gradient while it waits for the step; a weight has 4 bytes at most.
    each = (16 * num_trained if deepspeed.offload_optimizer == "nvme" else 0) + (
        4 * num_weights if deepspeed.offload_parameters == "nvme" else 0
    )
    needed, free = each * num_ranks_here, shutil.disk_usage(deepspeed.nvme_path).free
    if free < needed:
        raise TrainerError(
            f"deepspeed.nvme_path: {deepspeed.nvme_path} has {free:,} bytes free, the {num_ranks_here} ranks of this "
            f"machine need {needed:,}: free some, or take more workers on more machines"
        )
