"""Two models on the same prompts: the difference, whether it is distinguishable, and what could have been shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from evaluation.errors import EvaluationError
from evaluation.statistics.means import BLOCK_ELEMENTS, Estimate, as_values, bootstrap_mean, standard_error

# Scores lie in 0..100, so differences reach that far both ways.
_SCALE = 100.0


@dataclass(frozen=True)
class PairedDifference:
    """How the second of two paired lists of scores differs from the first.

    `p_t` is Student's paired t test, `p_sign_flip` the randomisation test that assumes nothing of the shape.
    Both are two-sided; both are None below two pairs, `t` and `p_t` also where all differences are equal.
    """

    num_pairs: int
    estimate: Estimate
    standard_error: float | None
    t: float | None
    p_t: float | None
    p_sign_flip: float | None
    wins: int
    ties: int
    losses: int

    def is_distinguishable(self, confidence: float) -> bool:
        """True when the interval leaves 0 out and the sign-flip test agrees.

        A bootstrap of a handful of pairs is too sure of itself. The sign-flip test knows that five coins fall alike in
        one of sixteen throws.
        """
        low, high = self.estimate.low, self.estimate.high
        if low is None or high is None or self.p_sign_flip is None:
            return False
        return (low > 0 or high < 0) and self.p_sign_flip <= 1 - confidence


def sign_flip_p(differences: ArrayLike, *, num_resamples: int, seed: int = 0) -> float | None:
    """Two-sided p of the mean difference when each pair's sign is a coin toss.

    All 2^m sign patterns of the m non-zero differences are counted when they are no more than `num_resamples`;
    otherwise random ones are drawn and the observed pattern is counted in, so that p is never 0
    (Phipson and Smyth 2010).

    Args:
        differences: float64 of shape [n], second minus first.
        num_resamples: Patterns drawn at most.
        seed: Of the generator.

    Returns:
        p in (0, 1]; 1 when all differences are 0, None of nothing.
    """
    array = as_values(differences)
    if not array.size:
        return None
    array = array[array != 0]  # a zero has no sign to flip
    if not array.size:
        return 1.0
    observed = abs(array.sum()) * (1 - 1e-9)  # equal sums in another order of adding count as equal
    if 2**array.size <= num_resamples:
        patterns = np.arange(2**array.size)[:, None] >> np.arange(array.size) & 1
        return float((np.abs((2 * patterns - 1) @ array) >= observed).mean())
    generator = np.random.default_rng(seed)
    extreme = 0
    block = max(1, BLOCK_ELEMENTS // array.size)
    for start in range(0, num_resamples, block):
        shape = (min(block, num_resamples - start), array.size)
        signs = generator.integers(0, 2, size=shape, dtype=np.int8) * np.int8(2) - np.int8(1)
        extreme += int((np.abs(signs @ array) >= observed).sum())
    return (extreme + 1) / (num_resamples + 1)


def paired_difference(
    first: ArrayLike, second: ArrayLike, *, confidence: float, num_resamples: int, seed: int = 0
) -> PairedDifference:
    """Second minus first, pair by pair: mean, bootstrap interval, tests, wins, ties and losses.

    Pairing removes the spread between easy and hard prompts, which is most of the spread of either list
    (Miller 2024, arXiv 2411.00640).

    Args:
        first: float64 of shape [n], one value a prompt.
        second: float64 of shape [n], the same prompts in the same order.
        confidence: Coverage of the interval.
        num_resamples: Resamples of the bootstrap and of the sign-flip test.
        seed: Of the generators.

    Returns:
        The difference; a win is a prompt on which the second scores higher.

    Raises:
        EvaluationError: The lists differ in length.
    """
    before, after = as_values(first), as_values(second)
    if before.size != after.size:
        raise EvaluationError(f"{before.size} and {after.size} values cannot be pairs: join them by id first")
    differences = after - before
    error = standard_error(differences)
    t, p_t = None, None
    if error:  # None of one pair, 0 where all differences are equal: no spread to compare with
        t = float(differences.mean() / error)
        p_t = float(2 * stats.t.sf(abs(t), differences.size - 1))
    return PairedDifference(
        num_pairs=int(differences.size),
        estimate=bootstrap_mean(
            differences,
            confidence=confidence,
            num_resamples=num_resamples,
            seed=seed,
            lowest=-_SCALE,
            highest=_SCALE,
        ),
        standard_error=error,
        t=t,
        p_t=p_t,
        p_sign_flip=sign_flip_p(differences, num_resamples=num_resamples, seed=seed) if differences.size > 1 else None,
        wins=int((differences > 0).sum()),
        ties=int((differences == 0).sum()),
        losses=int((differences < 0).sum()),
    )


def minimal_detectable_difference(
    standard_deviation: float, num_pairs: int, *, confidence: float, power: float = 0.8
) -> float | None:
    """The smallest true difference that `num_pairs` pairs would show with the given power.

    (z(confidence) + z(power)) * standard deviation / sqrt(n), the normal approximation of Miller 2024, section 5.

    Args:
        standard_deviation: Of the paired differences, in points.
        num_pairs: Prompts scored in both lists.
        confidence: Coverage of the interval that must leave 0 out.
        power: Probability of showing the difference if it is there.

    Returns:
        Points; None without pairs, or without a spread to reckon with.
    """
    if num_pairs < 1 or standard_deviation <= 0:
        return None
    z = float(stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power))
    return z * standard_deviation / math.sqrt(num_pairs)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p values of several comparisons, each fit to be read against the same level.

    The k-th smallest of m is multiplied by m - k + 1 and no smaller than the one before, 1 at most (Holm 1979).

    Args:
        p_values: Of m comparisons.

    Returns:
        The corrected values in the same order.
    """
    corrected = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = running
    return corrected
