"""Means of scores, their intervals, and what missing rows could make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from evaluation.errors import EvaluationError

Floats = NDArray[np.float64]

# Elements of a block of resamples held in memory at a time (8 bytes each).
BLOCK_ELEMENTS = 4_000_000
# Values that differ by less are equal: means of repeats leave rounding behind.
_ROUNDING = 1e-9


# How an interval was made where all values are equal.
UNSEEN = "no spread seen: interval by Wilson's bound on the unseen share"


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its interval; None where too few values exist.

    `method` says how the interval was made where that is not the usual way, as for values without any spread.
    """

    mean: float | None
    low: float | None
    high: float | None
    method: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The three numbers by name, and the method where it is not the usual one."""
        numbers = {"mean": self.mean, "low": self.low, "high": self.high}
        return numbers if self.method is None else numbers | {"method": self.method}


def as_values(values: ArrayLike) -> Floats:
    """A flat float64 copy, refused when a value is not a finite number.

    Args:
        values: Numbers, any shape; flattened.

    Returns:
        float64 of shape [n].

    Raises:
        EvaluationError: A value is NaN or infinite: a missing score must be left out, not passed on.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(array).all():
        where = int(np.flatnonzero(~np.isfinite(array))[0])
        raise EvaluationError(
            f"value {where} of {array.size} is {array[where]}: leave missing scores out and count them"
        )
    return array


def mean_or_none(values: ArrayLike) -> float | None:
    """The mean, or None of nothing."""
    array = as_values(values)
    return float(array.mean()) if array.size else None


def standard_error(values: ArrayLike) -> float | None:
    """Standard error of the mean, s / sqrt(n) with n - 1 in s; None below two values."""
    array = as_values(values)
    return float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else None


def no_spread(value: float, num: int, *, confidence: float, lowest: float, highest: float) -> Estimate:
    """The mean of equal values, with an interval for what was not seen.

    Other values may exist that none of `num` draws showed. Their share is at most Wilson's upper bound for 0 of `num`,
    z^2 / (num + z^2), and they may lie at either end of the scale. Where the value is an end of the scale, as for wins
    alone, this is Wilson's interval itself.

    >>> no_spread(100.0, 12, confidence=0.95, lowest=0, highest=100).low
    75.7507...

    Args:
        value: The value that all have.
        num: How many values.
        confidence: Coverage, such as 0.95.
        lowest: The scale's lower end.
        highest: The scale's upper end.

    Returns:
        The estimate, with its method.
    """
    unseen = proportion(0, num, confidence=confidence).high or 0.0
    low = value - unseen * max(0.0, value - lowest)
    high = value + unseen * max(0.0, highest - value)
    return Estimate(value, low, high, UNSEEN)


