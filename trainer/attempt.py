"""Which attempt owns a run: the one that began last. Loads nothing heavy."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from trainer.errors import TrainerError


@dataclass(frozen=True)
class Attempt:
    """One group of workers that trains a run.

    A group that was thought dead (its node did not answer, its processes were stopped) may wake up beside its
    successor. It finds another name in the run's folder and ends before it writes.

    Attributes:
        file: run_dir/attempt, on storage that all attempts see.
        number: counted from 1.
        name: tells apart two attempts that began at the same moment.
    """

    file: Path
    number: int
    name: str

    @classmethod
    def begin(cls, run_dir: Path) -> Self:
        """Take the run over from every earlier attempt. Rank 0 does this, before anything is read.

        Args:
            run_dir: the run's folder.

        Returns:
            The new owner.
        """
        file = run_dir / "attempt"
        earlier = file.read_text(encoding="utf-8").split() if file.exists() else []
        number = int(earlier[0]) + 1 if earlier else 1
        attempt = cls(file, number, secrets.token_hex(8))
        partial = file.with_name(f"attempt.{attempt.name}")
        partial.write_text(attempt.mark, encoding="utf-8")
        partial.replace(file)
        return attempt

    @property
    def mark(self) -> str:
        """What stands in the file while this attempt owns the run."""
        return f"{self.number} {self.name}\n"

    @property
    def label(self) -> str:
        """What the names of its unfinished folders end in."""
        return f"A{self.number}-{self.name}"

    def owns_the_run(self) -> bool:
        """Whether no later attempt has begun."""
        return self.file.read_text(encoding="utf-8") == self.mark

    def check(self) -> None:
        """Before each write: does the run still belong to this attempt?

        Raises:
            TrainerError: if a later attempt has begun.
        """
        found = self.file.read_text(encoding="utf-8")
        if found != self.mark:
            raise TrainerError(
                f"attempt {self.number} of this run ends: attempt {found.split()[0]} has taken it over "
                f"({self.file}); nothing more is written"
            )
