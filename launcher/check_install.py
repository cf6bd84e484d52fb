"""Import every package that a run needs, and say why torch sees no GPU where the installation is one for CUDA.

Usage: python -m launcher.check_install [cpu|cuda]

Exit codes: 0, all can be imported and, for cuda, torch sees a GPU; 1, a package is missing, broken or of the other
device; 3, all can be imported and torch sees no GPU: a login node, or a driver or a setting to fix.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation import gpu

NEEDED = (
    "torch",
    "transformers",
    "datasets",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "ray.train",
    "ray.data.llm",
    "vllm",
)
# The first driver for each CUDA release (NVIDIA's CUDA compatibility tables, Linux).
OLDEST_DRIVER = {12: 525, 13: 580}
NO_GPU = 3


@dataclass(frozen=True)
class Machine:
    """What decides whether torch sees a GPU.

    Attributes:
        torch_cuda: CUDA release that torch was built for, such as 13.0; None is a CPU build.
        oldest_arch: Oldest compute capability that torch has kernels for, such as 75; None where unknown.
        driver: The driver's version, such as 580.65.06; None where none answers.
        num_driver_gpus: GPUs that the driver lists; None where none answers.
        device_files: Names of /dev/nvidia* and, under WSL, /dev/dxg.
        visible_devices: CUDA_VISIBLE_DEVICES; None where it is not set.
        is_wsl: Whether this is Windows' Linux.
        capability: Compute capability of the first GPU, such as 70; None where torch sees none.
    """

    torch_cuda: str | None
    oldest_arch: int | None = None
    driver: str | None = None
    num_driver_gpus: int | None = None
    device_files: Sequence[str] = ()
    visible_devices: str | None = None
    is_wsl: bool = False
    capability: int | None = None


def why_no_gpu(machine: Machine) -> str | None:
    """Return why torch can't use a GPU here, and the way out; None where it can. Pure.

    Args:
        machine: What was found.

    Returns:
        One line, or None.
    """
    if machine.torch_cuda is None:
        return "torch is a CPU build; install the CUDA build with: make setup DEVICE=cuda"
    if machine.capability is not None:
        if machine.oldest_arch is None or machine.capability >= machine.oldest_arch:
            return None
        return (
            f"the GPU has compute capability {_dotted(machine.capability)}, and this torch has kernels from "
            f"{_dotted(machine.oldest_arch)} on: use a newer GPU (CUDA 13 left out Volta, such as the V100)"
        )
    return _why_none_is_seen(machine, machine.torch_cuda)


def _why_none_is_seen(machine: Machine, cuda: str) -> str:
    if machine.visible_devices is not None and machine.visible_devices.strip() in ("", "-1", "NoDevFiles"):
        return (
            f"CUDA_VISIBLE_DEVICES is {machine.visible_devices!r}, which hides every GPU: unset it; under Slurm it "
            "means that the job was given none (--gpus-per-node)"
        )
    if machine.driver is None:
        return _no_driver(machine)
    oldest = OLDEST_DRIVER.get(int(cuda.partition(".")[0]), 0)
    if int(machine.driver.partition(".")[0]) < oldest:
        return (
            f"the NVIDIA driver is {machine.driver}, and CUDA {cuda} needs {oldest} or newer: update the driver "
            "(this torch has no wheels for CUDA 12.8)"
        )
    if machine.num_driver_gpus == 0:
        return (
            f"the NVIDIA driver ({machine.driver}) lists no GPU: run `nvidia-smi`; a container needs --nv (apptainer) "
            "or --gpus all (docker)"
        )
    return (
        f"the NVIDIA driver ({machine.driver}) is new enough and torch still sees no GPU: run `nvidia-smi`, and "
        'python -c "import torch; torch.cuda.init()" for the cause'
    )


def _no_driver(machine: Machine) -> str:
    if machine.is_wsl:
        return (
            "this is WSL, and Windows' NVIDIA driver is not found (/usr/lib/wsl/lib/libcuda.so.1): install it on "
            "Windows, none inside WSL"
        )
    if machine.device_files:
        return (
            f"{', '.join(machine.device_files)} are there and the driver's library libcuda.so.1 is not: a container "
            "needs --nv (apptainer) or --gpus all (docker); else install the driver"
        )
    return "there is no NVIDIA driver here: no /dev/nvidia* and no libcuda.so.1. On a login node this is expected"


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def look() -> Machine:
    """Return what this machine and its torch have; starts nothing on a GPU but the driver's own look."""
    import torch

    driver, num_gpus = _driver()
    arches = [int(name.removeprefix("sm_")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    version = Path("/proc/version")
    return Machine(
        torch_cuda=torch.version.cuda,
        oldest_arch=min(arches, default=None),
        driver=driver,
        num_driver_gpus=num_gpus,
        device_files=sorted(str(file) for pattern in ("nvidia*", "dxg") for file in Path("/dev").glob(pattern)),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        is_wsl=version.is_file() and "microsoft" in version.read_text(errors="replace").lower(),
        capability=10 * major + minor if major else None,
    )


def _driver() -> tuple[str | None, int | None]:
    """The driver's version and its number of GPUs, from its own library (NVML), which needs no GPU to answer."""
    with gpu.driver() as nvml:
        if nvml is None:
            return None, None
        return gpu.text_of(nvml.nvmlSystemGetDriverVersion()), int(nvml.nvmlDeviceGetCount())


def main(arguments: Sequence[str]) -> int:
    """Import each package; print what failed and why.

    Args:
        arguments: The device that was installed for, cpu or cuda; cpu where none is given.

    Returns:
        The exit code.
    """
    device = arguments[0] if arguments else "cpu"
    if device not in ("cpu", "cuda"):
        print(f"{device}: no such device; give cpu or cuda", file=sys.stderr)
        return 2
    failed = []
    for name in (*NEEDED, *(("liger_kernel.transformers",) if device == "cuda" else ())):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - whatever breaks an import is what is reported
            failed.append(f"  import {name}: {type(error).__name__}: {error}")
    if failed:
        print("the installation is broken:", *failed, sep="\n", file=sys.stderr)
        print(f"remove {sys.prefix} and run `make setup DEVICE={device}` again", file=sys.stderr)
        return 1
    print("installed: all packages can be imported")
    if device == "cpu":
        return 0
    machine = look()
    reason = why_no_gpu(machine)
    if reason is None:
        print(f"torch sees a GPU; driver {machine.driver}, CUDA {machine.torch_cuda}")
        return 0
    print(f"torch sees no GPU that it can use: {reason}", file=sys.stderr)
    return 1 if machine.torch_cuda is None else NO_GPU


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
