"""What makes nodes unfit for a run; no Ray is started. The nodes themselves are asked in submit/test_ray_jobs.py."""

from __future__ import annotations

from pathlib import Path

from launcher.cluster_check import problems_of

HERE = {"python": "3.11.9", "torch": "2.13.0", "ray": "2.60.0"}
FIT = {"sees_file": True, "store": None, "versions": HERE}


def test_nodes_that_are_fit() -> None:
    assert problems_of({"n1": FIT, "n2": FIT}, HERE, Path("/runs/a")) == []


def test_every_problem_of_every_node_is_told() -> None:
    found = {
        "n1": FIT | {"sees_file": False},
        "n2": FIT | {"versions": {"python": "3.12.1", "torch": "2.13.0", "vllm": "0.32.0"}},
        "n3": "did not answer within 120 s",
        "n4": FIT | {"store": "run.storage = s3://b/a: a write-read probe failed"},
    }
    problems = problems_of(found, HERE, Path("/runs/a"))
    assert problems == [
        "  node n1: does not see what is written to /runs/a here; put run.storage on storage that all nodes share",
        "  node n2: has python 3.12.1, here is 3.11.9",
        "  node n2: has ray (none), here is 2.60.0",
        "  node n2: has vllm 0.32.0, here is (none)",
        "  node n3: did not answer within 120 s",
        "  node n4: run.storage = s3://b/a: a write-read probe failed",
    ]
