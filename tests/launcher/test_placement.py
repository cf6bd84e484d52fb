"""What can be placed on which nodes: by hand, and on a real Ray cluster of two nodes with logical GPUs."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from launcher import placement
from launcher.config import RunConfig
from launcher.placement import Group, Node, groups_of, problem_of, room
from launcher.ray_cluster import Resources, misfits, together
from launcher.stages import STAGES

SECTIONS = {"run": {"name": "small"}, "model": {"from_scratch": {}}, "data": {"path": "rows.json"}}


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(SECTIONS | {"cluster": {"device": "cuda"}} | sections)


def test_each_process_is_whole_on_one_node() -> None:
    workers = Group("training.num_workers", 8, num_cpus=8, num_gpus=1)
    assert room(workers, [Node(64, 8)]) == 8
    assert room(workers, [Node(32, 8)]) == 4
    assert room(workers, [Node(8, 8), Node(56, 0)]) == 1  # 64 CPUs and 8 GPUs together, and yet
    engines = Group("generation.engines", 2, num_cpus=4, num_gpus=4)
    assert room(engines, [Node(64, 2), Node(64, 6)]) == 1  # never torn over nodes


def test_cpus_count_beside_gpus() -> None:
    asked = config(training={"num_workers": 8, "threads_per_worker": 8}, judge={"type": "vllm", "model": "a/b"})
    (problem,) = misfits(asked, Resources(num_cpus=32, num_gpus=8))
    assert problem == (
        "training.num_workers = 8: 8 x (1 GPU and 8 CPUs) are needed, each whole on one node, and 4 can be placed: "
        "this machine has 8 GPUs and 32 CPUs; what fits: training.threads_per_worker = 4, or training.num_workers = 4"
    )
    assert misfits(asked, Resources(num_cpus=64, num_gpus=8)) == []
    fewer = config(training={"num_workers": 8, "threads_per_worker": 4}, judge={"type": "vllm", "model": "a/b"})
    assert misfits(fewer, Resources(num_cpus=32, num_gpus=8)) == []


def test_few_cpus_leave_a_way_out() -> None:
    asked = config(training={"num_workers": 8, "threads_per_worker": 8})
    (problem,) = misfits(asked, Resources(num_cpus=5, num_gpus=8))
    assert problem.endswith("what fits: training.threads_per_worker = 5 with training.num_workers = 1")


def test_sums_over_nodes_are_not_enough() -> None:
    asked = config(training={"num_workers": 8, "threads_per_worker": 4})
    nodes = together([Node(4, 8, "gpus"), Node(64, 0, "cpus")], "the cluster")
    (problem,) = misfits(asked, nodes)
    assert "1 can be placed: gpus has 8 GPUs and 4 CPUs; cpus has 64 CPUs" in problem
    assert "what fits: training.num_workers = 1" in problem


def test_an_engine_over_more_gpus_than_a_node_has() -> None:
    asked = config(generation={"tensor_parallel_size": 8})
    (problem,) = misfits(asked, together([Node(32, 4)] * 2, "cluster.slurm"))
    assert "1 x (8 GPUs and 8 CPUs) are needed, each whole on one node, and 0 can be placed" in problem
    assert "2 nodes with 4 GPUs and 32 CPUs each" in problem


def test_every_kind_of_engine_is_counted() -> None:
    vllm = {"type": "vllm", "model": "a/b", "engines": 2, "tensor_parallel_size": 2}
    jury = {"type": "jury", "judges": [vllm, {"type": "api", "base_url": "http://h/v1", "model": "m"}]}
    found = config(judge=jury, export={"tensor_parallel_size": 4})
    kinds = {group.key: (group.count, group.num_gpus) for group in groups_of(found, STAGES, on_gpu=True)}
    assert kinds == {
        "training.num_workers": (1, 1),
        "export.tensor_parallel_size": (1, 4),
        "generation.engines": (1, 1),
        "judge.judges.0.engines": (2, 2),
    }


def test_engines_on_cpus_take_their_cpus() -> None:
    group = next(iter(groups_of(config(generation={"engines": 3, "cpus_per_engine": 4}), ["generate"], on_gpu=False)))
    problem = problem_of(group, [Node(7, 0), Node(7, 0)])
    assert problem is not None
    assert problem.startswith("generation.engines = 3: 3 x (4 CPUs) are needed, each whole on one node, and 2 can be")
    assert problem.endswith("what fits: generation.cpus_per_engine = 3, or generation.engines = 2")
    assert problem_of(group, [Node(8, 0), Node(7, 0)]) is None


SCRIPT = """
import json, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group

cluster = Cluster()
cluster.add_node(num_cpus=3, num_gpus=8)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
cluster.add_node(num_cpus=8, num_gpus=0)
cluster.wait_for_nodes()

from launcher.errors import LauncherError
from launcher.ray_cluster import cluster_resources
from launcher.ray_training import train_on_ray
from trainer.config import TrainerConfig

said = {"nodes": sorted([node.num_gpus, node.num_cpus] for node in cluster_resources().by_node)}

def train(**training):
    config = TrainerConfig.model_validate(
        {"model": {"from_scratch": {}}, "data": {"path": "rows.json"}, "training": training}
    )
    try:
        train_on_ray(config, Path(sys.argv[1]), use_gpu=True, tick=lambda: None, notify=print, wait_s=0.5)
    except LauncherError as error:
        return str(error)

# 8 GPUs and 11 CPUs in all; one node has 8 GPUs and 3 CPUs.
said["never"] = train(num_workers=4, threads_per_worker=2)
held = placement_group([{"GPU": 7}])
ray.get(held.ready())
said["held"] = train(num_workers=2, threads_per_worker=1)
print(json.dumps(said))
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("run")
    environment = os.environ | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2"}
    command = [sys.executable, "-c", SCRIPT, str(run_dir)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def test_ray_has_resources_by_node(said: dict[str, Any]) -> None:
    assert said["nodes"] == [[0, 8], [8, 3]]


def test_what_no_node_can_hold_ends_before_an_attempt(said: dict[str, Any]) -> None:
    assert "4 x (1 GPU and 2 CPUs) are needed" in said["never"]
    assert "the cluster has room for 1" in said["never"]
    assert "has 8 GPUs and 3 CPUs" in said["never"]
    assert "two attempts in a row" not in said["never"]


def test_a_place_that_others_hold_is_named(said: dict[str, Any]) -> None:
    assert "2 x (1 GPU and 1 CPU) are needed and could not be placed" in said["held"]
    assert "free now: " in said["held"]
    assert "has 1 GPU and 3 CPUs" in said["held"]
    assert "two attempts in a row" not in said["held"]


def test_the_examples_hold() -> None:
    assert doctest.testmod(placement).failed == 0
