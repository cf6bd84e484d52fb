"""The estimate as a person reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from launcher.config import RunConfig
from launcher.estimate.failures import NODE_MTBF_S, best_interval_s, share_lost
from launcher.estimate.memory import CPU_RANGE, host_of, in_gib, memory_of, parts_of
from launcher.estimate.shapes import Shape, shape_of, trained_weights
from launcher.estimate.traffic import Traffic, traffic_of
from launcher.run_directory import read_json

# Assumed where nothing was measured: how fast a checkpoint is written, how long a failed group takes to train again.
STORAGE_BYTES_PER_S = 1e9
RESTART_S = 300


def describe(
    config: RunConfig, run_dir: Path, *, on_gpu: bool, tokens_per_s: float | None = None, price: float | None = None
) -> list[str]:
    """Memory, steps, time, sizes and network, as lines for a person.

    Args:
        config: the run's configuration.
        run_dir: the run's folder: counts come from its data, the speed from its metrics.
        on_gpu: whether ranks have GPUs.
        tokens_per_s: speed of all ranks together; None takes what this run has measured.
        price: of one GPU for an hour; None tells no cost.

    Returns:
        The lines.
    """
    shape = shape_of(config, run_dir / "base" if (run_dir / "base").is_dir() else None)
    lines = []
    if shape is None:
        lines.append(f"memory     unknown: {config.model.name_or_path} is not on this machine, or of an unknown form")
    else:
        traffic = traffic_of(config, shape)
        memory = memory_of(config, shape, on_gpu=on_gpu, target_share=_target_share(config, run_dir))
        lines += [
            f"weights    {shape.num_weights:,}, of which {trained_weights(config, shape):,} are trained",
            f"memory     {in_gib(memory.total)} for each rank: {parts_of(memory)}",
            *(
                []
                if on_gpu
                else [f"           on CPUs, runs held {CPU_RANGE[0]} to {CPU_RANGE[1]} times what was told"]
            ),
            f"disk       {in_gib(traffic.checkpoint)} each checkpoint, up to {config.training.keep_checkpoints + 2} at "
            f"a time; {in_gib(traffic.export)} the exported model",
            *_copies(config, traffic),
            *_offloaded(config, shape),
            f"network    {in_gib(traffic.network)} sent by each rank in an optimizer step",
            _failures(config, run_dir, traffic, tokens_per_s),
        ]
    return lines + _steps(config, run_dir, on_gpu=on_gpu, tokens_per_s=tokens_per_s, price=price)


def _target_share(config: RunConfig, run_dir: Path) -> float:
    """Target tokens of all places in the packs; all of them before the data is prepared."""
    summary = read_json(run_dir / "data" / "summary.json")
    if summary is None:
        return 1.0
    train = summary["splits"]["train"]
    return float(train["target_tokens"] / (train["packs"] * config.data.sequence_length))


def _failures(config: RunConfig, run_dir: Path, traffic: Traffic, tokens_per_s: float | None) -> str:
    """How often the group fails, and what its checkpoints make of that."""
    cluster = config.cluster
    nodes = (cluster.slurm.nodes if cluster.slurm else None) or cluster.num_nodes or 1
    mtbf_s, cost_s = NODE_MTBF_S / nodes, checkpoint_cost_s(run_dir, traffic)
    told = (
        f"failures   one in {in_time(mtbf_s)} on {nodes} node{'s' if nodes > 1 else ''}; a checkpoint about every "
        f"{in_time(best_interval_s(cost_s, mtbf_s))} loses least"
    )
    speed = tokens_per_s or _measured(run_dir / "metrics.jsonl")
    if not speed:
        return told
    step_s = config.training.global_batch_size * config.data.sequence_length / speed
    work_s = config.training.checkpoint_every * step_s
    lost = share_lost(work_s, cost_s, RESTART_S, mtbf_s)
    return f"{told}; every {config.training.checkpoint_every} steps is every {in_time(work_s)}, and loses {lost:.2%}"


def checkpoint_cost_s(run_dir: Path, traffic: Traffic) -> float:
    """Seconds that a checkpoint holds training up: as this run has measured it, or its bytes at an assumed speed."""
    stalled = [row["stalled_s"] for row in _rows(run_dir / "metrics.jsonl") if row["kind"] == "checkpoint"]
    return max(0.1, median(stalled)) if stalled else traffic.checkpoint / STORAGE_BYTES_PER_S


def in_time(seconds: float) -> str:
    """Seconds in the unit that suits them.

    >>> in_time(42), in_time(300), in_time(9_000), in_time(22_807_000)
    ('42 s', '5 min', '2.5 h', '264 days')

    Args:
        seconds: how long.

    Returns:
        Number and unit.
    """
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 172_800 else f"{seconds / 86_400:.3g} days"


def _offloaded(config: RunConfig, shape: Shape) -> list[str]:
    held = host_of(config, shape)
    return [f"offloaded  {in_gib(held)} of the host's memory for each rank"] if held else []


def _copies(config: RunConfig, traffic: Traffic) -> list[str]:
    """What a checkpoint takes of the hosts' memory while it is written."""
    if not config.training.checkpoint_in_background:
        return []
    each = traffic.checkpoint // config.training.num_workers
    return [
        f"host       {in_gib(each)} of memory for each rank while a checkpoint is written; "
        "training.checkpoint_in_background: false does without"
    ]


def _steps(
    config: RunConfig, run_dir: Path, *, on_gpu: bool, tokens_per_s: float | None, price: float | None
) -> list[str]:
    summary = read_json(run_dir / "data" / "summary.json")
    if summary is None:
        return ["steps      known when the data is prepared: launcher prepare"]
    training, train = config.training, summary["splits"]["train"]
    each = math.ceil(train["packs"] / training.global_batch_size)
    num_steps = max(1, math.ceil(training.num_epochs * each))
    num_steps = min(num_steps, training.max_steps or num_steps)
    tokens = round(train["tokens"] * num_steps / each)
    lines = [f"steps      {num_steps:,} over {train['packs']:,} packs an epoch, {tokens:,} tokens in all"]
    speed = tokens_per_s or _measured(run_dir / "metrics.jsonl")
    if speed:
        hours = tokens / speed / 3600
        cost = f", {hours * training.num_workers * price:,.2f} at {price:g} an hour" if price else ""
        unit = "GPU" if on_gpu else "worker"
        lines.append(
            f"time       {hours:,.2f} hours of training at {speed:,.0f} tokens/s: "
            f"{hours * training.num_workers:,.2f} {unit} hours{cost}"
        )
    return lines


def _measured(path: Path) -> float | None:
    """Median speed of the training steps so far, in tokens a second over all ranks."""
    speeds = [row["tokens_per_s"] for row in _rows(path) if row["kind"] == "train"]
    return median(speeds) if speeds else None


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
