"""The NVIDIA GPUs that a process here may use, as the driver and CUDA_VISIBLE_DEVICES name them; and the usual cards.

NVML, the driver's own library, lists the GPUs for Ray as well (ray._private.accelerators.nvidia_gpu).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from evaluation.gpu import driver, text_of, visible_devices

MIB = 2**20
Known = TypeVar("Known")


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one instance (MIG) of a GPU that is cut into several.

    Attributes:
        name: The driver's name, such as NVIDIA H100 80GB HBM3.
        uuid: GPU-... or MIG-...
        memory: Bytes, as nvidia-smi reports them; 0 where the driver does not give it.
        capability: Compute capability, such as (9, 0); None where the driver does not give it.
    """

    name: str
    uuid: str
    memory: int
    capability: tuple[int, int] | None = None


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


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA gives a process that starts here; none where there is no driver."""
    with driver() as nvml:
        return tuple(_gpu(nvml, device) for device in visible_devices(nvml)) if nvml else ()


def _gpu(nvml: Any, device: Any) -> Gpu:  # noqa: ANN401 - pynvml, and its handle
    def known(ask: Callable[[Any], Known]) -> Known | None:
        try:
            return ask(device)
        except nvml.NVMLError:  # not on every kind of GPU
            return None

    memory = known(nvml.nvmlDeviceGetMemoryInfo)
    return Gpu(
        name=text_of(nvml.nvmlDeviceGetName(device)),
        uuid=text_of(nvml.nvmlDeviceGetUUID(device)),
        memory=int(memory.total) if memory else 0,
        capability=known(nvml.nvmlDeviceGetCudaComputeCapability),
    )
