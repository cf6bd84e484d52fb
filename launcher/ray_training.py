"""Ray Train places the trainer's workers on the cluster; a failed group is started again and resumes.

Each attempt is one `fit()` with a disposable storage folder of its own: what a run knows stands in the run's
folder, written by the trainer, and never in Ray's bookkeeping.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

import trainer.errors
from evaluation.errors import EvaluationError
from launcher.beside import beside_main
from launcher.config import RunConfig
from launcher.errors import LauncherError, Preempted
from launcher.estimate import memory
from launcher.estimate.shapes import shape_of
from launcher.placement import Group, in_words, room
from launcher.ray_cluster import cluster_resources
from launcher.torch_backend import ProcessGroup
from trainer.checkpoints_dir import checkpoints_dir, sealed_steps
from trainer.config import TrainerConfig, TrainingConfig
from trainer.errors import NotEnoughMemoryError, TrainerError

# Ray may take so long to see that a node is gone: five health checks that fail, 3 s apart.
NODE_LOST_S = 20
# Of its GPU's memory, what a worker waits for before it begins.
_FREE_SHARE = 0.9


@dataclass(frozen=True)
class Retry:
    """Start the workers again; they go on from the newest complete checkpoint."""

    cause: str


@dataclass(frozen=True)
class Stop:
    """Give up, with the cause."""

    cause: str


@dataclass(frozen=True)
class Resume:
    """The workers were asked to stop and have saved: end, and let the same command go on."""

    cause: str


def decide(
    error: TrainingFailedError,
    failures: int,
    stalled: int,
    max_failures: int,
    *,
    oom_kills: int = 0,
    smaller: str = "",
) -> Retry | Stop | Resume:
    """What to do after a failed attempt. Pure.

    Args:
        error: what Ray Train raised.
        failures: attempts that have failed, this one included.
        stalled: the last of them that ended without a newer checkpoint than they began with.
        max_failures: restarts allowed.
        oom_kills: processes of this machine that the kernel killed for memory during the attempt.
        smaller: the nearest setting that needs less memory, in words.

    Returns:
        Stop for what another attempt cannot fix (the trainer's own errors, memory that does not suffice, two attempts
        without progress) and when restarts are used up.
    """
    causes = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    by_rank = {rank: getattr(cause, "_base_exc", cause) for rank, cause in sorted(causes.items())}
    if words := out_of_memory(by_rank, oom_kills):
        return Stop(f"{words}\n{smaller}".rstrip())
    for cause in by_rank.values():
        if isinstance(cause, TrainerError):
            return Stop(str(cause))
        if isinstance(cause, trainer.errors.Preempted):
            return Resume(str(cause))
    said = "; ".join(dict.fromkeys(f"{type(cause).__name__}: {cause}" for cause in by_rank.values())) or str(error)
    said = f"rank {', '.join(map(str, by_rank))}: {said}" if by_rank else said
    if failures > max_failures:
        return Stop(f"{said}\nattempts: {failures}, training.max_failures = {max_failures}")
    if stalled >= 2:
        return Stop(f"{said}\ntwo attempts in a row ended without a new checkpoint, so another would too")
    return Retry(said)


def out_of_memory(by_rank: Mapping[int, BaseException], oom_kills: int) -> str | None:
    """Whether an attempt ended because memory did not suffice, in words. Pure.

    Args:
        by_rank: what each failed rank ended with.
        oom_kills: processes of this machine that the kernel killed for memory during the attempt.

    Returns:
        The cause; None where it is another. A rank that the kernel killed on another machine is not seen.
    """
    for rank, error in by_rank.items():
        if isinstance(error, NotEnoughMemoryError):
            return str(error)
        cause = getattr(error, "health_check_failure", error)  # Ray Train's wrapper around a worker that is gone
        if isinstance(cause, OutOfMemoryError):
            return f"rank {rank} was killed by Ray, because its machine was running out of memory: {cause}"
        if isinstance(cause, ActorDiedError) and oom_kills:
            return (
                f"rank {rank} was killed, and while it ran the kernel killed {oom_kills} processes of this machine "
                "because memory ran out (oom_kill in /proc/vmstat)"
            )
    return None


def num_oom_kills(vmstat: Path = Path("/proc/vmstat")) -> int:
    """Processes that this machine's kernel has killed for memory since it started; 0 where it does not say."""
    try:
        rows = [line.split() for line in vmstat.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return 0
    return next((int(row[1]) for row in rows if row[0] == "oom_kill"), 0)


def smaller_setting(config: RunConfig, limit: int | None, *, on_gpu: bool) -> str:
    """The nearest setting that needs less memory than a run that ran out of it, in words.

    Args:
        config: the run's configuration.
        limit: memory that one rank may take, in bytes; None where it is not known.
        on_gpu: whether ranks have GPUs.

    Returns:
        One line. What it names fits by the estimate of `launcher plan`, and needs a fifth less than the failed run's
        estimate, for that one was too low.
    """
    shape = shape_of(config)
    if shape is None:
        return "set training.micro_batch_size: 1 and training.gradient_checkpointing: true, or take more workers"
    estimate = memory.memory_of(config, shape, on_gpu=on_gpu)
    most = min(limit or estimate.total, int(0.8 * estimate.total))
    there = f" of {memory.in_gib(limit)}" if limit else ""
    way_out = memory.nearest_that_fits(config, shape, most, on_gpu=on_gpu)
    return (
        f"`launcher plan` estimates {memory.in_gib(estimate.total)}{there} for a rank ({memory.parts_of(estimate)}); "
        + (f"the nearest setting that fits: {way_out}" if way_out else "no setting that was tried fits")
    )


def workers_for(training: TrainingConfig, room: int) -> int | None:
    """With how many workers training can go on. Pure.

    Args:
        training: the training section.
        room: workers that the cluster could hold.

    Returns:
        All of them where they fit; else, as far down as training.min_workers, the most that the global batch can be cut
        over; None where there is no such number.
    """
    if room >= training.num_workers:
        return training.num_workers
    fewest = training.min_workers or training.num_workers
    batches = training.global_batch_size // training.micro_batch_size
    return next((workers for workers in range(room, fewest - 1, -1) if workers and batches % workers == 0), None)


def train_on_ray(
    config: TrainerConfig,
    run_dir: Path,
    *,
    use_gpu: bool,
    tick: Callable[[], None],
    notify: Callable[[str], None],
    wait_s: float = 600,
    smaller: Callable[[], str] = lambda: "",
) -> dict[str, Any]:
    """Run the training stage on the connected Ray cluster.

    Args:
        config: the trainer's sections.
        run_dir: the run's folder, on storage that every worker sees.
        use_gpu: one GPU for each worker, and NCCL; else CPUs, and gloo.
        tick: called about twice a second while the workers run; shows progress.
        notify: called with a line of text when the workers are started again.
        wait_s: longest wait for a place for the workers after some were lost.
        smaller: names the nearest setting that needs less memory, for the message of a run that ran out of it.

    Returns:
        What rank 0's worker returned.

    Raises:
        LauncherError: when the attempts are used up, or the cause cannot be fixed by another.
        Preempted: when the workers were asked to stop, and have saved.
    """
    failures = stalled = 0
    group = group_of(config.training, use_gpu=use_gpu)
    if room(group, cluster_resources().by_node) < group.count:
        config = _with_workers_left(config, use_gpu=use_gpu, wait_s=wait_s, notify=notify, node_lost_s=0)
    while True:
        begun_at, killed = _newest_step(run_dir), num_oom_kills()
        with tempfile.TemporaryDirectory(prefix="attempt-", dir=run_dir) as storage:
            try:
                return _watch(_trainer(config, run_dir, Path(storage), use_gpu=use_gpu), tick)
            except TrainingFailedError as error:
                if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                    config = _after_no_place(config, use_gpu=use_gpu, wait_s=wait_s, notify=notify)
                    continue
                failures += 1
                stalled = stalled + 1 if _newest_step(run_dir) == begun_at else 0
                killed, limit = num_oom_kills() - killed, config.training.max_failures
                match decide(error, failures, stalled, limit, oom_kills=killed, smaller=smaller()):
                    case Stop(cause):
                        raise LauncherError(f"training stopped: {cause}{_where_stacks_are(run_dir)}") from None
                    case Resume(cause):
                        raise Preempted(cause) from None
                    case Retry(cause):
                        notify(f"the workers failed and are started again from the newest checkpoint ({cause})")
                        config = _with_workers_left(config, use_gpu=use_gpu, wait_s=wait_s, notify=notify)
            except RayError as error:
                raise LauncherError(
                    f"training stopped: the Ray cluster failed ({type(error).__name__}: {error}); "
                    f"the same command goes on from the newest checkpoint"
                ) from None


def _with_workers_left(
    config: TrainerConfig,
    *,
    use_gpu: bool,
    wait_s: float,
    notify: Callable[[str], None],
    node_lost_s: float = NODE_LOST_S,
) -> TrainerConfig:
    """The configuration with as many workers as can be placed now; waits where that are too few."""
    training = config.training
    group = group_of(training, use_gpu=use_gpu)
    if training.min_workers is not None:
        deadline = time.monotonic() + node_lost_s
        while room(group, cluster_resources().by_node) >= group.count and time.monotonic() < deadline:
            time.sleep(0.5)
    deadline = time.monotonic() + wait_s
    while (workers := workers_for(training, fit := room(group, nodes := cluster_resources().by_node))) is None:
        if time.monotonic() >= deadline:
            raise LauncherError(
                f"training stopped: {group} are needed for {training.num_workers} workers, and the cluster has room "
                f"for {fit}, after {wait_s:g} s (cluster.wait_s): {'; '.join(in_words(nodes))}; training.min_workers "
                f"lets fewer go on; the same command resumes from the newest checkpoint"
            )
        time.sleep(1)
    if workers == training.num_workers:
        return config
    notify(f"the cluster has room for {fit} workers: training goes on with {workers} (training.min_workers)")
    return config.model_copy(update={"training": training.model_copy(update={"num_workers": workers})})


def group_of(training: TrainingConfig, *, use_gpu: bool) -> Group:
    """What Ray Train asks for: a bundle of CPUs, and a GPU, for each worker.

    Args:
        training: the training section.
        use_gpu: whether each worker gets a GPU.

    Returns:
        The group of workers.
    """
    return Group("training.num_workers", training.num_workers, training.threads_per_worker, int(use_gpu))


def _after_no_place(
    config: TrainerConfig, *, use_gpu: bool, wait_s: float, notify: Callable[[str], None]
) -> TrainerConfig:
    """The configuration for another attempt after Ray Train found no place; an error where other work holds it."""
    group = group_of(config.training, use_gpu=use_gpu)
    has, free = cluster_resources().by_node, cluster_resources(free=True).by_node
    if room(group, has) < group.count:
        return _with_workers_left(config, use_gpu=use_gpu, wait_s=wait_s, notify=notify, node_lost_s=0)
    raise LauncherError(
        f"training stopped: {group} are needed and could not be placed in the time that Ray Train gives the workers to "
        f"start ({WORKER_GROUP_START_TIMEOUT_S_ENV_VAR}): {'; '.join(in_words(has))}; free now: "
        f"{'; '.join(in_words(free))}. Wait until other work has ended, or lower training.num_workers or "
        f"training.threads_per_worker; the same command resumes from the newest checkpoint"
    )


def _where_stacks_are(run_dir: Path) -> str:
    incidents = run_dir / "incidents"
    written = any(file.stat().st_size for file in incidents.glob("*"))
    return f"\nstacks of the ranks: {incidents}" if written else ""


def _newest_step(run_dir: Path) -> int:
    return max(sealed_steps(checkpoints_dir(run_dir)), default=0)


def found_by_workers(config: TrainerConfig) -> TrainerConfig:
    """The configuration with absolute paths, for Ray's workers have working folders of their own.

    Args:
        config: as it was read; a relative path starts from this process's working folder.

    Returns:
        The same with the base model's local folder, model.adapter and deepspeed.nvme_path made absolute; a hub id
        stays.
    """
    model, deepspeed = config.model, config.deepspeed
    if model.name_or_path is not None and Path(model.name_or_path).is_dir():
        model = model.model_copy(update={"name_or_path": str(Path(model.name_or_path).absolute())})
    if model.adapter is not None:
        model = model.model_copy(update={"adapter": str(Path(model.adapter).absolute())})
    if deepspeed.nvme_path is not None:
        deepspeed = deepspeed.model_copy(update={"nvme_path": deepspeed.nvme_path.absolute()})
    return config.model_copy(update={"model": model, "deepspeed": deepspeed})


def _trainer(config: TrainerConfig, run_dir: Path, storage: Path, *, use_gpu: bool) -> DataParallelTrainer:
    training, config = config.training, found_by_workers(config)
    return DataParallelTrainer(
        _one_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "run_dir": str(run_dir.resolve())},
        backend_config=ProcessGroup("nccl" if use_gpu else "gloo", math.ceil(training.collective_timeout_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.num_workers,
            use_gpu=use_gpu,
            # Ray sets a worker's OMP_NUM_THREADS to the CPUs it asks for.
            resources_per_worker={"CPU": training.threads_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name="training",
            storage_path=str(storage.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
        ),
    )


def _watch(trainer: DataParallelTrainer, tick: Callable[[], None]) -> dict[str, Any]:
    """Run fit() beside this thread: in the main thread it would take over Ctrl-C and swallow it."""
    return dict(beside_main(lambda: trainer.fit().return_value, tick))  # type: ignore[attr-defined]


def _one_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    from trainer.worker import train

    _wait_for_own_gpu()
    return train(TrainerConfig.model_validate(arguments["config"]), Path(arguments["run_dir"]))


def _wait_for_own_gpu() -> None:
    """Wait until an engine, or a worker of the attempt before, has let go of this worker's GPU; then begin anyway."""
    if not ray.get_gpu_ids():
        return
    from evaluation.gpu import wait_until_free

    context = ray.train.get_context()
    try:
        wait_until_free(_FREE_SHARE, "training", device=context.get_local_rank(), wait_s=NODE_LOST_S)
    except EvaluationError as error:
        # Something small may hold it for good, such as a desktop; what does not fit then, ends as out of memory.
        print(f"training begins on a GPU that others use: {error}", file=sys.stderr)
