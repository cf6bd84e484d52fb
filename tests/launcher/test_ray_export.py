"""The export stage's task: what it asks Ray for, and what comes back of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import LauncherError
from launcher.placement import Node
from launcher.ray_cluster import Resources
from launcher.ray_export import export_on_ray, place_of
from trainer.config import TrainerConfig
from trainer.errors import TrainerError


def config(num_workers: int = 2, threads: int = 4, gpus: int = 1) -> TrainerConfig:
    return TrainerConfig.model_validate({
        "model": {"from_scratch": {"vocab_size": 300}},
        "data": {"path": "x.json"},
        "training": {"num_workers": num_workers, "threads_per_worker": threads, "global_batch_size": num_workers},
        "export": {"tensor_parallel_size": gpus},
    })  # fmt: skip


def test_it_takes_gpus_where_they_are() -> None:
    nodes = [Node(64, 0), Node(8, 1), Node(12, 4)]
    assert place_of(config(gpus=4), nodes, use_gpu=True) == {"num_gpus": 4, "num_cpus": 12}
    assert place_of(config(gpus=1), nodes, use_gpu=True) == {"num_gpus": 1, "num_cpus": 4}


def test_on_cpus_it_takes_training_s_as_far_as_a_node_has_them() -> None:
    assert place_of(config(), [Node(16, 0)], use_gpu=False) == {"num_gpus": 0, "num_cpus": 8}
    assert place_of(config(), [Node(4, 0), Node(6, 0)], use_gpu=False) == {"num_gpus": 0, "num_cpus": 6}


def test_more_gpus_than_a_node_has_are_refused() -> None:
    with pytest.raises(LauncherError, match=r"export\.tensor_parallel_size"):
        place_of(config(gpus=4), [Node(64, 2), Node(64, 2)], use_gpu=True)


def test_the_export_s_own_error_comes_back_as_it_is(local_ray: Resources, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"has no checkpoint to export: train first$"):
        export_on_ray(config(num_workers=1, threads=1), tmp_path, use_gpu=False)
