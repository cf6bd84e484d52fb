"""What a wheel carries: every package of the checkout, and the templates beside them."""

from __future__ import annotations

import tomllib
from pathlib import Path


def test_every_package_is_in_the_wheel(repository: Path) -> None:
    declared = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(file.parent.relative_to(repository).parts)
        for top in ("launcher", "trainer", "evaluation")
        for file in (repository / top).rglob("*.py")
    }
    assert set(declared["packages"]) == found | {"slurm"}
    assert declared["package-data"]["slurm"] == ["*"]
