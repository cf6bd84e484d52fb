"""Collected rows -> train, validation and test. Pure and seeded."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from trainer.config import Shares
from trainer.data.collect import CUT, SPLITS, UNSPLIT, Collected
from trainer.data.names import SplitName
from trainer.errors import TrainerError

_TINY = 1e-9  # keeps 0.29 of 100 at 29, not 28

Rows = npt.NDArray[np.int64]


def assign_splits(collected: Collected, split: object, seed: int) -> dict[str, Rows]:
    """The rows of each split, in seeded order.

    Args:
        collected: all rows.
        split: shares, or what has already marked each row.
        seed: of the shuffle.

    Returns:
        The numbers of each split's rows.

    Raises:
        TrainerError: a split would be empty.
    """
    marks = _marks(collected, split, seed)
    order = np.random.default_rng(seed).permutation(collected.num_rows)
    splits: dict[str, Rows] = {name: order[marks[order] == number] for number, name in enumerate(SPLITS)}
    if not all(rows.size for rows in splits.values()):
        raise TrainerError(_too_few(collected, split, seed, {name: rows.size for name, rows in splits.items()}))
    return splits


def _marks(collected: Collected, split: object, seed: int) -> npt.NDArray[np.int8]:
    """The split of each row, as an index into SPLITS."""
    marks = collected.splits.copy()
    if isinstance(split, Shares):
        groups = collected.categories if split.stratify else np.zeros(collected.num_rows, dtype=np.int32)
        for mark, lacked in CUT.items():
            rows = np.flatnonzero(collected.splits == mark)
            cut = cut_by_shares(groups[rows], _shares(split, lacked), seed)
            if mark != UNSPLIT:  # beside splits of a source's own, one row is better than none
                _take_one(cut, lacked)
            for number, name in enumerate(SPLITS):
                marks[rows[cut[name]]] = number
    return marks


def _take_one(cut: dict[str, Rows], lacked: Sequence[SplitName]) -> None:
    """Move a train row to each lacked split that has got none."""
    for name in lacked:
        if not cut[name].size and cut["train"].size > 1:
            cut["train"], cut[name] = np.split(cut["train"], [-1])


def _shares(split: Shares, lacked: Sequence[SplitName]) -> dict[SplitName, float]:
    """The shares by which rows are cut into train and the splits that are lacked."""
    shares: dict[SplitName, float] = {"train": split.train, "validation": split.validation, "test": split.test}
    total = split.train + sum(shares[name] for name in lacked)
    return {name: shares[name] / total if name == "train" or name in lacked else 0.0 for name in SPLITS}


def _too_few(collected: Collected, split: object, seed: int, sizes: Mapping[str, int]) -> str:
    """The refusal of splits that are empty: what there is, what these shares need, and what would work."""
    empty = " and ".join(name for name, size in sizes.items() if not size)
    cut = f"{collected.num_rows:,} rows give " + ", ".join(f"{size:,} {name}" for name, size in sizes.items())
    message = f"data.split leaves {empty} without a row: {cut}"
    if not isinstance(split, Shares):
        return f"{message}: give rows of this split"
    if np.all(collected.splits == UNSPLIT):
        shares = _shares(split, CUT[UNSPLIT])
        enough = range(math.ceil(4 / min(shares.values())))
        needed = bisect_left(enough, True, key=lambda num_rows: all(_sizes(num_rows, shares)))
        message += f". These shares need {needed:,} rows"
    for share in (0.1, 0.2, 0.3, 0.34):
        usable = {"train": round(1 - 2 * share, 2), "validation": share, "test": share}
        marks = _marks(collected, split.model_copy(update=usable), seed)
        if all(np.any(marks == number) for number in range(len(SPLITS))):
            words = ", ".join(f"{name}: {value}" for name, value in {"type": split.type, **usable}.items())
            return f"{message}. Use more rows, or set data.split: {{{words}}}"
    return f"{message}. Use more rows: three at the least"


def _sizes(num_rows: int, shares: Mapping[SplitName, float]) -> tuple[int, int, int]:
    """Rows of train, validation and test."""
    test = _num_due(num_rows, shares["test"])
    validation = _num_due(num_rows - test, shares["validation"] / (shares["train"] + shares["validation"]))
    return num_rows - test - validation, validation, test


def cut_by_shares(groups: npt.NDArray[np.int32], shares: Mapping[SplitName, float], seed: int) -> dict[str, Rows]:
    """Cut rows into three after one seeded shuffle, each group in the same shares to within a row.

    The rows stand group by group, shuffled within each. Walking along them, a row is a test row whenever the number of
    test rows due so far passes the next integer; validation rows are taken from the rest in the same way. With one
    group that is a plain random cut: test has the share rounded down.

    Args:
        groups: the group of each row, shape [num_rows].
        shares: of the three splits.
        seed: of the shuffle.

    Returns:
        The numbers of each split's rows, in an order that the seed decides.
    """
    shuffled = np.random.default_rng(seed).permutation(groups.size)
    order = shuffled[np.argsort(groups[shuffled], kind="stable")]
    in_test = _due(order.size, shares["test"])
    rest = order[~in_test]
    in_validation = _due(rest.size, shares["validation"] / (shares["train"] + shares["validation"]))
    splits = {"train": rest[~in_validation], "validation": rest[in_validation], "test": order[in_test]}
    rank = np.empty(groups.size, dtype=np.int64)
    rank[shuffled] = np.arange(groups.size)
    return {name: rows[np.argsort(rank[rows])] for name, rows in splits.items()}


def _due(num_rows: int, share: float) -> npt.NDArray[np.bool_]:
    """Which of so many rows are taken, evenly spaced: `_num_due` of them."""
    return np.diff(np.floor(np.arange(num_rows + 1) * share + _TINY)) > 0


def _num_due(num_rows: int, share: float) -> int:
    return math.floor(num_rows * share + _TINY)


def repeat_by_weight(rows: Rows, sources: npt.NDArray[np.int32], weights: Sequence[float], seed: int) -> Rows:
    """Train rows as often as their source's weight says, a seeded choice where that is no whole number.

    Args:
        rows: the train rows.
        sources: the source of every collected row.
        weights: of each source.
        seed: of the choice.

    Returns:
        Row numbers in ascending order; 2.5 gives every row of a source twice and half of them a third time.
    """
    taken = []
    for number, weight in enumerate(weights):
        own = rows[sources[rows] == number]
        extra = np.random.default_rng([seed, number]).permutation(own)[: round((weight % 1) * own.size)]
        taken.append(np.concatenate([np.repeat(own, int(weight)), extra]))
    return np.sort(np.concatenate(taken)) if taken else rows