def bootstrap_mean(
    values: ArrayLike,
    *,
    confidence: float,
    num_resamples: int,
    seed: int = 0,
    lowest: float = 0.0,
    highest: float = 100.0,
) -> Estimate:
    """The mean with its percentile bootstrap interval; equal values, which have no spread, by `no_spread`.

    Values are the independent units: average repeats and samples of one prompt first.

    Args:
        values: float64 of shape [n].
        confidence: Coverage, such as 0.95.
        num_resamples: Resamples drawn.
        seed: Of the generator; the same seed draws the same resamples.
        lowest: The scale's lower end.
        highest: The scale's upper end.

    Returns:
        The estimate; below two values it has no interval.
    """
    array = as_values(values)
    if array.size < 2:
        return Estimate(mean_or_none(array), None, None)
    if np.ptp(array) < _ROUNDING:
        return no_spread(float(array[0]), array.size, confidence=confidence, lowest=lowest, highest=highest)
    interval = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=num_resamples,
        batch=max(1, BLOCK_ELEMENTS // array.size),
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(float(array.mean()), float(interval.low), float(interval.high))


def analytic_mean(values: ArrayLike, *, confidence: float, lowest: float = 0.0, highest: float = 100.0) -> Estimate:
    """The mean with its Student t interval, mean +- t(n - 1) * standard error; equal values by `no_spread`.

    Args:
        values: float64 of shape [n].
        confidence: Coverage, such as 0.95.
        lowest: The scale's lower end.
        highest: The scale's upper end.

    Returns:
        The estimate; below two values it has no interval.
    """
    array = as_values(values)
    error = standard_error(array)
    mean = mean_or_none(array)
    if error is None or mean is None:
        return Estimate(mean, None, None)
    if np.ptp(array) < _ROUNDING:
        return no_spread(float(array[0]), array.size, confidence=confidence, lowest=lowest, highest=highest)
    half = float(stats.t.ppf((1 + confidence) / 2, array.size - 1)) * error
    return Estimate(mean, mean - half, mean + half)


def proportion(successes: int, num: int, *, confidence: float) -> Estimate:
    """A share with its Wilson interval, which stays within 0..1 and has a width at 0 and at 1.

    Args:
        successes: How many of them.
        num: How many in all.
        confidence: Coverage.

    Returns:
        The share in 0..1; nothing of nothing.
    """
    if num == 0:
        return Estimate(None, None, None)
    interval = stats.binomtest(successes, num).proportion_ci(confidence, method="wilson")
    return Estimate(successes / num, float(interval.low), float(interval.high))


def bounds_with_missing(
    values: ArrayLike, num_missing: int, *, lowest: float = 0.0, highest: float = 100.0
) -> tuple[float | None, float | None]:
    """The worst and the best the mean could be, had every missing row the lowest or the highest score.

    Args:
        values: float64 of shape [n], the scores there are.
        num_missing: Rows asked but without a score.
        lowest: The scale's lower end.
        highest: The scale's upper end.

    Returns:
        (worst, best), or (None, None) of no rows at all.
    """
    array = as_values(values)
    total = array.size + num_missing
    if not total:
        return None, None
    known = float(array.sum())
    return (known + num_missing * lowest) / total, (known + num_missing * highest) / total


def clustered_standard_error(values: ArrayLike, clusters: Sequence[object]) -> float | None:
    """Standard error of the mean when values come in clusters that go up and down together.

    Repeats and samples of one prompt are one cluster: taking them for separate evidence makes the error too small.
    sqrt(sum over clusters of (sum of the cluster's deviations from the mean)^2) / n (Miller 2024, equation 4).

    Args:
        values: float64 of shape [n].
        clusters: n labels; equal labels are one cluster.

    Returns:
        The error; None below two clusters.

    Raises:
        EvaluationError: There are not as many labels as values.
    """
    array = as_values(values)
    if len(clusters) != array.size:
        raise EvaluationError(f"{array.size} values have {len(clusters)} cluster labels; give each value its own")
    numbers = {label: number for number, label in enumerate(dict.fromkeys(clusters))}
    if len(numbers) < 2:
        return None
    sums = np.bincount([numbers[label] for label in clusters], weights=array - array.mean())
    return float(np.sqrt((sums**2).sum()) / array.size)


@dataclass(frozen=True)
class Spread:
    """Standard deviations of scores between prompts and between the repeats of one prompt, in points."""

    between_prompts: float | None
    between_repeats: float | None


def spread(groups: Sequence[ArrayLike]) -> Spread:
    """Tell how much prompts differ from how much the judge differs with itself.

    One-way analysis of variance with prompts as groups: the mean square within groups is the repeats' variance, and
    (mean square between - mean square within) / n0 the prompts', with n0 the groups' effective size.

    Args:
        groups: One list of scores a prompt, its repeats; an empty one is left out.

    Returns:
        The two; None where no prompt has two repeats, or there are fewer than two prompts.
    """
    arrays = [array for array in (as_values(group) for group in groups) if array.size]
    if len(arrays) < 2:
        return Spread(None, None)
    sizes = np.array([array.size for array in arrays], dtype=np.float64)
    means = np.array([array.mean() for array in arrays])
    num, extra = float(sizes.sum()), float(sizes.sum()) - len(arrays)
    if extra == 0:
        return Spread(float(means.std(ddof=1)), None)
    within = sum(float(((array - array.mean()) ** 2).sum()) for array in arrays) / extra
    grand = float((sizes * means).sum()) / num
    between = float((sizes * (means - grand) ** 2).sum()) / (len(arrays) - 1)
    effective = (num - float((sizes**2).sum()) / num) / (len(arrays) - 1)
    return Spread(math.sqrt(max(0.0, (between - within) / effective)), math.sqrt(within))
