"""What several test folders share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.config import ClusterConfig
from launcher.ray_cluster import Resources, ray_cluster

HEAVY = {
    "test_attempt.py",
    "test_checkpoint.py",
    "test_end_to_end.py",
    "test_engine_memory.py",
    "test_engine_placement.py",
    "test_exactness.py",
    "test_export.py",
    "test_generate.py",
    "test_generation_processes.py",
    "test_harness.py",
    "test_judge_vllm_server.py",
    "test_loading.py",
    "test_matrix.py",
    "test_peer.py",
    "test_placement.py",
    "test_ray_cluster.py",
    "test_ray_export.py",
    "test_ray_failures.py",
    "test_ray_jobs.py",
    "test_ray_prepare.py",
    "test_ray_training.py",
    "test_resume.py",
    "test_slurm_cluster.py",
}
"""Files that start Ray, vLLM, Slurm or several workers: one at a time, for two would starve each other."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep each file in one process, and all heavy ones in the same, where tests run in several processes."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        group = "heavy" if item.path.name in HEAVY else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of this repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Resources]:
    """A private Ray cluster of this machine, as a run starts it; stopped when the test file ends."""
    with ray_cluster(ClusterConfig()) as resources:
        yield resources
