"""The NVIDIA GPUs that a process here may use, as the driver and CUDA_VISIBLE_DEVICES name them; and the usual cards.

NVML, the driver's own library, lists the GPUs for Ray as well (ray._private.accelerators.nvidia_gpu); it is there
under WSL2 and in containers, where /proc/driver/nvidia is not. It is called through ctypes, since no package that
the launcher may import brings a binding.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

MIB = 2**20
_TEXT_BYTES = 96  # NVML's longest name and UUID


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one instance (MIG) of a GPU that is cut into several.

    Attributes:
        name: The driver's name, such as NVIDIA H100 80GB HBM3.
        uuid: GPU-... or MIG-...
        memory: Bytes, as nvidia-smi reports them.
        capability: Compute capability, such as (9, 0); None where the driver does not give it.
        instances: Its MIG instances; empty where it is not cut.
    """

    name: str
    uuid: str
    memory: int
    capability: tuple[int, int] | None = None
    instances: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Card:
    """A kind of GPU that sites offer.

    Attributes:
        words: Pattern of its name in Slurm's types and constraints and in the driver's names.
        memory: Bytes, as nvidia-smi reports them; of the smallest where it is sold in several sizes.
        capability: Compute capability.
    """

    words: str
    memory: int
    capability: tuple[int, int]


# The first that matches counts: sizes before the bare name, whose size is then the smallest that is sold.
CARDS = (
    Card(r"gb300|b300", 275_040 * MIB, (10, 3)),
    Card(r"gb200|b200", 183_359 * MIB, (10, 0)),
    Card(r"gh200.*144", 147_456 * MIB, (9, 0)),
    Card(r"gh200", 97_871 * MIB, (9, 0)),
    Card(r"h200", 143_771 * MIB, (9, 0)),
    Card(r"h100.*nvl|h100.*9[46]|h20\b", 95_830 * MIB, (9, 0)),
    Card(r"h100|h800", 81_559 * MIB, (9, 0)),
    Card(r"a100.*80|a800", 81_920 * MIB, (8, 0)),
    Card(r"a100", 40_960 * MIB, (8, 0)),
    Card(r"a30\b", 24_576 * MIB, (8, 0)),
    Card(r"l40s?\b", 46_068 * MIB, (8, 9)),
    Card(r"l4\b", 23_034 * MIB, (8, 9)),
    Card(r"a40\b", 46_068 * MIB, (8, 6)),
    Card(r"a10g?\b", 23_028 * MIB, (8, 6)),
    Card(r"(rtx.?)?a6000", 49_140 * MIB, (8, 6)),
    Card(r"(rtx.?)?pro.?6000", 97_887 * MIB, (12, 0)),
    Card(r"(rtx.?)?6000.?ada", 49_140 * MIB, (8, 9)),
    Card(r"(rtx.?)?5090", 32_607 * MIB, (12, 0)),
    Card(r"(rtx.?)?4090", 24_564 * MIB, (8, 9)),
    Card(r"(rtx.?)?3090", 24_576 * MIB, (8, 6)),
    Card(r"(rtx.?)?2080.?ti", 11_264 * MIB, (7, 5)),
    Card(r"v100s?.*32", 32_768 * MIB, (7, 0)),
    Card(r"v100", 16_384 * MIB, (7, 0)),
    Card(r"t4\b", 15_360 * MIB, (7, 5)),
)


def card_of(words: str) -> Card | None:
    """The card that a Slurm type, a feature or a driver's name means. Pure.

    >>> [card_of(words).memory // MIB for words in ("h100", "gpu:a100_80gb", "a100", "NVIDIA L40S", "v100-sxm2-32gb")]
    [81559, 81920, 40960, 46068, 32768]
    >>> card_of("fastgpu")

    Args:
        words: The text, in any case.

    Returns:
        The first card of the table whose pattern is in it; None where none is.
    """
    text = words.casefold().replace("_", "-")
    return next((card for card in CARDS if re.search(rf"(?<![a-z0-9])({card.words})", text)), None)


