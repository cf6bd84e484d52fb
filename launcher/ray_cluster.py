"""Connect to a Ray cluster, or start one here; and what it has."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.config import GenerationConfig, VllmJudge
from launcher.config import ClusterConfig, RunConfig
from launcher.errors import ConfigError
from launcher.stages import STAGES, Stage

if TYPE_CHECKING:
    import psutil


@dataclass(frozen=True)
class Resources:
    """What there is to place workers on."""

    num_cpus: int
    num_gpus: int


def local_resources() -> Resources:
    """The CPUs this process may use, and the NVIDIA GPUs that the driver lists; loads nothing."""
    gpus = Path("/proc/driver/nvidia/gpus")
    return Resources(len(os.sched_getaffinity(0)), len(list(gpus.iterdir())) if gpus.is_dir() else 0)


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
    on_gpu = uses_gpus(config.cluster, resources)
    kind, there = ("GPUs", resources.num_gpus) if on_gpu else ("CPUs", resources.num_cpus)
    asked = []
    if "train" in stages:
        training = config.training
        needed = training.num_workers * (1 if on_gpu else training.threads_per_worker)
        asked.append(("training.num_workers", training.num_workers, needed))
    engines: list[tuple[str, GenerationConfig | VllmJudge]] = []
    if "generate" in stages:
        engines.append(("generation", config.generation))
    if "judge" in stages and isinstance(config.judge, VllmJudge):
        engines.append(("judge", config.judge))
    for section, of in engines:
        each = of.tensor_parallel_size if on_gpu else of.cpus_per_engine
        asked.append((f"{section}.engines", of.engines, of.engines * each))
    way_out = "ask for fewer, or name a larger cluster in cluster.address"
    return [
        f"{key} = {value} needs {needed} {kind}; there are {there}; {way_out}"
        for key, value, needed in asked
        if needed > there
    ]


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
        there = ray.cluster_resources()
        yield Resources(int(there.get("CPU", 0)), int(there.get("GPU", 0)))


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
