"""Where a run's checkpoints are, and which are there. Loads nothing heavy: the launcher asks it."""

from __future__ import annotations

from pathlib import Path


def checkpoints_dir(run_dir: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run_dir / "checkpoints"


def sealed_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that have a name, newest first; whether they are whole is another question."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdecimal()), reverse=True)
