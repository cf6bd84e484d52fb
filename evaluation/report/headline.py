"""What the report says first: base, tuned and their difference, as numbers and in words; pure."""

from __future__ import annotations

import math
from typing import Any

from evaluation.config import ReportConfig
from evaluation.report.scores import BeforeAfter, mean_of
from evaluation.statistics import PairedDifference, minimal_detectable_difference

PAIRWISE_WORDS = " Answers were judged in pairs with base's: 100 is a win in both orders, 50 a tie or a flip, 0 a loss."


def headline_of(both: BeforeAfter, config: ReportConfig) -> dict[str, Any]:
    """Over the prompts scored for both, so that the difference is that of the two means shown.

    Where there is only one model, or the two have nothing in common, each mean is over the model's own prompts.
    """
    base, tuned = both.base, both.tuned
    is_pair = bool(both.paired)
    headline: dict[str, Any] = {
        "judge": " and ".join(sorted({*base.judges, *tuned.judges})) or None,
        "num_prompts": len(both.paired) if base.scores and tuned.scores else len(base.scores or tuned.scores),
        "num_asked": both.num_asked,
        "base": mean_of([base.scores[name] for name in (both.paired if is_pair else base.scores)], config).to_json(),
        "tuned": mean_of([tuned.scores[name] for name in (both.paired if is_pair else tuned.scores)], config).to_json(),
        "difference": both.difference.estimate.to_json(),
        "distinguishable": both.difference.is_distinguishable(config.confidence),
    }
    headline["line"] = headline_line(headline)
    return headline


def headline_line(headline: dict[str, Any]) -> str:
    """The one line a run ends with.

    Args:
        headline: Of report.json.

    Returns:
        Such as `base 0.4 [0.0, 1.2] -> tuned 86.1 [82.7, 89.3]   +85.7 [82.2, 89.0]  (reference judge, 200 prompts)`.
    """
    asked, scored = headline["num_asked"], headline["num_prompts"]
    prompts = f"{scored} prompts" if scored == asked else f"{scored} of {asked} prompts"
    judge = f"{headline['judge']} judge" if headline["judge"] else "no judge"
    return (
        f"base {interval_text(headline['base'])} -> tuned {interval_text(headline['tuned'])}   "
        f"{interval_text(headline['difference'], signed=True)}  ({judge}, {prompts})"
    )


def comparison_of(both: BeforeAfter, config: ReportConfig, *, is_pairwise: bool) -> dict[str, Any]:
    difference, detectable = both.difference, None
    if difference.standard_error is not None:
        deviation = difference.standard_error * math.sqrt(difference.num_pairs)
        detectable = minimal_detectable_difference(deviation, difference.num_pairs, confidence=config.confidence)
    return {
        "num_pairs": difference.num_pairs,
        "standard_error": difference.standard_error,
        "t": difference.t,
        "p_t": difference.p_t,
        "p_sign_flip": difference.p_sign_flip,
        "wins": difference.wins,
        "ties": difference.ties,
        "losses": difference.losses,
        "minimal_detectable_difference": detectable,
        "words": comparison_words(difference, detectable, config.confidence) + (PAIRWISE_WORDS if is_pairwise else ""),
    }


def comparison_words(difference: PairedDifference, detectable: float | None, confidence: float) -> str:
    """What the paired difference says, as a sentence.

    Args:
        difference: Tuned minus base.
        detectable: The minimal detectable difference in points.
        confidence: Coverage of the interval.

    Returns:
        One to three sentences.
    """
    mean = difference.estimate.mean
    if mean is None:
        return "The two models have no scored prompt in common, so there is nothing to compare."
    finds = (
        ""
        if detectable is None
        else f" With {difference.num_pairs} prompts a true difference of {detectable:.1f} points is found four times "
        "out of five; a smaller one is easily missed."
    )
    if difference.is_distinguishable(confidence):
        word = "better" if mean > 0 else "worse"
        return f"Tuned is {word} than base by {abs(mean):.1f} points on average.{finds}"
    return f"Not distinguishable: the difference of {mean:+.1f} points could be chance.{finds}"


def interval_text(estimate: dict[str, Any], *, signed: bool = False) -> str:
    """`86.1 [82.7, 89.3]`, with a plus sign on a positive mean when asked; `not measured` where nothing is.

    Args:
        estimate: mean, low and high.
        signed: Whether a positive mean gets its sign.

    Returns:
        The text.
    """
    mean, low, high = estimate["mean"], estimate["low"], estimate["high"]
    if mean is None:
        return "not measured"
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    return text if low is None or high is None else f"{text} [{low:.1f}, {high:.1f}]"
