"""The same run on 1 to 1,000 GPUs, by the formulas alone."""

from __future__ import annotations

import math
from pathlib import Path

from launcher.config import RunConfig
from launcher.estimate.failures import NODE_MTBF_S, best_interval_s, share_lost
from launcher.estimate.memory import in_gib, memory_of
from launcher.estimate.shapes import Shape, shape_of
from launcher.estimate.text import RESTART_S, checkpoint_cost_s, in_time
from launcher.estimate.traffic import traffic_of

SCALES = (1, 8, 64, 512, 1000)
GPUS_PER_NODE = 8
HEAD = ("GPUs", "memory", "sent a step", "in seconds", "fails every", "checkpoint", "lost")
WIDTHS = (5, 10, 12, 11, 12, 11, 6)


def scale(config: RunConfig, run_dir: Path, *, network_bytes_per_s: float) -> list[str]:
    """A table for a person.

    Args:
        config: the run's configuration; its global batch grows where there are more ranks than it has packs.
        run_dir: the run's folder, for the base model and what its checkpoints took.
        network_bytes_per_s: what each GPU sends in a second.

    Returns:
        The lines; one without a table where the base model's sizes are not known.
    """
    shape = shape_of(config, run_dir / "base" if (run_dir / "base").is_dir() else None)
    if shape is None:
        return ["scale      unknown: the base model is not on this machine, or of an unknown form"]
    rows = [_row(_on(config, gpus), shape, run_dir, network_bytes_per_s) for gpus in SCALES]
    return [
        *(" ".join(f"{word:>{width}}" for word, width in zip(row, WIDTHS, strict=True)) for row in (HEAD, *rows)),
        f"By formulas: {GPUS_PER_NODE} GPUs a node, {network_bytes_per_s / 1e9:g} GB/s sent by each and not hidden "
        f"behind computing; a node fails once in {in_time(NODE_MTBF_S)} (Llama 3, arXiv:2407.21783), a restart takes "
        f"{in_time(RESTART_S)}; `checkpoint` is the interval at which the least time is lost (Young, Daly).",
    ]


def _on(config: RunConfig, gpus: int) -> RunConfig:
    share = gpus * config.training.micro_batch_size
    batch = math.ceil(config.training.global_batch_size / share) * share
    training = config.training.model_copy(update={"num_workers": gpus, "global_batch_size": batch})
    return config.model_copy(update={"training": training})


def _row(config: RunConfig, shape: Shape, run_dir: Path, network_bytes_per_s: float) -> tuple[str, ...]:
    gpus, traffic = config.training.num_workers, traffic_of(config, shape)
    mtbf_s, cost_s = NODE_MTBF_S / math.ceil(gpus / GPUS_PER_NODE), checkpoint_cost_s(run_dir, traffic)
    every_s = best_interval_s(cost_s, mtbf_s)
    return (
        f"{gpus:,}",
        in_gib(memory_of(config, shape, on_gpu=True).total),
        in_gib(traffic.network),
        f"{traffic.network / network_bytes_per_s:.2f}",
        in_time(mtbf_s),
        in_time(every_s),
        f"{share_lost(every_s, cost_s, RESTART_S, mtbf_s):.1%}",
    )
