"""Rows of the metrics to TensorBoard, Weights & Biases, MLflow and SwanLab, through their own libraries."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any, Protocol

from trainer.config import TrainerConfig
from trainer.errors import TrainerError

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where numbers go beside metrics.jsonl."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take the numbers of one step."""

    def close(self) -> None:
        """Write what is still held."""


class TensorBoard:
    """Event files in run_dir/tensorboard."""

    def __init__(self, run_dir: Path) -> None:
        self._writer = importlib.import_module("tensorboardX").SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take the numbers of one step."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still held."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; offline it lies in run_dir/wandb until `wandb sync`."""

    def __init__(self, config: TrainerConfig, run_dir: Path) -> None:
        training = config.training
        self._run = importlib.import_module("wandb").init(
            project=training.tracker_project,
            entity=training.tracker_entity,
            group=training.tracker_group,
            tags=training.tracker_tags,
            name=run_dir.name,
            dir=run_dir,
            config=config.model_dump(mode="json"),
            mode="offline" if training.trackers_offline else "online",
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take the numbers of one step."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """Write what is still held."""
        self._run.finish()


class MLflow:
    """A run of MLflow; offline it lies in run_dir/mlflow.db and mlflow/, else where MLflow's own settings say."""

    def __init__(self, config: TrainerConfig, run_dir: Path) -> None:
        self._mlflow = importlib.import_module("mlflow")
        project = config.training.tracker_project
        if config.training.trackers_offline:
            self._mlflow.set_tracking_uri(f"sqlite:///{run_dir.resolve()}/mlflow.db")
            if self._mlflow.get_experiment_by_name(project) is None:  # files would lie in the working directory
                self._mlflow.create_experiment(project, (run_dir.resolve() / "mlflow").as_uri())
        self._mlflow.set_experiment(project)
        # Tags of MLflow have values.
        self._mlflow.start_run(run_name=run_dir.name, tags=dict.fromkeys(config.training.tracker_tags, "true"))
        self._mlflow.log_dict(config.model_dump(mode="json"), "config.json")

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take the numbers of one step."""
        self._mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        """Write what is still held."""
        self._mlflow.end_run()


class SwanLab:
    """An experiment of SwanLab; offline it lies in run_dir/swanlab until `swanlab sync`."""

    def __init__(self, config: TrainerConfig, run_dir: Path) -> None:
        training = config.training
        self._swanlab = importlib.import_module("swanlab")
        self._swanlab.init(
            project=training.tracker_project,
            workspace=training.tracker_entity,
            group=training.tracker_group,
            tags=list(training.tracker_tags),
            experiment_name=run_dir.name,
            config=config.model_dump(mode="json"),
            logdir=str(run_dir / "swanlab"),
            mode="offline" if training.trackers_offline else "cloud",
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take the numbers of one step."""
        self._swanlab.log(numbers, step=step)

    def close(self) -> None:
        """Write what is still held."""
        self._swanlab.finish()


def open_trackers(config: TrainerConfig, run_dir: Path) -> list[Tracker]:
    """Start the trackers that are asked for.

    Args:
        config: training.trackers and their fields.
        run_dir: Where offline ones write; its name is the run's name.

    Returns:
        One object for each.

    Raises:
        TrainerError: One of them can't be started: there is no key, no network, or no such server.
    """
    opened: list[Tracker] = []
    for name in config.training.trackers:
        try:
            opened.append(_opened(name, config, run_dir))
        except Exception as error:  # each library has its own errors
            for tracker in opened:
                tracker.close()
            raise TrainerError(
                f"training.trackers: {name} can't be started ({type(error).__name__}: {error}); mend that, take {name} "
                "out, or set training.trackers_offline: true, which writes into the run's folder"
            ) from error
    return opened


def _opened(name: str, config: TrainerConfig, run_dir: Path) -> Tracker:
    match name:
        case "wandb":
            return WeightsAndBiases(config, run_dir)
        case "mlflow":
            return MLflow(config, run_dir)
        case "swanlab":
            return SwanLab(config, run_dir)
    return TensorBoard(run_dir)


def log_row(trackers: list[Tracker], row: dict[str, Any]) -> None:
    """Give a row of the metrics to every tracker; one that fails is dropped, since training matters more.

    Args:
        trackers: Changed in place when one fails.
        row: Of metrics.jsonl.
    """
    numbers = {
        f"{row['kind']}/{name}": float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and name != "step"
    }
    for tracker in list(trackers):
        try:
            tracker.log(numbers, row["step"])
        except Exception:  # each library has its own errors, and none may end a training
            logger.warning("%s failed and gets no more rows", type(tracker).__name__, exc_info=True)
            trackers.remove(tracker)
