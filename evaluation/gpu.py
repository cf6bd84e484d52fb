"""The GPUs that CUDA gives this process, and waiting until they are free.

A process that has ended may still hold its GPU's memory for seconds, and vLLM refuses to start where less of the whole
GPU is free than its share. The driver's library (NVML) is asked, which makes no CUDA context and is there under WSL2
and in containers too. Without a driver there is no GPU, and nothing to wait for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pynvml

from evaluation.errors import EvaluationError

_MIB = 2**20
_WAIT_S = 120.0
_LOOK_S = 1.0


def wait_until_free(
    share: float,
    key: str,
    *,
    device: int | None = None,
    wait_s: float = _WAIT_S,
    nvml: Any = None,  # noqa: ANN401 - the module pynvml, or a stand-in
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until each GPU of this process has this share of its memory free.

    Args:
        share: Of each GPU's memory, what is going to be taken.
        key: The setting that says so, for the message.
        device: Which of this process's GPUs, where it uses one of several; None is all of them.
        wait_s: Longest wait, in seconds.
        nvml: The binding of the driver's library; None is pynvml.
        sleep: Waits.

    Raises:
        EvaluationError: A GPU is still held after that: how much is free, and by which processes.
    """
    with driver(nvml or pynvml) as found:
        visible = list(visible_devices(found)) if found else []
        used = visible if device is None else visible[device : device + 1]
        waited = 0.0
        while held := [words for handle in used if (words := _held(found, handle, share))]:
            if waited >= wait_s:
                raise EvaluationError(
                    f"{'; '.join(held)}. {key} = {share:g} was waited for for {wait_s:g} s: end these processes, or "
                    f"lower {key}"
                )
            sleep(_LOOK_S)
            waited += _LOOK_S


@contextmanager
def driver(nvml: Any = pynvml) -> Iterator[Any]:  # noqa: ANN401 - a module
    """Open the driver's library.

    Args:
        nvml: Its binding, or a stand-in.

    Yields:
        The binding; None where there is no driver.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def visible_devices(nvml: Any) -> Iterator[Any]:  # noqa: ANN401
    """The devices that CUDA gives this process: all, or those that CUDA_VISIBLE_DEVICES names.

    As CUDA reads it: indices or the beginnings of UUIDs, up to the first word that names no device or one again.

    Args:
        nvml: The open binding.

    Yields:
        A handle for each.
    """
    words = os.environ.get("CUDA_VISIBLE_DEVICES")
    if words is None:
        words = ",".join(str(index) for index in range(nvml.nvmlDeviceGetCount()))
    seen = set()
    for word in words.split(","):
        try:
            device = _device(nvml, word.strip())
            uuid = text_of(nvml.nvmlDeviceGetUUID(device))
        except (nvml.NVMLError, LookupError):
            return
        if uuid in seen:
            return
        seen.add(uuid)
        yield device


def _device(nvml: Any, word: str) -> Any:  # noqa: ANN401
    """The device that an index or the beginning of a UUID names; of a GPU that is cut (MIG) its first instance.

    Indices count in the order of NVML, which is CUDA's under CUDA_DEVICE_ORDER=PCI_BUS_ID and wherever all GPUs of a
    machine are of one kind.
    """
    gpus = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if word.isdecimal():
        gpu = gpus[int(word)]
        return next(_instances(nvml, gpu), gpu)
    devices = [*gpus, *(instance for gpu in gpus for instance in _instances(nvml, gpu))]
    named = [device for device in devices if word and text_of(nvml.nvmlDeviceGetUUID(device)).startswith(word)]
    return named[0]


def _instances(nvml: Any, gpu: Any) -> Iterator[Any]:  # noqa: ANN401
    try:
        most = nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)
    except nvml.NVMLError:  # no GPU of that kind
        return
    for index in range(most):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
        except nvml.NVMLError:  # an empty place
            continue


def _held(nvml: Any, device: Any, share: float) -> str | None:  # noqa: ANN401
    """What holds a device, in words; None where the share is free."""
    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    if memory.free >= share * memory.total:
        return None
    holders = ", ".join(_holders(nvml, device)) or "no process that is visible from here"
    name = f"{text_of(nvml.nvmlDeviceGetName(device))} ({text_of(nvml.nvmlDeviceGetUUID(device))})"
    return f"{name} has {memory.free // _MIB:,} of {memory.total // _MIB:,} MiB free, held by {holders}"


def _holders(nvml: Any, device: Any) -> Iterator[str]:  # noqa: ANN401
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(device)
    except nvml.NVMLError:
        return
    for process in processes:
        try:
            name = text_of(nvml.nvmlSystemGetProcessName(process.pid))
        except nvml.NVMLError:  # of another user, or it has just ended
            name = "name unknown"
        used = "unknown" if process.usedGpuMemory is None else f"{process.usedGpuMemory // _MIB:,} MiB"
        yield f"process {process.pid} ({name}, {used})"


def text_of(value: str | bytes) -> str:
    """A text of NVML, which some versions of the binding give as bytes."""
    return value.decode() if isinstance(value, bytes) else value
