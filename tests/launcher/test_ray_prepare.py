"""Tokenizing over a real Ray cluster makes the same bytes as one machine does."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from launcher.quickstart_data import write_quickstart_data
from launcher.ray_cluster import Resources
from launcher.ray_prepare import map_on_ray
from trainer.config import TrainerConfig
from trainer.prepare import prepare


def content(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "summary.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.usefixtures("local_ray")
def test_the_shards_are_the_same_to_the_byte(tmp_path: Path, local_ray: Resources) -> None:
    assert local_ray.num_cpus > 0
    write_quickstart_data(tmp_path / "rows.json", 2500)
    tree = {
        "model": {"from_scratch": {"vocab_size": 384}},
        "data": {"path": str(tmp_path / "rows.json"), "sequence_length": 256, "num_processes": 1},
    }
    config = TrainerConfig.model_validate(tree)
    prepare(config, tmp_path / "here")
    seen: list[int] = []

    def counting(function, chunks):  # type: ignore[no-untyped-def]
        for outcome in map_on_ray(function, chunks):
            seen.append(1)
            yield outcome

    prepare(config, tmp_path / "there", map_chunks=counting)
    assert len(seen) >= 2
    assert content(tmp_path / "here" / "data") == content(tmp_path / "there" / "data")
