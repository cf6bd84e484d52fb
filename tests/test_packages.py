"""What a wheel carries: every package of the checkout, and the templates beside them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest


def test_every_package_is_in_the_wheel(repository: Path) -> None:
    declared = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(file.parent.relative_to(repository).parts)
        for top in ("launcher", "trainer", "evaluation")
        for file in (repository / top).rglob("*.py")
    }
    assert set(declared["packages"]) == found | {"slurm"}
    assert declared["package-data"]["slurm"] == ["*"]


def planned(repository: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What make would run for a device whose environment is not there yet."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    words = ("make", "--dry-run", *words)
    return subprocess.run(words, cwd=repository, capture_output=True, text=True, check=False, timeout=60)


def test_each_device_has_a_lock_and_a_folder_of_its_own(repository: Path, tmp_path: Path) -> None:
    cuda = planned(repository, "setup", "DEVICE=cuda")
    assert cuda.returncode == 0, cuda.stderr
    if not (repository / ".venv-cuda/.ready").exists():
        assert ".venv-cuda/bin/pip install -q --no-deps --require-hashes -r requirements-cuda.lock" in cuda.stdout
        assert "launcher.check_install cuda" in cuda.stdout
    assert "cpu" not in cuda.stdout
    cpu = planned(repository, "setup", f"VENV={tmp_path}/new")
    assert "--index-url https://download.pytorch.org/whl/cpu" in cpu.stdout
    assert "--require-hashes -r requirements-cpu.lock" in cpu.stdout
    assert "cuda.lock" not in cpu.stdout


@pytest.mark.parametrize("words", [("setup", "DEVICE=cu128"), ("setup-dev", "DEVICE=cuda")])
def test_a_device_without_a_lock_is_refused(words: tuple[str, ...], repository: Path) -> None:
    refused = planned(repository, *words)
    assert refused.returncode != 0
    assert "CUDA 12.8" in refused.stderr or "leave DEVICE out" in refused.stderr


def test_the_cuda_lock_holds_the_extras_that_it_is_for(repository: Path) -> None:
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lock = (repository / "requirements-cuda.lock").read_text()
    for needed in (*extras["cuda"], *extras["liger"]):
        assert f"\n{re.split('[=>]', needed)[0]}==" in lock
