"""Why torch sees no GPU: from stand-ins for the machine, for none of these can be had here."""

from __future__ import annotations

import re

import pytest

from launcher.check_install import Machine, why_no_gpu


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (Machine(None), "torch is a CPU build; .*make setup DEVICE=cuda"),
        (Machine("13.0"), "no NVIDIA driver here: no /dev/nvidia.*login node"),
        (Machine("13.0", driver="570.86.15", num_driver_gpus=8), r"driver is 570.86.15, and CUDA 13.0 needs 580 or"),
        (Machine("12.6", driver="470.10", num_driver_gpus=8), "CUDA 12.6 needs 525"),
        (Machine("13.0", visible_devices="", driver="580.65", num_driver_gpus=8), "CUDA_VISIBLE_DEVICES is ''"),
        (Machine("13.0", visible_devices="NoDevFiles"), "the job was given none"),
        (Machine("13.0", is_wsl=True), "this is WSL, and Windows' NVIDIA driver"),
        (Machine("13.0", device_files=["/dev/nvidia0"]), "/dev/nvidia0 are there .*--nv"),
        (Machine("13.0", driver="580.65.06", num_driver_gpus=0), "lists no GPU"),
        (Machine("13.0", driver="580.65.06", num_driver_gpus=1), "torch.cuda.init"),
        (Machine("13.0", 75, "580.65.06", 1, capability=70), r"capability 7.0, .*kernels from 7.5 on"),
    ],
)
def test_each_reason_is_named_with_its_way_out(machine: Machine, said: str) -> None:
    reason = why_no_gpu(machine)
    assert reason is not None
    assert re.search(said, reason), reason


@pytest.mark.parametrize(
    "machine",
    [
        Machine("13.0", 75, "580.65.06", 8, capability=90),
        Machine("13.0", 75, "590.1", 1, visible_devices="3", capability=75),
        Machine("13.0", 75, "580.65.06", 1, device_files=["/dev/dxg"], is_wsl=True, capability=89),
    ],
)
def test_a_gpu_that_torch_can_use_needs_no_reason(machine: Machine) -> None:
    assert why_no_gpu(machine) is None
