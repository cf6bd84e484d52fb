"""Waiting for GPUs, on a stand-in for the driver's library: no GPU is at hand."""
# ruff: noqa: N802 - the names of NVML

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from evaluation.errors import EvaluationError
from evaluation.gpu import wait_until_free

GIB = 2**30


@dataclass
class Device:
    uuid: str
    held: list[int]  # GiB at each look; the last one stays
    instances: list["Device"] = field(default_factory=list)
    looks: int = 0


class Nvml:
    """What the module uses of pynvml."""

    class NVMLError(Exception):
        pass

    def __init__(self, *devices: Device) -> None:
        self.devices = devices

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Device:
        return self.devices[index]

    def nvmlDeviceGetUUID(self, device: Device) -> str:
        return device.uuid

    def nvmlDeviceGetName(self, device: Device) -> bytes:
        return b"NVIDIA H100"

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Device) -> int:
        if not device.instances:
            raise self.NVMLError
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Device, index: int) -> Device:
        if index >= len(device.instances):
            raise self.NVMLError
        return device.instances[index]

    def nvmlDeviceGetMemoryInfo(self, device: Device) -> SimpleNamespace:
        held = device.held[min(device.looks, len(device.held) - 1)]
        device.looks += 1
        return SimpleNamespace(total=80 * GIB, free=(80 - held) * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, device: Device) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=123, usedGpuMemory=10 * GIB), SimpleNamespace(pid=7, usedGpuMemory=None)]

    def nvmlSystemGetProcessName(self, pid: int) -> bytes:
        if pid != 123:
            raise self.NVMLError
        return b"python"


def waited(nvml: Nvml, share: float = 0.9) -> int:
    sleeps: list[float] = []
    wait_until_free(share, "generation.gpu_memory_share", wait_s=5, nvml=nvml, sleep=sleeps.append)
    return len(sleeps)


@pytest.fixture(autouse=True)
def all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_it_waits_until_the_last_owner_is_gone() -> None:
    assert waited(Nvml(Device("GPU-a", [0]), Device("GPU-b", [70, 40, 8]))) == 2
    assert waited(Nvml(Device("GPU-a", [40])), share=0.5) == 0


def test_who_still_holds_it_is_named() -> None:
    with pytest.raises(EvaluationError) as error:
        waited(Nvml(Device("GPU-a", [40])))
    assert str(error.value) == (
        "NVIDIA H100 (GPU-a) has 40,960 of 81,920 MiB free, held by process 123 (python, 10,240 MiB), process 7 (name "
        "unknown, unknown). generation.gpu_memory_share = 0.9 was waited for for 5 s: end these processes, or lower "
        "generation.gpu_memory_share"
    )


@pytest.mark.parametrize(
    ("visible", "looked_at"),
    [
        ("1", ["b"]),
        ("GPU-c", ["c"]),
        ("0,GPU-b", ["a", "b"]),
        ("", []),
        ("-1", []),
        ("1,9,0", ["b"]),
        ("MIG-2", ["m2"]),
        ("3", ["m1"]),
    ],
)
def test_only_the_gpus_of_this_process_count(
    visible: str, looked_at: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices = {name: Device(f"GPU-{name}", [0]) for name in "abc"}
    instances = {"m1": Device("MIG-1", [0]), "m2": Device("MIG-2", [0])}
    cut = Device("GPU-d", [0], list(instances.values()))
    waited(Nvml(*devices.values(), cut))
    assert [name for name, device in {**devices, **instances, "d": cut}.items() if device.looks] == looked_at


def test_a_worker_looks_at_its_own_gpu_alone() -> None:
    devices = [Device("GPU-a", [70]), Device("GPU-b", [0])]
    wait_until_free(0.9, "training", device=1, wait_s=0, nvml=Nvml(*devices))
    assert [device.looks for device in devices] == [0, 1]


def test_without_a_driver_there_is_nothing_to_wait_for() -> None:
    wait_until_free(0.9, "generation.gpu_memory_share")
