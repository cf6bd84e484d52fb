"""The export stage in a Ray task with GPUs of its own, on whatever node has them; the run's folder is shared.

Export in the launcher's process would leave a CUDA context on a GPU that the next stage's engine needs, and could not
run where the launcher's machine has no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from launcher.beside import beside_main
from launcher.errors import LauncherError
from launcher.placement import Group, Node, problem_of
from launcher.ray_cluster import cluster_resources
from trainer.child import portable
from trainer.config import TrainerConfig

_CANCEL_S = 15.0  # for the task to end its child processes


def place_of(config: TrainerConfig, nodes: Sequence[Node], *, use_gpu: bool) -> dict[str, int]:
    """What the export's task asks Ray for. Pure.

    Args:
        config: The trainer's sections.
        nodes: What there is.
        use_gpu: Whether it gets GPUs; else it takes the CPUs that training took, as far as one node has them.

    Returns:
        `num_gpus` and `num_cpus`; Ray sets the task's threads to its CPUs.

    Raises:
        LauncherError: No node has so many GPUs.
    """
    num_gpus = config.export.tensor_parallel_size if use_gpu else 0
    if problem := problem_of(Group("export.tensor_parallel_size", 1, 1, num_gpus), nodes):
        raise LauncherError(problem)
    there = max(node.num_cpus for node in nodes if node.num_gpus >= num_gpus)
    wanted = config.training.threads_per_worker * (num_gpus or config.training.num_workers)
    return {"num_gpus": num_gpus, "num_cpus": min(wanted, there)}


def export_on_ray(config: TrainerConfig, run_dir: Path, *, use_gpu: bool) -> dict[str, Any]:
    """Run the export stage on the connected Ray cluster.

    Args:
        config: The trainer's sections.
        run_dir: The run's folder, on storage that every node sees.
        use_gpu: Whether it gets GPUs.

    Returns:
        The stage's counts.

    Raises:
        LauncherError: There is no place for it, or its process was lost. The export's own errors come as they are.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    from launcher.ray_training import found_by_workers

    place = place_of(config, cluster_resources().by_node, use_gpu=use_gpu)
    # Without GPUs Ray leaves the variable as it is, and the process would see all of the machine's.
    variables = {} if use_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    options: dict[str, Any] = {"max_calls": 1, "max_retries": 0, "runtime_env": {"env_vars": variables}, **place}
    task: Any = ray.remote(**options)(_export)
    reference = task.remote(found_by_workers(config).model_dump(mode="json"), str(run_dir.resolve()))
    try:
        return dict(beside_main(lambda: ray.get(reference)))
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise LauncherError(
            f"export stopped: its process was lost ({type(error).__name__}: {str(error).strip().splitlines()[0]}); the "
            "same command does it again"
        ) from None
    except BaseException:  # a signal: the task's children must not outlive it
        ray.cancel(reference)
        with suppress(RayError):
            ray.wait([reference], timeout=_CANCEL_S)
            ray.cancel(reference, force=True)
        raise


def _export(config: dict[str, Any], run_dir: str) -> dict[str, Any]:
    """Runs in the Ray task, whose process takes nothing of the GPUs: each use of them is a child of its own."""
    from evaluation.engine_memory import EngineSettings, memory_problem
    from evaluation.gpu import wait_until_free
    from trainer.export.device import DeviceUse
    from trainer.export.stage import export

    checked = TrainerConfig.model_validate(config)
    settings = EngineSettings(
        "export",
        gpu_memory_share=checked.export.gpu_memory_share,
        tensor_parallel_size=checked.export.tensor_parallel_size,
    )
    device = DeviceUse(
        claim=partial(wait_until_free, checked.export.gpu_memory_share, "export.gpu_memory_share"),
        explain=partial(memory_problem, settings),
    )
    try:
        return export(checked, Path(run_dir), device)
    except Exception as error:  # noqa: BLE001 - the launcher can't load what a library's errors need
        raise portable(error) from None
