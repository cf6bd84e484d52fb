"""Whether a Ray cluster that was joined is fit for a run: nodes, resources, one storage, the same versions."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.config import RunConfig
from launcher.errors import ConfigError, LauncherError
from launcher.ray_cluster import Resources, check_fits, cluster_resources
from launcher.stages import Stage, versions
from launcher.storage import probe

PROBE_S = 120
Found = Mapping[str, Any]


def wait_until_fit(
    config: RunConfig, run_dir: Path, stages: Collection[Stage], say: Callable[[str], None]
) -> Resources:
    """Wait for a joined cluster's nodes and resources, then look at every node.

    Args:
        config: the run's configuration; cluster.wait_s bounds the wait.
        run_dir: the run's folder, which every node must see.
        stages: the stages that shall run there.
        say: shows a line of text.

    Returns:
        What the cluster has.

    Raises:
        ConfigError: if the nodes or the resources did not come in time: what was asked, what is there, who holds it.
        LauncherError: if a node does not see the run's folder, or has other versions.
    """
    deadline = time.monotonic() + config.cluster.wait_s
    told = False
    while (missing := _missing(config, stages)) is not None:
        if time.monotonic() >= deadline:
            raise ConfigError(f"{missing}\nwaited {config.cluster.wait_s:g} s (cluster.wait_s)\n{_holders()}")
        if not told:
            say(f"waiting for the cluster: {missing}")
            told = True
        time.sleep(1)
    nodes = _alive()
    problems = problems_of(_probe(nodes, run_dir, config.run.url), versions(), run_dir)
    if problems:
        raise LauncherError("the cluster's nodes are not fit for this run:\n" + "\n".join(problems))
    say(f"cluster: {len(nodes)} nodes see {run_dir} and have the same versions")
    return cluster_resources()


def problems_of(found: Mapping[str, Found | str], here: Mapping[str, str], run_dir: Path) -> list[str]:
    """What makes nodes unfit. Pure.

    Args:
        found: for each node what its probe returned, or the text of its failure.
        here: versions where the launcher runs.
        run_dir: the run's folder.

    Returns:
        One line for each problem.
    """
    problems = []
    for node, answer in found.items():
        if isinstance(answer, str):
            problems.append(f"  node {node}: {answer}")
            continue
        if not answer["sees_file"]:
            problems.append(
                f"  node {node}: does not see what is written to {run_dir} here; put run.storage on storage that all "
                f"nodes share"
            )
        if answer.get("store"):
            problems.append(f"  node {node}: {answer['store']}")
        there = answer["versions"]
        problems += [
            f"  node {node}: has {name} {there.get(name, '(none)')}, here is {here.get(name, '(none)')}"
            for name in sorted({*here, *there})
            if here.get(name) != there.get(name)
        ]
    return problems


def _missing(config: RunConfig, stages: Collection[Stage]) -> str | None:
    """What the cluster still lacks, in words; None if it lacks nothing."""
    wanted, there = config.cluster.num_nodes or 1, len(_alive())
    if there < wanted:
        return f"cluster.num_nodes: {wanted} nodes are asked, {there} have joined"
    try:
        check_fits(config, cluster_resources(), stages)
        check_fits(config, cluster_resources(free=True), stages)
    except ConfigError as error:
        return str(error)
    return None


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _holders() -> str:
    """What the cluster has, what is free, and the placement groups that hold the rest."""
    groups = [group for group in ray.util.placement_group_table().values() if group["state"] == "CREATED"]
    held = "; ".join(f"{group['name'] or group['placement_group_id'][:8]}: {group['bundles']}" for group in groups)
    has, free = ray.cluster_resources(), ray.available_resources()
    told = ", ".join(f"{kind} {has.get(kind, 0):g} ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU"))
    return f"the cluster has {told}; held by placement groups: {held or 'none'}"


def _probe(nodes: Sequence[Mapping[str, Any]], run_dir: Path, url: str | None) -> dict[str, Found | str]:
    """Let every node read this host's file, this host every node's, and every node what it wrote to the store."""
    name = f".probe-{secrets.token_hex(8)}"
    mark = run_dir / name
    mark.write_text("", encoding="utf-8")
    try:
        asked = {
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": _look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(str(mark), f"{name}-{number}", url)
            for number, node in enumerate(nodes)
        }
        return {node: _answer(reference) for node, reference in asked.items()}
    finally:
        for file in run_dir.glob(f"{name}*"):
            file.unlink(missing_ok=True)


def _answer(reference: Any) -> Found | str:  # noqa: ANN401 - Ray's references are untyped
    try:
        return dict(ray.get(reference, timeout=PROBE_S))
    except ray.exceptions.GetTimeoutError:
        return f"did not answer within {PROBE_S} s"
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[-1]


@ray.remote(num_cpus=0, max_retries=0)
def _look(mark: str, answer: str, url: str | None) -> dict[str, Any]:
    """On a node: is the launcher's file there, does the store work, and what is installed?"""
    path = Path(mark)
    sees = path.is_file()
    if sees:
        path.with_name(answer).write_text(socket.gethostname(), encoding="utf-8")
    store = None
    if url is not None:  # the launcher, which alone uses it, may run on any node next time
        try:
            probe(url)
        except LauncherError as error:
            store = str(error)
    return {"sees_file": sees, "store": store, "versions": versions()}
