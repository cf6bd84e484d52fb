"""How far raters agree, and what a judge's errors against people make of its mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from evaluation.statistics.means import UNSEEN, Estimate, Floats, as_values, no_spread, standard_error


def cohen_kappa(first: ArrayLike, second: ArrayLike, *, quadratic: bool) -> float | None:
    """Agreement of two raters beyond chance; 1 is full, 0 that of chance.

    1 - observed / expected disagreement over all pairings of the two raters' values. Disagreement is the squared
    difference when `quadratic` (for scores, any spacing: no bins), else 0 or 1 (for labels given as numbers).

    Args:
        first: float64 of shape [n].
        second: float64 of shape [n], the same items.
        quadratic: Which disagreement.

    Returns:
        Kappa; None where chance alone cannot disagree, as when both give one and the same value throughout.
    """
    a, b = as_values(first), as_values(second)
    if quadratic:
        observed = float(((a - b) ** 2).mean()) if a.size else 0.0
        expected = float(a.var() + b.var() + (a.mean() - b.mean()) ** 2) if a.size else 0.0
    else:
        labels = np.union1d(a, b)
        shares = [((a == label).mean(), (b == label).mean()) for label in labels]
        observed = float((a != b).mean()) if a.size else 0.0
        expected = 1 - float(sum(p * q for p, q in shares)) if a.size else 0.0
    return 1 - observed / expected if expected > 1e-12 else None


def krippendorff_alpha(ratings: Sequence[Sequence[float | None]], *, interval: bool) -> float | None:
    """Agreement of any number of raters, who need not have rated everything; 1 is full, 0 that of chance.

    1 - observed / expected disagreement over all pairs of values within units and over all values
    (Krippendorff 2011, Computing Krippendorff's alpha-reliability).

    Args:
        ratings: One list a unit with one entry a rater, None where there is no rating.
        interval: Squared difference (scores) instead of same-or-not (labels).

    Returns:
        Alpha; None where fewer than two values are paired or all values are equal.
    """
    units = [as_values([value for value in unit if value is not None]) for unit in ratings]
    units = [unit for unit in units if unit.size > 1]
    if not units:
        return None
    pooled = np.concatenate(units)
    observed = sum(_disagreement(unit, interval) / (unit.size - 1) for unit in units) / pooled.size
    expected = _disagreement(pooled, interval) / (pooled.size * (pooled.size - 1))
    return 1 - observed / expected if expected > 1e-12 else None


def _disagreement(values: Floats, interval: bool) -> float:
    """Sum over ordered pairs of the squared difference, or of 1 where they differ."""
    if interval:
        centred = values - values.mean()
        return float(2 * values.size * (centred**2).sum())
    _, counts = np.unique(values, return_counts=True)
    return float(values.size**2 - (counts**2).sum())


def correlations(first: ArrayLike, second: ArrayLike) -> dict[str, float | None]:
    """Pearson's r, Spearman's rho and Kendall's tau-b of two lists.

    Args:
        first: float64 of shape [n].
        second: float64 of shape [n], the same items.

    Returns:
        The three by name; None below two items or where one list does not vary.
    """
    a, b = as_values(first), as_values(second)
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"pearson": None, "spearman": None, "kendall": None}
    return {
        "pearson": float(stats.pearsonr(a, b).statistic),
        "spearman": float(stats.spearmanr(a, b).statistic),
        "kendall": float(stats.kendalltau(a, b).statistic),
    }


@dataclass(frozen=True)
class CorrectedRate:
    """A share of good answers corrected for the judge's errors, beside what the judge alone says; all in 0..1."""

    naive: float
    corrected: Estimate
    sensitivity: float
    specificity: float


def corrected_rate(
    num_judged_good: int, num_judged: int, calibration: tuple[int, int, int, int], *, confidence: float
) -> CorrectedRate | None:
    """The share of truly good answers, from a judge whose errors were measured against people.

    Point: (p + q0 - 1) / (q0 + q1 - 1) with p the judged share, q0 the specificity and q1 the sensitivity
    (Rogan and Gladen 1978). Interval: that of Lang and Reiczigel 2014 as given by Lee et al. 2025, arXiv 2511.21140,
    which carries the uncertainty of p, q0 and q1: each is first shrunk (p by z^2 / 2 of z^2, q by 1 of 2).

    Args:
        num_judged_good: Answers the judge called good.
        num_judged: Answers it judged.
        calibration: Among answers people rated: judged good of truly good, truly good, judged bad of truly bad,
            truly bad.
        confidence: Coverage of the interval.

    Returns:
        The rates; None where the judge does no better than chance (q0 + q1 <= 1) or people called all answers good
        or all bad, so that one of its errors was not measured.
    """
    right_good, num_good, right_bad, num_bad = calibration
    if not (num_judged and num_good and num_bad):
        return None
    p, q1, q0 = num_judged_good / num_judged, right_good / num_good, right_bad / num_bad
    s1, s0 = (right_good + 1) / (num_good + 2), (right_bad + 1) / (num_bad + 2)
    if q0 + q1 <= 1 or s0 + s1 <= 1:
        return None
    z = float(stats.norm.ppf((1 + confidence) / 2))
    shrunk_num = num_judged + z**2
    shrunk = (num_judged_good + z**2 / 2) / shrunk_num
    youden = s0 + s1 - 1
    theta = (shrunk + s0 - 1) / youden
    var0, var1 = s0 * (1 - s0) / (num_bad + 2), s1 * (1 - s1) / (num_good + 2)
    shift = 2 * z**2 * (theta * var1 - (1 - theta) * var0)
    error = math.sqrt(shrunk * (1 - shrunk) / shrunk_num + (1 - theta) ** 2 * var0 + theta**2 * var1) / youden
    point = min(1.0, max(0.0, (p + q0 - 1) / (q0 + q1 - 1)))
    low, high = (min(1.0, max(0.0, theta + shift + side * z * error)) for side in (-1, 1))
    return CorrectedRate(p, Estimate(point, low, high), q1, q0)


def corrected_mean(judged: ArrayLike, pairs: Sequence[tuple[float, float]], *, confidence: float) -> Estimate:
    """The mean score people would give, from a judge's many scores and people's few.

    Mean of the judge over all answers plus the mean of (people - judge) over those that people rated, with both
    variances added (the prediction-powered mean of Angelopoulos et al. 2023, arXiv 2301.09633).

    Args:
        judged: float64 of shape [n], the judge's scores of answers that people did not rate.
        pairs: (judge, people) of the answers that people rated.
        confidence: Coverage of the normal interval.

    Returns:
        The estimate; nothing below two answers in either list.
    """
    scores = as_values(judged)
    errors = as_values([people - judge for judge, people in pairs])
    score_error, mean_error = standard_error(scores), standard_error(errors)
    if score_error is None or mean_error is None:
        return Estimate(None, None, None)
    mean = float(scores.mean() + errors.mean())
    z = float(stats.norm.ppf((1 + confidence) / 2))
    if score_error and mean_error:
        half = z * math.hypot(score_error, mean_error)
        return Estimate(mean, mean - half, mean + half)
    # What has no spread has no variance to add; its share of the interval is the bound on what was not seen.
    below, above = [], []
    for values, error, lowest in ((scores, score_error, 0.0), (errors, mean_error, -100.0)):
        part = no_spread(float(values[0]), values.size, confidence=confidence, lowest=lowest, highest=100.0)
        below.append(z * error if error else values[0] - (part.low or 0.0))
        above.append(z * error if error else (part.high or 0.0) - values[0])
    return Estimate(mean, mean - math.hypot(*below), mean + math.hypot(*above), UNSEEN)
