"""What the checkpoints of a run hold, read without an engine, without other ranks, and without running any code."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from trainer import sealed
from trainer.checkpoints_dir import checkpoints_dir, sealed_steps
from trainer.errors import TrainerError

FORMAT = 1
DAMAGED = ".damaged"

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
KINDS: tuple[Kind, ...] = ("weight", *MOMENTS)

logger = logging.getLogger(__name__)


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run whose every byte is as it was written; for one process alone.

    Args:
        run_dir: The run.

    Returns:
        Its folder, or None where the run has no checkpoint.

    Raises:
        TrainerError: There are checkpoints and all of them are damaged.
    """
    folder = checkpoints_dir(run_dir)
    damage: list[str] = []
    for step in sealed_steps(folder):
        problems = damage_of(folder / f"step-{step}", rank=0, world_size=1)
        if not problems:
            return folder / f"step-{step}"
        damage += problems
        logger.warning("checkpoint step-%d is passed over: %s", step, "; ".join(problems))
    refuse_fresh_start(folder, damage)
    return None


def damage_of(checkpoint: Path, *, rank: int, world_size: int) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        content, files = sealed.read_seal(checkpoint)
    except TrainerError as error:
        return [str(error)]
    if content["format"] != FORMAT:
        return [f"{checkpoint} has checkpoint format {content['format']}, this version reads {FORMAT}"]
    return [problem for file in files[rank::world_size] if (problem := sealed.verify(checkpoint, file))]


def refuse_fresh_start(folder: Path, damage: list[str]) -> None:
    aside = [path.name for path in folder.glob(f"*{DAMAGED}")] if folder.is_dir() else []
    if damage or aside:
        found = "; ".join([*damage, *(f"{name} was set aside earlier" for name in sorted(aside))])
        raise TrainerError(
            f"every checkpoint in {folder} is damaged, and a start from the beginning would lose what was trained: "
            f"{found}. Bring one back from a copy, or delete {folder} to start anew"
        )


class StoredTensors:
    """The tensors of one verified checkpoint, read by parameter name and range of elements.

    A context manager: the files are open inside it. They are mapped, so only what is asked for is read.

    Args:
        checkpoint: The sealed folder.
        names: Its tensor files.
    """

    def __init__(self, checkpoint: Path, names: list[str]) -> None:
        self._checkpoint = checkpoint
        self._names = names
        self._files: dict[str, Any] = {}
        self._pieces: dict[tuple[str, str], list[tuple[int, Any]]] = {}

    def __enter__(self) -> StoredTensors:
        for name in self._names:
            file: Any = safe_open(self._checkpoint / name, framework="pt")
            self._files[name] = file.__enter__()
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, start, parameter = key.split("/", 2)
                if kind in KINDS:
                    self._pieces.setdefault((kind, parameter), []).append((int(start), file.get_slice(key)))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.__exit__(*exception)
        self._files.clear()
        self._pieces.clear()

    def read(self, kind: Kind, parameter: str, start: int, numel: int) -> torch.Tensor:
        """Elements of a stored parameter, wherever they lie.

        Args:
            kind: Master weight or one of Adam's moments.
            parameter: Its name.
            start: First element, counted in the flattened parameter.
            numel: Number of elements.

        Returns:
            fp32 [numel].

        Raises:
            TrainerError: The checkpoint does not hold all of them.
        """
        result = torch.empty(numel, dtype=torch.float32)
        end = start
        for piece_start, piece in self._pieces.get((kind, parameter), []):
            first, last = max(end, piece_start), min(start + numel, piece_start + piece.get_shape()[0])
            if first == end and last > first:
                result[first - start : last - start] = piece[first - piece_start : last - piece_start]
                end = last
        if end != start + numel:
            raise TrainerError(
                f"{self._checkpoint} holds {kind} of {parameter} up to element {end}, not to {start + numel}"
            )
        return result

    def generators(self, rank: int) -> dict[str, torch.Tensor]:
        """The generators' states of one rank."""
        return self._of_rank(rank, "generator/")

    def own_moments(self, rank: int) -> dict[str, torch.Tensor]:
        """The moments that one rank's optimizer kept in a form of its own, by `<number of the tensor>/<name>`."""
        return {key.removeprefix("moments/"): tensor for key, tensor in self._of_rank(rank, "moments/").items()}

    def _of_rank(self, rank: int, prefix: str) -> dict[str, torch.Tensor]:
        file = self._files[f"rank-{rank}.safetensors"]
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
