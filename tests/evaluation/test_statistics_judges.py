"""Statistics of judges and preferences against values worked out by hand, or by scipy or statsmodels."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from evaluation.errors import EvaluationError
from evaluation.statistics import (
    Estimate,
    Spread,
    WinRate,
    classification,
    clustered_standard_error,
    cohen_kappa,
    corrected_mean,
    corrected_rate,
    correlations,
    holm,
    krippendorff_alpha,
    length_controlled_win_rate,
    position_bias,
    proportion,
    spread,
    standard_error,
    win_rate,
)

# Krippendorff 2011, section C: four observers, twelve units; None is no observation.
OBSERVED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
UNITS = list(zip(*OBSERVED, strict=True))


def test_clustered_error_is_statsmodels():
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(12), rng.integers(1, 5, 12))
    values = rng.normal(50, 5, clusters.size) + rng.normal(0, 20, 12)[clusters]
    fit = sm.OLS(values, np.ones(values.size)).fit(
        cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False}
    )
    assert clustered_standard_error(values, list(clusters)) == pytest.approx(fit.bse[0])


def test_repeats_are_no_new_evidence():
    values = [10, 90, 40, 60]
    # population errors of 4 prompts: sqrt(sum of squared deviations) / 4 = sqrt(1600 + 1600 + 100 + 100) / 4
    once = clustered_standard_error(values, ["a", "b", "c", "d"])
    assert once == pytest.approx(math.sqrt(3400) / 4)
    assert clustered_standard_error(values * 10, ["a", "b", "c", "d"] * 10) == pytest.approx(once)
    assert standard_error(values * 10) < once / 2  # what taking them for new evidence would claim
    assert clustered_standard_error([1, 2], ["a", "a"]) is None
    with pytest.raises(EvaluationError, match="2 values have 1 cluster labels"):
        clustered_standard_error([1, 2], ["a"])


def test_spread_by_hand():
    # within: (50 + 2) / 2 groups with one degree each = 26; between: 2 * ((15 - 38)^2 + (61 - 38)^2) / 1 = 2116
    result = spread([[10, 20], [60, 62]])
    assert result.between_repeats == pytest.approx(math.sqrt(26))
    assert result.between_prompts == pytest.approx(math.sqrt((2116 - 26) / 2))
    assert spread([[1], [3]]) == Spread(math.sqrt(2), None)  # no repeats
    assert spread([[1, 2]]) == Spread(None, None)  # no second prompt
    assert spread([[5, 5], [5, 5], []]) == Spread(0.0, 0.0)


def test_spread_tells_the_two_sources_apart():
    rng = np.random.default_rng(0)
    result = spread([rng.normal(rng.normal(50, 20), 5, 4) for _ in range(2000)])
    assert result.between_prompts == pytest.approx(20, rel=0.05)
    assert result.between_repeats == pytest.approx(5, rel=0.05)


def test_win_rate_by_hand():
    # mean of 1 0.5 0 1 is 0.625; squared deviations .140625 .015625 .390625 .140625
    assert win_rate([1, 0.5, 0, 1]) == WinRate(62.5, pytest.approx(100 * math.sqrt(0.6875 / 3 / 4)), 4)
    assert win_rate([1.0]) == WinRate(100.0, None, 1)
    assert win_rate([]) == WinRate(None, None, 0)
    assert win_rate([0.5, 0.5, 0.5]) == WinRate(50.0, 0.0, 3)


@pytest.mark.parametrize("bad", [[1.5], [-0.1, 0.5], [math.nan]])
def test_a_preference_out_of_range_is_refused(bad):
    with pytest.raises(EvaluationError):
        win_rate(bad)


def test_length_control_is_statsmodels_logistic_regression():
    rng = np.random.default_rng(3)
    lengths = rng.normal(200, 300, 400)
    feature = np.tanh(lengths / lengths.std(ddof=1))
    wins = (rng.random(400) < 1 / (1 + np.exp(-(-0.4 + 1.5 * feature)))).astype(float)
    wins[:40] = rng.random(40)  # a judge may give preferences between 0 and 1
    fit = sm.GLM(wins, sm.add_constant(feature), family=sm.families.Binomial()).fit()
    estimate = length_controlled_win_rate(wins, lengths, confidence=0.95, num_resamples=500)
    assert estimate.mean == pytest.approx(100 / (1 + math.exp(-fit.params[0])), abs=1e-3)
    # the bootstrap interval is near the delta-method one of the same fit
    low, high = fit.params[0] + np.array([-1.96, 1.96]) * fit.bse[0]
    assert estimate.low == pytest.approx(100 / (1 + math.exp(-low)), abs=2)
    assert estimate.high == pytest.approx(100 / (1 + math.exp(-high)), abs=2)


def test_length_control_takes_back_what_length_alone_won():
    lengths = np.tile([400.0, 300.0, 350.0, -50.0, -60.0], 40)
    wins = (lengths > 0).astype(float)
    assert win_rate(wins).win_rate == pytest.approx(60)
    assert length_controlled_win_rate(wins, lengths, confidence=0.95, num_resamples=100).mean < 20


@pytest.mark.parametrize(("preference", "expected"), [(1.0, 100), (0.0, 0), (0.5, 50)])
def test_length_control_where_all_agree(preference, expected):
    estimate = length_controlled_win_rate([preference] * 30, range(30), confidence=0.95, num_resamples=50)
    assert estimate.mean == pytest.approx(expected, abs=0.2)
    assert estimate.high - estimate.low > 10 and estimate.method is not None
    same_length = length_controlled_win_rate([preference] * 30, [7] * 30, confidence=0.95, num_resamples=50)
    assert same_length.mean == pytest.approx(expected, abs=0.2)


def test_length_control_of_too_few_or_unequal():
    assert length_controlled_win_rate([1], [3], confidence=0.95, num_resamples=10) == Estimate(None, None, None)
    with pytest.raises(EvaluationError, match="2 preferences have 1 length"):
        length_controlled_win_rate([1, 0], [3], confidence=0.95, num_resamples=10)


@pytest.mark.parametrize(("successes", "num"), [(0, 10), (3, 17), (10, 10)])
def test_proportion_is_statsmodels_wilson(successes, num):
    low, high = proportion_confint(successes, num, alpha=0.1, method="wilson")
    estimate = proportion(successes, num, confidence=0.9)
    assert (estimate.mean, estimate.low, estimate.high) == (
        pytest.approx(successes / num),
        pytest.approx(low, abs=1e-9),
        pytest.approx(high, abs=1e-9),
    )
    assert proportion(0, 0, confidence=0.9) == Estimate(None, None, None)


def test_position_bias_by_hand():
    # pairs: agree on A, agree on B, first twice (a flip), second twice (a flip), draw then A (no flip)
    bias = position_bias([1, 0, 1, 0, 0.5], [1, 0, 0, 1, 1], confidence=0.95)
    assert bias.num_pairs == 5
    assert bias.flip_rate.mean == pytest.approx(2 / 5)
    # for the first position: .5 .5 1 0 .25
    assert bias.first_rate.mean == pytest.approx(2.25 / 5)
    always_first = position_bias([1, 1, 1], [0, 0, 0], confidence=0.95)
    assert (always_first.flip_rate.mean, always_first.first_rate.mean) == (1.0, 1.0)
    assert always_first.first_rate.low == always_first.flip_rate.low < 1
    with pytest.raises(EvaluationError, match="both orders"):
        position_bias([1, 1], [0], confidence=0.95)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_statsmodels(p_values):
    expected = multipletests(p_values, method="holm")[1] if p_values else []
    assert holm(p_values) == pytest.approx(list(expected))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=30))
def test_kappa_is_statsmodels(pairs):
    table = np.zeros((5, 5))
    for a, b in pairs:
        table[a, b] += 1
    a, b = np.array(pairs, dtype=float).T
    for quadratic in (True, False):
        ours = cohen_kappa(a, b, quadratic=quadratic)
        with np.errstate(all="ignore"):
            theirs = cohens_kappa(table, wt="quadratic" if quadratic else None, return_results=False)
        if ours is None:
            assert not math.isfinite(theirs)
        else:
            assert ours == pytest.approx(theirs)


def test_kappa_of_full_and_of_no_agreement():
    assert cohen_kappa([1, 50, 99], [1, 50, 99], quadratic=True) == 1.0
    assert cohen_kappa([5, 5], [5, 5], quadratic=True) is None  # all agree on one value: nothing to correct for
    assert cohen_kappa([], [], quadratic=False) is None


def test_krippendorff_is_the_published_example():
    assert krippendorff_alpha(UNITS, interval=False) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(UNITS, interval=True) == pytest.approx(0.849, abs=5e-4)


def test_krippendorff_without_pairs_or_spread():
    assert krippendorff_alpha([[1, None], [None, 2]], interval=True) is None
    assert krippendorff_alpha([[3, 3], [3, 3]], interval=True) is None
    assert krippendorff_alpha([[1, 1], [2, 2]], interval=False) == 1.0


def test_correlations_are_scipys():
    a, b = [1.0, 2, 3, 4, 10], [2.0, 1, 4, 3, 5]
    assert correlations(a, b) == {
        "pearson": pytest.approx(np.corrcoef(a, b)[0, 1]),
        "spearman": pytest.approx(0.8),  # ranks differ by 1 1 1 1 0: 1 - 6 * 4 / (5 * 24)
        "kendall": pytest.approx(0.6),  # 8 pairs in order, 2 not
    }
    assert set(correlations([1, 1, 1], [1, 2, 3]).values()) == {None}
    assert set(correlations([1], [2]).values()) == {None}


def test_corrected_rate_by_hand():
    # judged 70 of 100 good; of 40 truly good 36 judged good (q1 .9); of 20 truly bad 16 judged bad (q0 .8)
    rate = corrected_rate(70, 100, (36, 40, 16, 20), confidence=0.95)
    assert rate.naive == 0.7
    assert rate.corrected.mean == pytest.approx((0.7 + 0.8 - 1) / (0.9 + 0.8 - 1))
    # written out: z^2 3.841459; p' 71.920729/103.841459; q1' 37/42; q0' 17/22
    p, s1, s0, z2 = 71.9207294 / 103.8414588, 37 / 42, 17 / 22, 3.8414588
    theta = (p + s0 - 1) / (s0 + s1 - 1)
    v0, v1 = s0 * (1 - s0) / 22, s1 * (1 - s1) / 42
    shift = 2 * z2 * (theta * v1 - (1 - theta) * v0)
    error = math.sqrt(p * (1 - p) / 103.8414588 + (1 - theta) ** 2 * v0 + theta**2 * v1) / (s0 + s1 - 1)
    assert rate.corrected.low == pytest.approx(theta + shift - 1.959964 * error, abs=1e-6)
    assert rate.corrected.high == pytest.approx(theta + shift + 1.959964 * error, abs=1e-6)


def test_corrected_rate_is_refused_where_it_means_nothing():
    assert corrected_rate(70, 100, (10, 20, 10, 20), confidence=0.95) is None  # a coin
    assert corrected_rate(70, 100, (40, 40, 0, 0), confidence=0.95) is None  # specificity never measured
    assert corrected_rate(0, 0, (36, 40, 16, 20), confidence=0.95) is None


def test_corrected_rate_covers_the_truth():
    rng = np.random.default_rng(4)
    covered = naive_covered = 0
    for _ in range(400):
        truth = rng.random(300) < 0.5
        judged = np.where(truth, rng.random(300) < 0.9, rng.random(300) < 0.3)
        labelled, rest = slice(0, 100), slice(100, 300)
        good = truth[labelled]
        calibration = (
            int((judged[labelled] & good).sum()),
            int(good.sum()),
            int((~judged[labelled] & ~good).sum()),
            int((~good).sum()),
        )
        estimate = corrected_rate(int(judged[rest].sum()), 200, calibration, confidence=0.95).corrected
        covered += estimate.low <= 0.5 <= estimate.high
        naive = proportion(int(judged[rest].sum()), 200, confidence=0.95)
        naive_covered += naive.low <= 0.5 <= naive.high
    assert covered / 400 > 0.92
    assert naive_covered / 400 < 0.5  # the uncorrected interval does not


def test_corrected_mean_by_hand():
    # judge mean 70; people are 8 and 12 lower -> 60; errors: sd of (60, 80) / sqrt 2 = 10, sd of (-8, -12) / sqrt 2 = 2
    estimate = corrected_mean([60, 80], [(50, 42), (90, 78)], confidence=0.95)
    assert estimate.mean == 60
    half = stats.norm.ppf(0.975) * math.sqrt(104)
    assert (estimate.low, estimate.high) == (pytest.approx(60 - half), pytest.approx(60 + half))
    assert corrected_mean([60, 80], [(50, 42)], confidence=0.95) == Estimate(None, None, None)


@pytest.mark.parametrize("pairs", [[(50, 42), (90, 78)], [(50, 50), (90, 90)]])
def test_corrected_mean_of_equal_scores_has_a_width(pairs):
    estimate = corrected_mean([70, 70, 70], pairs, confidence=0.95)
    assert estimate.method is not None
    spread_alone = stats.norm.ppf(0.975) * standard_error([people - judge for judge, people in pairs])
    # The bound on unseen scores, z^2 / (3 + z^2) of the way to 0, is wider than the errors' part.
    assert estimate.mean - estimate.low > max(spread_alone, 39)


def test_classification_by_hand():
    #            a given: a a b none   b given: b   c given: a
    found = classification(list("aaaabc"), ["a", "a", "b", None, "b", "a"])
    assert found.labels == ("a", "b", "c")
    assert found.confusion == ((2, 1, 0, 1), (0, 1, 0, 0), (1, 0, 0, 0))
    assert found.accuracy == 3 / 6
    # F1 = 2 hits / (expected + given): a 4/7, b 2/3, c 0
    assert found.macro_f1 == pytest.approx((4 / 7 + 2 / 3 + 0) / 3)
    assert found.micro_f1 == pytest.approx(2 * 3 / (6 + 5))
    assert found.f1 == {"a": pytest.approx(4 / 7), "b": pytest.approx(2 / 3), "c": 0}
    # b is never expected: it costs a its recall and the pool its precision, and has no F1 of its own
    strange = classification(["a", "a"], ["a", "b"])
    assert (strange.f1, strange.macro_f1, strange.micro_f1) == ({"a": 2 / 3}, 2 / 3, 2 * 1 / (2 + 2))
    assert strange.confusion == ((1, 1, 0), (0, 0, 0))
    assert classification([], []) is None
    with pytest.raises(EvaluationError, match="1 expected labels meet 2"):
        classification(["a"], ["a", "b"])
