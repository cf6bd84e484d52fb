"""Each statistic against a value worked out by hand, or by scipy or statsmodels."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evaluation.errors import EvaluationError
from evaluation.statistics import (
    Estimate,
    analytic_mean,
    bootstrap_mean,
    bounds_with_missing,
    minimal_detectable_difference,
    paired_difference,
    sign_flip_p,
    standard_error,
)

SCORES = st.lists(st.integers(0, 100).map(float), min_size=2, max_size=40)


def test_standard_error_by_hand():
    # mean 5, squared deviations 9 1 1 9 -> variance 20/3, / 4 values
    assert standard_error([2, 4, 6, 8]) == pytest.approx(math.sqrt(20 / 3 / 4))
    assert standard_error([7]) is None
    assert standard_error([]) is None


def test_a_missing_score_is_refused_and_not_taken_for_a_number():
    with pytest.raises(EvaluationError, match="value 1 of 3 is nan"):
        bootstrap_mean([1.0, math.nan, 2.0], confidence=0.95, num_resamples=100)


def test_bootstrap_is_the_empirical_distribution_of_resampled_means():
    values = np.array([0.0, 0.0, 100.0])
    # 27 equally likely resamples: mean 0 in 8, 33.3 in 12, 66.7 in 6, 100 in 1
    estimate = bootstrap_mean(values, confidence=0.6, num_resamples=20_000)
    assert estimate.mean == pytest.approx(100 / 3)
    assert (estimate.low, estimate.high) == (0.0, pytest.approx(200 / 3))


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(400):
        estimate = bootstrap_mean(rng.normal(50, 10, 60), confidence=0.9, num_resamples=400, seed=trial)
        covered += estimate.low <= 50 <= estimate.high
    assert 0.85 <= covered / 400 <= 0.94  # 0.9 with three standard errors of 400 trials


def test_bootstrap_of_few_or_equal_values():
    assert bootstrap_mean([], confidence=0.95, num_resamples=100) == Estimate(None, None, None)
    assert bootstrap_mean([3], confidence=0.95, num_resamples=100) == Estimate(3.0, None, None)
    assert bootstrap_mean([0.1 + 0.2, 0.3, 0.3], confidence=0.95, num_resamples=100).method is not None


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        # Wilson's interval of 12 of 12, and of 0 of 12: 1.95996^2 / (12 + 1.95996^2) is 0.2425.
        ([100.0] * 12, 75.75, 100.0),
        ([0.0] * 12, 0.0, 24.25),
        # Those who were not seen may be anywhere: 40 - 0.2425 * 40 and 40 + 0.2425 * 60.
        ([40.0] * 12, 30.30, 54.55),
        ([100.0] * 2, 34.24, 100.0),
    ],
)
@pytest.mark.parametrize(
    "estimate",
    [
        lambda values: bootstrap_mean(values, confidence=0.95, num_resamples=100),
        lambda v: analytic_mean(v, confidence=0.95),
    ],
)
def test_equal_values_have_an_interval_with_a_width(values, low, high, estimate):
    found = estimate(values)
    assert found.mean == values[0]
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert found.method in found.to_json().values() and "no spread seen" in found.method


def test_an_interval_of_seen_spread_has_no_method():
    found = bootstrap_mean([0.0, 100.0, 100.0], confidence=0.95, num_resamples=100)
    assert found.to_json().keys() == {"mean", "low", "high"}


def test_the_interval_of_equal_values_covers_what_it_says():
    # Of all prompts a share is lost; only draws without a loss are looked at, the ones whose bootstrap has no width.
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(4000):
        share = rng.uniform(0, 0.5)
        wins = rng.random(10) >= share
        if wins.all():
            missed += bootstrap_mean(100.0 * wins, confidence=0.95, num_resamples=100).low > 100 * (1 - share)
    assert 0 < missed / 4000 < 0.05


@given(SCORES, st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_bootstrap_is_ordered_within_the_data_and_repeatable(values, seed):
    first = bootstrap_mean(values, confidence=0.95, num_resamples=200, seed=seed)
    assert first.low < first.high
    if first.method is None:
        assert min(values) <= first.low and first.high <= max(values)
    assert first == bootstrap_mean(values, confidence=0.95, num_resamples=200, seed=seed)


def test_analytic_interval_is_scipys():
    values = [60.0, 80.0, 70.0, 95.0, 40.0]
    estimate = analytic_mean(values, confidence=0.95)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert analytic_mean([4], confidence=0.95) == Estimate(4.0, None, None)


def test_paired_difference_by_hand_and_by_scipy():
    first, second = [10.0, 20.0, 30.0, 40.0], [15.0, 20.0, 29.0, 60.0]
    result = paired_difference(first, second, confidence=0.95, num_resamples=1000)
    assert (result.wins, result.ties, result.losses) == (2, 1, 1)
    assert result.estimate.mean == 6.0  # (5 + 0 - 1 + 20) / 4
    expected = stats.ttest_rel(second, first)
    assert result.t == pytest.approx(expected.statistic)
    assert result.p_t == pytest.approx(expected.pvalue)
    assert result.standard_error == pytest.approx(np.std([5, 0, -1, 20], ddof=1) / 2)


def test_pairs_of_different_length_are_refused():
    with pytest.raises(EvaluationError, match="3 and 2 values"):
        paired_difference([1, 2, 3], [1, 2], confidence=0.95, num_resamples=100)


def test_sign_flip_counts_all_patterns_by_hand():
    # |sum| of +-1 +-2 +-3: 6, 4, 2, 0, 0, 2, 4, 6 -> only 2 of 8 reach the observed 6
    assert sign_flip_p([1, 2, 3], num_resamples=100) == 0.25
    assert sign_flip_p([1, 2, -3], num_resamples=100) == 1.0  # observed 0
    assert sign_flip_p([0, 0], num_resamples=100) == 1.0
    assert sign_flip_p([], num_resamples=100) is None


def test_sign_flip_exact_is_scipys_and_drawn_is_near_it():
    rng = np.random.default_rng(1)
    differences = rng.normal(0.6, 1, 12)
    expected = stats.permutation_test(
        (differences, np.zeros(12)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=5000,
    ).pvalue
    assert sign_flip_p(differences, num_resamples=4096) == pytest.approx(expected)
    assert sign_flip_p(differences, num_resamples=4095) == pytest.approx(expected, abs=0.03)


def test_drawn_sign_flip_is_never_zero():
    assert sign_flip_p(np.full(50, 80.0), num_resamples=999) == pytest.approx(1 / 1000)


def test_a_handful_of_equal_gains_is_not_distinguishable():
    five = paired_difference([0] * 5, [10] * 5, confidence=0.95, num_resamples=1000)
    assert five.t is None and five.p_t is None  # no spread, no division by zero
    assert five.p_sign_flip == 2 / 32
    assert not five.is_distinguishable(0.95)
    six = paired_difference([0] * 6, [10] * 6, confidence=0.95, num_resamples=1000)
    # The sign-flip test alone would say so; an unseen share of 39% may lie anywhere in -100..100.
    assert six.p_sign_flip == 2 / 64
    assert not six.is_distinguishable(0.95)
    many = paired_difference([0] * 60, [10] * 60, confidence=0.95, num_resamples=1000)
    assert many.is_distinguishable(0.95) and many.estimate.low < 10 < many.estimate.high


def test_equal_lists_are_not_distinguishable():
    same = paired_difference([5, 6, 7], [5, 6, 7], confidence=0.95, num_resamples=100)
    assert (same.p_sign_flip, same.ties, same.estimate.mean) == (1.0, 3, 0.0)
    assert same.estimate.low == -same.estimate.high < 0
    assert not same.is_distinguishable(0.95)


def test_minimal_detectable_difference_by_hand():
    # (1.959964 + 0.841621) * 15 / sqrt(200)
    assert minimal_detectable_difference(15, 200, confidence=0.95) == pytest.approx(2.9715, abs=1e-3)
    assert minimal_detectable_difference(15, 0, confidence=0.95) is None
    assert minimal_detectable_difference(0, 12, confidence=0.95) is None  # not 0.0 points


def test_bounds_put_the_missing_at_both_ends():
    assert bounds_with_missing([50, 70], 2) == (30.0, 80.0)
    assert bounds_with_missing([50, 70], 0) == (60.0, 60.0)
    assert bounds_with_missing([], 0) == (None, None)
