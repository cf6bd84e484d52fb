"""Pairwise preferences: win rates, also with answers of equal length, and the pull of the first position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from evaluation.errors import EvaluationError
from evaluation.statistics.means import (
    BLOCK_ELEMENTS,
    Estimate,
    Floats,
    analytic_mean,
    as_values,
    mean_or_none,
    no_spread,
    proportion,
    standard_error,
)


@dataclass(frozen=True)
class WinRate:
    """A win rate and its standard error, both in percent; `num` preferences went into it."""

    win_rate: float | None
    standard_error: float | None
    num: int


def win_rate(preferences: ArrayLike) -> WinRate:
    """How often the model is preferred: a win counts 1, a draw one half.

    Args:
        preferences: float64 of shape [n] in 0..1, 1 where the model is preferred to the baseline.

    Returns:
        100 * mean and 100 * s / sqrt(n); None where too few values exist.

    Raises:
        EvaluationError: A preference lies outside 0..1.
    """
    array = as_preferences(preferences)
    mean, error = mean_or_none(array), standard_error(array)
    return WinRate(None if mean is None else 100 * mean, None if error is None else 100 * error, int(array.size))


def as_preferences(preferences: ArrayLike) -> Floats:
    """The values as float64 of shape [n], refused outside 0..1."""
    array = as_values(preferences)
    if array.size and (array.min() < 0 or array.max() > 1):
        raise EvaluationError(f"preferences lie in 0..1, these reach from {array.min():g} to {array.max():g}")
    return array


def length_controlled_win_rate(
    preferences: ArrayLike, length_differences: ArrayLike, *, confidence: float, num_resamples: int, seed: int = 0
) -> Estimate:
    """The win rate had both answers had the same length, in percent, with a refitted bootstrap interval.

    Logistic regression of the preference on tanh(length difference / its standard deviation), read off at a
    difference of 0 (Dubois et al. 2024, arXiv 2404.04475). Their term for the difficulty of AlpacaEval's own 805
    instructions and their pull towards a gamed baseline are left out: they exist for that test set only. A ridge of
    1e-3 keeps the fit finite where a resample's preferences all agree. Where all of them agree no length explains
    anything: the rate is the plain one, with the interval of `no_spread`.

    Args:
        preferences: float64 of shape [n] in 0..1.
        length_differences: float64 of shape [n], the model's length minus the baseline's, in characters.
        confidence: Coverage of the interval.
        num_resamples: Refits.
        seed: Of the generator.

    Returns:
        Percent; below two values nothing.

    Raises:
        EvaluationError: The lists differ in length or a preference lies outside 0..1.
    """
    wins, lengths = as_preferences(preferences), as_values(length_differences)
    if wins.size != lengths.size:
        raise EvaluationError(f"{wins.size} preferences have {lengths.size} length differences; give each its own")
    if wins.size < 2:
        return Estimate(None, None, None)
    if (wins == wins[0]).all():
        rate = 100 * float(wins[0])
        return no_spread(rate, wins.size, confidence=confidence, lowest=0.0, highest=100.0)
    deviation = lengths.std(ddof=1)
    feature = np.tanh(lengths / deviation) if deviation > 0 else np.zeros_like(lengths)
    generator = np.random.default_rng(seed)
    point = float(_logistic_intercepts(feature[None], wins[None])[0])
    draws = []
    block = max(1, BLOCK_ELEMENTS // 8 // wins.size)
    for start in range(0, num_resamples, block):
        chosen = generator.integers(0, wins.size, size=(min(block, num_resamples - start), wins.size))
        draws.append(_logistic_intercepts(feature[chosen], wins[chosen]))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])
    point_rate, low_rate, high_rate = (float(100 / (1 + math.exp(-value))) for value in (point, low, high))
    return Estimate(point_rate, low_rate, high_rate)


def _logistic_intercepts(feature: Floats, wins: Floats, ridge: float = 1e-3) -> Floats:
    """Intercepts of many logistic regressions with one feature each, by Newton's method.

    Args:
        feature: float64 of shape [fits, n].
        wins: float64 of shape [fits, n] in 0..1.
        ridge: Penalty on half of both squared coefficients.

    Returns:
        float64 of shape [fits].
    """
    intercept, slope = np.zeros(len(feature)), np.zeros(len(feature))
    for _ in range(100):
        linear = intercept[:, None] + slope[:, None] * feature
        chance = 0.5 * (1 + np.tanh(linear / 2))  # the logistic function, without overflow
        weight = chance * (1 - chance)
        g0 = (wins - chance).sum(1) - ridge * intercept
        g1 = ((wins - chance) * feature).sum(1) - ridge * slope
        h00, h01 = weight.sum(1) + ridge, (weight * feature).sum(1)
        h11 = (weight * feature**2).sum(1) + ridge
        determinant = h00 * h11 - h01**2
        # Steps are held to 2: a full Newton step overshoots where all preferences agree.
        step0 = np.clip((h11 * g0 - h01 * g1) / determinant, -2, 2)
        step1 = np.clip((h00 * g1 - h01 * g0) / determinant, -2, 2)
        intercept, slope = intercept + step0, slope + step1
        if max(np.abs(step0).max(), np.abs(step1).max()) < 1e-9:
            break
    return intercept


@dataclass(frozen=True)
class PositionBias:
    """How a pairwise judge treats the order in which it sees two answers; shares in 0..1.

    `flip_rate`: pairs whose preferred answer changed with the order. `first_rate`: verdicts for whichever answer
    came first, one half without bias.
    """

    num_pairs: int
    flip_rate: Estimate
    first_rate: Estimate


def position_bias(original: ArrayLike, swapped: ArrayLike, *, confidence: float) -> PositionBias:
    """Flips and the pull of the first position, from pairs judged in both orders.

    Args:
        original: float64 of shape [n] in 0..1, preference for answer A where A stood first.
        swapped: float64 of shape [n] in 0..1, preference for the same answer A where A stood second.
        confidence: Coverage of the intervals.

    Returns:
        The rates. A draw in one order only is no flip, as no preferred answer changed.

    Raises:
        EvaluationError: The lists differ in length or a preference lies outside 0..1.
    """
    first, second = as_preferences(original), as_preferences(swapped)
    if first.size != second.size:
        raise EvaluationError(f"{first.size} and {second.size} verdicts are no pairs: judge every pair in both orders")
    flips = int((((first > 0.5) & (second < 0.5)) | ((first < 0.5) & (second > 0.5))).sum())
    # Both verdicts of a pair are about the same answers, so the pair is the unit.
    for_first = (first + (1 - second)) / 2
    return PositionBias(
        num_pairs=int(first.size),
        flip_rate=proportion(flips, int(first.size), confidence=confidence),
        first_rate=analytic_mean(for_first, confidence=confidence, highest=1.0),
    )
