"""Stages whose libraries load torch, in a process of their own: the launcher's process never loads it.

A process that has torch can come to hold a CUDA context and cached memory, for as long as it lives; the launcher lives
as long as the run, and an engine that is given the same GPU would refuse to start.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evaluation.config import AnsweringModel, GenerationConfig, JudgeConfig
from trainer.child import run_in_child
from trainer.config import TrainerConfig


def prepare_apart(config: TrainerConfig, run_dir: Path, *, on_ray: bool) -> dict[str, Any]:
    """Run the prepare stage in a child process.

    Args:
        config: The trainer's sections.
        run_dir: The run's folder.
        on_ray: Whether rows are tokenized on the Ray cluster that this process is connected to.

    Returns:
        The stage's counts.
    """
    return dict(run_in_child(f"{__name__}:_prepare", config, run_dir, _address() if on_ray else None))


def ask_apart(call: str, *arguments: object, timeout_s: float) -> Any:  # noqa: ANN401 - whatever the function returns
    """Call a function that looks at what this machine has, in a child process without network and devices.

    Args:
        call: The function as "module:name".
        arguments: Of the function.
        timeout_s: Longest time in seconds.

    Returns:
        What it returns.

    Raises:
        TrainerError: It failed, or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="ask-") as temporary:
        return run_in_child(
            call,
            *arguments,
            environment={"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            log=Path(temporary, "log"),  # what the libraries print for their own developers
            timeout_s=timeout_s,
        )


def generate_apart(config: GenerationConfig, run_dir: Path, models: Mapping[str, AnsweringModel]) -> dict[str, Any]:
    """Run the generate stage, and the harness after it, in a child process.

    Args:
        config: The section `generation`.
        run_dir: The run's folder.
        models: The models that answer, by name.

    Returns:
        The stage's counts.
    """
    return dict(run_in_child(f"{__name__}:_generate", config, run_dir, dict(models), _address()))


def judge_apart(config: JudgeConfig, models: list[str], run_dir: Path, *, strict: bool) -> dict[str, Any]:
    """Run the judge stage in a child process, for judges whose engines run on Ray.

    Args:
        config: The section `judge`.
        models: Names of the models that are judged.
        run_dir: The run's folder.
        strict: Whether a canary that succeeds is an error.

    Returns:
        The stage's counts.
    """
    return dict(run_in_child(f"{__name__}:_judge", config, models, run_dir, strict, _address()))


def estimate_apart(config: JudgeConfig, models: list[str], run_dir: Path) -> dict[str, Any]:
    """Return what `evaluation.judge.estimate` returns, from a child process.

    Args:
        config: The section `judge`.
        models: Names of the models that are judged.
        run_dir: The run's folder.

    Returns:
        Sizes by judge.
    """
    return dict(run_in_child("evaluation.judge:estimate", config, models, run_dir))


def quieten() -> None:
    """Keep what libraries log for their own developers out of a run's few lines; their errors still come through."""
    for name in ("bitsandbytes", "ray", "vllm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level when it is imported; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def _address() -> str:
    """The cluster that this process is connected to."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@contextmanager
def _joined(address: str | None) -> Iterator[None]:
    """Connect to the launcher's cluster, by its token in the environment; None needs no cluster."""
    quieten()
    if address is None:
        yield
        return
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        yield
    finally:
        ray.shutdown()


# --- what runs in the child -----------------------------------------------------------------------


def _prepare(config: TrainerConfig, run_dir: Path, address: str | None) -> dict[str, Any]:
    from launcher.ray_prepare import map_on_ray
    from trainer.prepare import prepare

    with _joined(address):
        return prepare(config, run_dir, map_chunks=map_on_ray if address else None)


def _generate(
    config: GenerationConfig, run_dir: Path, models: dict[str, AnsweringModel], address: str
) -> dict[str, Any]:
    from evaluation.generate import generate
    from evaluation.harness import run_harness

    with _joined(address):
        counts = generate(config, run_dir, models)
        measured = run_harness(config, run_dir, models)
    return counts | ({"lm_eval": measured} if measured else {})


def _judge(config: JudgeConfig, models: list[str], run_dir: Path, strict: bool, address: str) -> dict[str, Any]:
    from evaluation.judge import judge

    with _joined(address):
        return judge(config, models, run_dir, strict=strict)
