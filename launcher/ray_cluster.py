"""Connect to a Ray cluster, or start one here; and what it has."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import ClusterConfig, RunConfig
from launcher.errors import ConfigError
from launcher.gpus import visible_gpus
from launcher.placement import Node, groups_of, problem_of
from launcher.stages import STAGES, Stage

if TYPE_CHECKING:
    import psutil


HERE = "this machine"


@dataclass(frozen=True)
class Resources:
    """What there is to place workers and engines on.

    Attributes:
        num_cpus: CPUs of all nodes.
        num_gpus: GPUs of all nodes.
        nodes: Each node's own; empty where there is one node.
        gpu_memory: Memory of the smallest GPU, in bytes; None where it is not known.
        capability: Compute capability of the newest GPU: what it can't do, none can. None where it is not known.
        gpu_kind: Its name; empty where it is not known.
        source: Where this is known from, in words.
    """

    num_cpus: int
    num_gpus: int
    nodes: tuple[Node, ...] = ()
    gpu_memory: int | None = None
    capability: tuple[int, int] | None = None
    gpu_kind: str = ""
    source: str = HERE

    @property
    def by_node(self) -> tuple[Node, ...]:
        """Each node's own."""
        return self.nodes or (Node(self.num_cpus, self.num_gpus, self.source),)

    @property
    def is_here(self) -> bool:
        """Whether these are this machine's own."""
        return self.source == HERE


def local_resources() -> Resources:
    """The CPUs this process may use, and the GPUs that CUDA gives it; loads nothing heavy."""
    gpus = visible_gpus()
    smallest = min(gpus, key=lambda gpu: gpu.memory, default=None)
    return Resources(
        num_cpus=len(os.sched_getaffinity(0)),
        num_gpus=len(gpus),
        gpu_memory=(smallest.memory or None) if smallest else None,  # 0 where the driver can't say
        capability=max((gpu.capability for gpu in gpus if gpu.capability), default=None),
        gpu_kind=smallest.name if smallest else "",
    )


def together(
    nodes: Iterable[Node],
    source: str,
    *,
    gpu_memory: int | None = None,
    capability: tuple[int, int] | None = None,
    gpu_kind: str = "",
) -> Resources:
    """The resources of these nodes."""
    each = tuple(nodes)
    num_cpus, num_gpus = sum(node.num_cpus for node in each), sum(node.num_gpus for node in each)
    return Resources(num_cpus, num_gpus, each, gpu_memory, capability, gpu_kind, source)


def cluster_resources(*, free: bool = False) -> Resources:
    """What the connected Ray cluster has, node by node.

    Args:
        free: count only what nobody holds.

    Returns:
        The resources.
    """
    import ray
    from ray._private.state import available_resources_per_node

    unheld = available_resources_per_node() if free else {}
    return together(
        (
            Node(int(has.get("CPU", 0)), int(has.get("GPU", 0)), str(node["NodeManagerHostname"]))
            for node in ray.nodes()
            if node["Alive"]
            for has in [unheld.get(node["NodeID"], {}) if free else node["Resources"]]
        ),
        "the cluster",
    )


def resources_of(config: RunConfig) -> tuple[Resources, bool]:
    """What the run will have, and whether that is known before it starts.

    A run that is submitted to Slurm has what its job asks for; the machine that submits it does not count. Of a Ray
    cluster that is joined nothing is known here.

    Args:
        config: the configuration.

    Returns:
        The resources, and whether these are the run's.
    """
    here = local_resources()
    if config.cluster.slurm is not None and config.cluster.address == "auto":
        from launcher.submit.granted import slurm_resources

        return slurm_resources(config), True
    if config.cluster.address == "local":
        return here, True
    return replace(here, gpu_memory=None, capability=None, gpu_kind="", source="the cluster that is joined"), False


def uses_gpus(config: ClusterConfig, resources: Resources) -> bool:
    """Whether workers and engines get GPUs: as asked, or, with device auto, where there are any."""
    return config.device == "cuda" or (config.device == "auto" and resources.num_gpus > 0)


def misfits(config: RunConfig, resources: Resources, stages: Collection[Stage] = STAGES) -> list[str]:
    """What could never be placed on these resources: what was asked, what there is, and the way out.

    Args:
        config: the configuration.
        resources: what there is.
        stages: the stages that shall run there.

    Returns:
        A line for each.
    """
    groups = groups_of(config, stages, on_gpu=uses_gpus(config.cluster, resources))
    return [found for group in groups if (found := problem_of(group, resources.by_node)) is not None]


def check_fits(config: RunConfig, resources: Resources, stages: Collection[Stage] = STAGES) -> None:
    """Refuse what could never be placed.

    Args:
        config: the configuration.
        resources: what there is.
        stages: the stages that shall run there.

    Raises:
        ConfigError: with everything that does not fit.
    """
    if found := misfits(config, resources, stages):
        raise ConfigError("\n".join(found))


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[Resources]:
    """Hold a Ray cluster: start one that is stopped at the end whatever happens, or join one that stays.

    A cluster started here listens on loopback only, asks for a token of its own, has no dashboard, and keeps its
    files in a private folder that is removed at the end.

    Args:
        config: the cluster section.

    Yields:
        What the cluster has.

    Raises:
        ConfigError: if the named cluster cannot be reached.
    """
    with ExitStack() as held:
        if config.address == "local":
            # Ray puts sockets below this folder, and a socket's path may have 107 bytes; /tmp keeps it short.
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="tunelift-", dir="/tmp")))
            os.environ.update(_local_environment(folder))
            # Ray opens its own folder to everybody, so it stands inside one that is private.
            options: dict[str, Any] = {"address": "local", "include_dashboard": False, "_temp_dir": str(folder / "ray")}
            # Ray counts CUDA_VISIBLE_DEVICES=-1 as one GPU, and two instances of one GPU as one.
            options["num_gpus"] = 0 if config.device == "cpu" else local_resources().num_gpus
        else:
            options = {"address": config.address}

        import psutil
        import ray  # seconds to load, and it reads the environment then
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        # Ray reads its settings at its import and a token once in a process: both may be of an earlier cluster.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        others = psutil.Process().children()
        held.callback(ray.shutdown)
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(f"cluster.address = {config.address!r}: no Ray cluster answers there: {error}") from None
        held.callback(_stop, [process for process in psutil.Process().children() if process not in others])
        yield cluster_resources()


def _stop(started: list[psutil.Process]) -> None:
    """Leave the cluster; what was started for it is gone, down to the engines' own processes, when this returns."""
    import psutil
    import ray

    family = [*started, *(child for process in started for child in process.children(recursive=True))]
    ray.shutdown()
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def _local_environment(folder: Path) -> dict[str, str]:
    """The variables for a cluster of this machine alone; Ray, Gloo and vLLM take these from nowhere else.

    Ray's switch is named for the systems where it is off by default: without it Ray opens a dozen ports on every
    interface. Its own token file would be ~/.ray/auth_token, readable by everybody.
    """
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_HOST_IP": "127.0.0.1",
    }
