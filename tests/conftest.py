"""What several test folders share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.config import ClusterConfig
from launcher.ray_cluster import Resources, ray_cluster


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of this repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Resources]:
    """A private Ray cluster of this machine, as a run starts it; stopped when the test file ends."""
    with ray_cluster(ClusterConfig()) as resources:
        yield resources
