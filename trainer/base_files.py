"""Which base model a run is trained on: digests of its files, so that a folder that was changed since is not taken.

Checkpoints and adapters hold only what was trained. Beside another base they would load without a word, and give a
model that nobody trained.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from trainer.config import ModelConfig
from trainer.errors import TrainerError
from trainer.model import base_folder


def base_digests(config: ModelConfig, run_dir: Path, *, weights: bool) -> dict[str, str]:
    """SHA-256 of the base model's configuration and, where some of its weights stay as they are, of these.

    They are kept in run_dir/base.digests.json beside size, times and inode of each file, and taken from there while
    these are the same: a base of 16 GB is read once in a run. One process alone calls this.

    Args:
        config: The model section.
        run_dir: The run.
        weights: Whether to include the weights.

    Returns:
        File name to hexadecimal digest.

    Raises:
        TrainerError: A file cannot be read.
    """
    place = base_folder(config, run_dir)
    cache = run_dir / "base.digests.json"
    try:
        folder = Path(str(cached_file(place, "config.json", revision=config.revision))).parent
        known = json.loads(cache.read_text(encoding="utf-8")) if cache.exists() else {}
        found: dict[str, dict[str, Any]] = {}
        kept = [*sorted(folder.glob("*.safetensors")), *adapter_files(config)] if weights else []
        for file in [folder / "config.json", *kept]:
            stat = file.stat()
            state = [str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            is_known = file.name in known and known[file.name]["state"] == state
            found[file.name] = known[file.name] if is_known else {"state": state, "sha256": _sha256(file)}
        fresh = cache.with_suffix(".tmp")
        fresh.write_text(json.dumps(known | found, indent=1), encoding="utf-8")
        fresh.replace(cache)
    except (OSError, ValueError) as error:
        raise TrainerError(f"the base model {place} can't be read: {error}") from error
    return {name: entry["sha256"] for name, entry in found.items()}


def adapter_files(config: ModelConfig) -> list[Path]:
    """The files of model.adapter that decide what it computes; none without an adapter."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return [] if config.adapter is None else [Path(config.adapter, name) for name in names]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_other_base(trained_on: dict[str, str] | None, found: dict[str, str] | None) -> None:
    """Compare the base that is there with the one that a checkpoint was trained on. Pure.

    Args:
        trained_on: Digests in the checkpoint's seal; None where none were recorded.
        found: Digests now; None where nobody asks.

    Raises:
        TrainerError: A file differs; it is named.
    """
    if trained_on is None or found is None:
        return
    changed = [name for name in sorted(trained_on.keys() | found.keys()) if trained_on.get(name) != found.get(name)]
    if changed:
        raise TrainerError(
            f"the base model is not the one that this run is trained on: {', '.join(changed)} changed since (SHA-256). "
            "Put the old files back, or start a new run: what was trained fits the old base only"
        )