def visible_gpus(environment: Mapping[str, str] | None = None) -> tuple[Gpu, ...]:
    """The GPUs that CUDA gives a process that starts here.

    Args:
        environment: The process's variables; None takes this process's own.

    Returns:
        One entry for each device of that process; none where there is no driver.
    """
    return chosen(_driver_gpus(), (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES"))


def chosen(gpus: Sequence[Gpu], visible: str | None) -> tuple[Gpu, ...]:
    """Which of the driver's GPUs CUDA_VISIBLE_DEVICES leaves. Pure.

    As CUDA reads it: indices or the beginnings of UUIDs, up to the first word that names no device; a GPU that is cut
    into instances gives its first one where an index names it. Indices count in the driver's order, as under
    CUDA_DEVICE_ORDER=PCI_BUS_ID, which matters only where a machine has several kinds of GPU.

    >>> two = (Gpu("A", "GPU-aa", 1), Gpu("B", "GPU-bb", 2))
    >>> [[gpu.name for gpu in chosen(two, visible)] for visible in (None, "", "-1", "1", "1,0", "GPU-b", "0,7,1")]
    [['A', 'B'], [], [], ['B'], ['B', 'A'], ['B'], ['A']]

    Args:
        gpus: The driver's, in its order.
        visible: The variable's value; None where it is not set.

    Returns:
        The devices.
    """
    usable = [gpu.instances[0] if gpu.instances else gpu for gpu in gpus]
    if visible is None:
        return tuple(usable)
    by_uuid = [*gpus, *(instance for gpu in gpus for instance in gpu.instances)]
    found: list[Gpu] = []
    for word in (part.strip() for part in visible.split(",")):
        if word.isdecimal():
            named = usable[int(word)] if int(word) < len(usable) else None
        else:
            named = next((gpu for gpu in by_uuid if word and gpu.uuid.startswith(word)), None)
        if named is None or named in found:
            break
        found.append(named)
    return tuple(found)


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _driver_gpus() -> tuple[Gpu, ...]:
    """All GPUs that the driver lists; none without a driver, or where it can't be asked."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ()
    if nvml.nvmlInit_v2():
        return ()
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return ()
        return tuple(
            _gpu(nvml, handle, instances=True)
            for index in range(count.value)
            if (handle := _handle(nvml.nvmlDeviceGetHandleByIndex_v2, ctypes.c_uint(index))) is not None
        )
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: ctypes.CDLL, handle: ctypes.c_void_p, *, instances: bool) -> Gpu:
    memory, major, minor = _Memory(), ctypes.c_int(), ctypes.c_int()
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    unknown = nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    return Gpu(
        name=_text(nvml.nvmlDeviceGetName, handle),
        uuid=_text(nvml.nvmlDeviceGetUUID, handle),
        memory=memory.total,
        capability=None if unknown else (major.value, minor.value),
        instances=tuple(_gpu(nvml, cut, instances=False) for cut in _instances(nvml, handle)) if instances else (),
    )


def _instances(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> Iterator[ctypes.c_void_p]:
    current, pending, count = ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
    if nvml.nvmlDeviceGetMigMode(handle, ctypes.byref(current), ctypes.byref(pending)) or not current.value:
        return
    if nvml.nvmlDeviceGetMaxMigDeviceCount(handle, ctypes.byref(count)):
        return
    for index in range(count.value):
        instance = _handle(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, ctypes.c_uint(index))
        if instance is not None:
            yield instance


def _handle(function: ctypes._FuncPointer, *arguments: object) -> ctypes.c_void_p | None:
    handle = ctypes.c_void_p()
    return None if function(*arguments, ctypes.byref(handle)) else handle


def _text(function: ctypes._FuncPointer, handle: ctypes.c_void_p) -> str:
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    return "" if function(handle, text, ctypes.c_uint(_TEXT_BYTES)) else text.value.decode(errors="replace")
