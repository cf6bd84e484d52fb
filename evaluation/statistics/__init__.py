"""Statistics of scores: pure functions from arrays to numbers, seeded where they draw.

A score is a float64 in 0..100, a preference a float64 in 0..1. Missing values never enter here: the caller
leaves unscored rows out and counts them. Where too few values exist for a number, that number is None, not 0.
"""

from evaluation.statistics.agreement import (
    CorrectedRate,
    cohen_kappa,
    corrected_mean,
    corrected_rate,
    correlations,
    krippendorff_alpha,
)
from evaluation.statistics.labels import (
    Classification,
    classification,
)
from evaluation.statistics.means import (
    Estimate,
    Spread,
    analytic_mean,
    as_values,
    bootstrap_mean,
    bounds_with_missing,
    clustered_standard_error,
    mean_or_none,
    no_spread,
    proportion,
    spread,
    standard_error,
)
from evaluation.statistics.paired import (
    PairedDifference,
    holm,
    minimal_detectable_difference,
    paired_difference,
    sign_flip_p,
)
from evaluation.statistics.preferences import (
    PositionBias,
    WinRate,
    as_preferences,
    length_controlled_win_rate,
    position_bias,
    win_rate,
)

__all__ = [
    "Classification",
    "CorrectedRate",
    "Estimate",
    "PairedDifference",
    "PositionBias",
    "Spread",
    "WinRate",
    "analytic_mean",
    "as_preferences",
    "as_values",
    "bootstrap_mean",
    "bounds_with_missing",
    "classification",
    "clustered_standard_error",
    "cohen_kappa",
    "corrected_mean",
    "corrected_rate",
    "correlations",
    "holm",
    "krippendorff_alpha",
    "length_controlled_win_rate",
    "mean_or_none",
    "minimal_detectable_difference",
    "no_spread",
    "paired_difference",
    "position_bias",
    "proportion",
    "sign_flip_p",
    "spread",
    "standard_error",
    "win_rate",
]
