"""GPUs as CUDA gives them to a process, from a stand-in of the driver's library, and as Ray counts them."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import gpus
from launcher.gpus import MIB, card_of
from tests.launcher.stand_in_gpus import driver, h100s

LISTED = """
import json, os, sys
from launcher.ray_cluster import local_resources
from launcher.gpus import visible_gpus

def listed(visible):
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    os.environ |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = local_resources()
    return [found.num_gpus, found.gpu_memory, found.capability, [gpu.uuid for gpu in visible_gpus()]]

print(json.dumps([listed(visible) for visible in json.loads(sys.argv[1])]))
"""
CUT = [
    f"NVIDIA A100-SXM4-40GB;GPU-aaaa;{40_960 * MIB};8;0",
    f"+NVIDIA A100-SXM4-40GB MIG 3g.20gb;MIG-1111;{19_968 * MIB};8;0",
    f"+NVIDIA A100-SXM4-40GB MIG 2g.10gb;MIG-2222;{9_856 * MIB};8;0",
    f"NVIDIA A100-SXM4-40GB;GPU-bbbb;{40_960 * MIB};8;0",
]
CASES: list[tuple[str | None, list[str]]] = [
    (None, ["MIG-1111", "GPU-bbbb"]),  # of a GPU that is cut, CUDA takes the first instance
    ("", []),
    ("-1", []),
    ("1", ["GPU-bbbb"]),
    ("0,-1,1", ["MIG-1111"]),
    ("GPU-bb", ["GPU-bbbb"]),
    ("MIG-2222,MIG-1111", ["MIG-2222", "MIG-1111"]),
    ("GPU-none", []),
]


def listed(variables: dict[str, str], *visible: str | None) -> list[object]:
    command = [sys.executable, "-c", LISTED, json.dumps(visible)]
    environment = os.environ | variables
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return list(json.loads(answer.stdout))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, object]:
    """What a process finds, by its CUDA_VISIBLE_DEVICES."""
    values = [visible for visible, _ in CASES]
    return dict(zip(values, listed(driver(tmp_path_factory.mktemp("driver"), *CUT), *values), strict=True))


@pytest.mark.parametrize(("visible", "uuids"), CASES)
def test_only_what_cuda_gives_is_counted(
    visible: str | None, uuids: list[str], found: dict[str | None, object]
) -> None:
    sizes = {"MIG-2222": 9_856, "MIG-1111": 19_968, "GPU-bbbb": 40_960}
    memory = min((sizes[uuid] * MIB for uuid in uuids), default=None)
    assert found[visible] == [len(uuids), memory, [8, 0] if uuids else None, uuids]


def test_without_a_driver_there_are_none(tmp_path: Path) -> None:
    nothing = [[0, None, None, []]]
    assert listed({"LD_LIBRARY_PATH": str(tmp_path)}, None) == nothing
    assert listed(driver(tmp_path) | {"STAND_IN_GPUS": str(tmp_path / "none")}, None) == nothing


RAY = """
import json
from launcher.config import ClusterConfig
from launcher.ray_cluster import local_resources, ray_cluster
with ray_cluster(ClusterConfig(device={device!r})) as resources:
    print(json.dumps([local_resources().num_gpus, resources.num_gpus]))
"""


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [
        ("-1", "auto", [0, 0]),
        pytest.param("0,1", "auto", [2, 2], marks=pytest.mark.slow),
        pytest.param("0", "cpu", [1, 0], marks=pytest.mark.slow),
    ],
)
def test_ray_counts_the_same_gpus(visible: str, device: str, expected: list[int], tmp_path: Path) -> None:
    environment = os.environ | driver(tmp_path, *h100s(4)) | {"CUDA_VISIBLE_DEVICES": visible}
    command = [sys.executable, "-c", RAY.format(device=device)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100)
    assert json.loads(answer.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize(
    ("words", "gib"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6),
        ("h100", 79.6),
        ("nvidia_h200", 140.4),
        ("NVIDIA GH200 480GB", 95.6),
        ("b200", 179.1),
        ("a100", 40.0),
        ("a100-80g", 80.0),
        ("A100-PCIE-40GB", 40.0),
        ("L40S", 45.0),
        ("l4", 22.5),
        ("a10", 22.5),
        ("rtx4090", 24.0),
        ("NVIDIA GeForce RTX 3090", 24.0),
        ("Tesla_V100-SXM2-32GB", 32.0),
        ("v100", 16.0),
        ("tesla-t4", 15.0),
    ],
)
def test_usual_cards_are_known_by_their_words(words: str, gib: float) -> None:
    card = card_of(words)
    assert card is not None
    assert round(card.memory / 2**30, 1) == gib


@pytest.mark.parametrize("words", ["gpu", "big", "la40x", "mi300x", "shard", "1g.10gb"])
def test_other_words_are_no_card(words: str) -> None:
    assert card_of(words) is None


def test_the_examples_hold() -> None:
    assert doctest.testmod(gpus).failed == 0
