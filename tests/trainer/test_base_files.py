"""A base model that was changed since is told from the one that was trained on."""

import json
import os

import pytest

from trainer import base_files
from trainer.base_files import base_digests, refuse_other_base
from trainer.config import ModelConfig
from trainer.errors import TrainerError


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number in (1, 2):
        (folder / f"model-{number}-of-2.safetensors").write_bytes(bytes(range(100)))
    return folder


def digests(base, run_dir, *, weights=True):
    return base_digests(ModelConfig(name_or_path=str(base)), run_dir, weights=weights)


def test_a_flipped_bit_is_named(base, tmp_path):
    before = digests(base, tmp_path)
    assert list(before) == ["config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    path = base / "model-2-of-2.safetensors"
    stat = path.stat()
    path.write_bytes(bytes([1, *range(1, 100)]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` would leave it
    with pytest.raises(TrainerError, match=r"trained on: model-2-of-2\.safetensors changed since"):
        refuse_other_base(before, digests(base, tmp_path))


def test_a_file_that_came_or_went_is_named(base, tmp_path):
    before = digests(base, tmp_path)
    (base / "model-2-of-2.safetensors").rename(base / "model-3-of-2.safetensors")
    with pytest.raises(TrainerError, match=r"model-2-of-2\.safetensors, model-3-of-2\.safetensors changed"):
        refuse_other_base(before, digests(base, tmp_path))


def test_files_that_are_as_they_were_are_not_read_again(base, tmp_path, monkeypatch):
    before = digests(base, tmp_path)
    monkeypatch.setattr(base_files, "_sha256", lambda _: pytest.fail("read again"))
    assert digests(base, tmp_path) == before
    assert digests(base, tmp_path, weights=False) == {"config.json": before["config.json"]}
    assert json.loads((tmp_path / "base.digests.json").read_text()).keys() == before.keys()


def test_where_nothing_was_recorded_nothing_is_compared():
    refuse_other_base(None, {"config.json": "ab"})
    refuse_other_base({"config.json": "ab"}, None)
    refuse_other_base({"config.json": "ab"}, {"config.json": "ab"})
