"""How far a judge agrees with people, and what the mean is once the judge's error is taken out.

`agree` joins a file of verdicts (`scores/<model>.jsonl`) with a file of people's ratings, one JSON object a line:
`{"id": "row-7", "score": 80}`, with `"sample"` where the model answered more than once (0 otherwise) and `"rater"`
where several people rated. People usually rate a part of what the judge judged; every rated row must be in the file
of verdicts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from evaluation.config import ReportConfig
from evaluation.errors import EvaluationError
from evaluation.rows import Row, read_rows
from evaluation.statistics import (
    analytic_mean,
    cohen_kappa,
    corrected_mean,
    corrected_rate,
    correlations,
    krippendorff_alpha,
)

# The measures are refitted on each resample, so there are fewer of them than for a mean.
MAX_RESAMPLES = 2000
# An answer is good from here on, for the share of good answers.
PASS_MARK = 50.0
_NO_SPREAD = "no spread seen: every resample gave the same value, so no interval"

Item = tuple[str, int]
MEASURES = {
    "pearson": "Pearson's r",
    "spearman": "Spearman's rho",
    "kendall": "Kendall's tau-b",
    "kappa_quadratic": "Cohen's kappa, quadratic",
    "krippendorff_alpha": "Krippendorff's alpha, judge and raters",
}


def agree(scores: Path, human: Path, config: ReportConfig) -> dict[str, Any]:
    """Compare a judge's verdicts with people's ratings.

    Args:
        scores: Verdicts, as the judge stage writes them.
        human: Ratings; see the module's first lines.
        config: Coverage and number of resamples.

    Returns:
        Counts; `measures`, each mean, low and high from resampled rows; `human_alpha` among the raters alone;
        `mean` naive, human and corrected; `good_share` likewise for answers of at least `PASS_MARK`, with the
        judge's sensitivity and specificity, or None where they could not be measured.

    Raises:
        EvaluationError: A rated row has no verdict row, a rating is no number in 0..100 or is given twice, or fewer
            than two rows have both.
    """
    judged, num_unscored = _read_verdicts(scores)
    ratings = _read_ratings(human, judged)
    both = [item for item in ratings if judged[item] is not None]
    if len(both) < 2:
        raise EvaluationError(f"{len(both)} rows of {human} have a scored verdict in {scores}; two or more are needed")
    pairs = {item: (float(judged[item] or 0.0), fmean(ratings[item].values())) for item in both}
    raters = sorted({rater for by_rater in ratings.values() for rater in by_rater})
    people = [[ratings[item].get(rater) for rater in raters] for item in both]
    return {
        "num_judged": sum(score is not None for score in judged.values()),
        "num_rated": len(ratings),
        "num_compared": len(both),
        "num_unscored": num_unscored,
        "num_raters": len(raters),
        "confidence": config.confidence,
        "measures": _measures(both, pairs, people, config),
        "human_alpha": krippendorff_alpha(people, interval=True) if len(raters) > 1 else None,
        "mean": _means(judged, pairs, config),
        "good_share": _good_share(judged, pairs, config),
    }


def _read_verdicts(path: Path) -> tuple[dict[Item, float | None], int]:
    """The mean over repeats of each answer's scored verdicts, None where there is none, and how many those are."""
    found: dict[Item, dict[int, Row]] = defaultdict(dict)
    for number, row in enumerate(read_rows(path), 1):
        found[_item(row, path, number)][int(row.get("repeat", 0))] = row  # the last verdict of a repeat counts
    judged: dict[Item, float | None] = {}
    for item, repeats in found.items():
        values = [_number(row, path) for row in repeats.values() if row.get("state", "scored") == "scored"]
        judged[item] = fmean(values) if values else None
    return judged, sum(score is None for score in judged.values())


def _read_ratings(path: Path, judged: Mapping[Item, float | None]) -> dict[Item, dict[str, float]]:
    ratings: dict[Item, dict[str, float]] = defaultdict(dict)
    for number, row in enumerate(read_rows(path), 1):
        item, rater = _item(row, path, number), str(row.get("rater", ""))
        if item not in judged:
            raise EvaluationError(
                f"{path}, row {number}: id {item[0]!r}, sample {item[1]} has no row in the verdicts; "
                "rate answers of the same run and model"
            )
        if rater in ratings[item]:
            raise EvaluationError(f"{path}, row {number}: {item[0]!r} is rated twice by {rater or 'one rater'!r}")
        ratings[item][rater] = _number(row, path)
    return dict(ratings)


def _item(row: Row, path: Path, number: int) -> Item:
    name, sample = row.get("id"), row.get("sample", 0)
    if not isinstance(name, str) or not isinstance(sample, int):
        raise EvaluationError(f"{path}, row {number}: id must be text and sample a number, not {name!r}, {sample!r}")
    return name, sample


def _number(row: Row, path: Path) -> float:
    score = row.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 100:
        raise EvaluationError(f"{path}: id {row.get('id')!r} has score {score!r}; a number in 0..100 is needed")
    return float(score)


def _measures(
    both: Sequence[Item],
    pairs: Mapping[Item, tuple[float, float]],
    people: Sequence[Sequence[float | None]],
    config: ReportConfig,
) -> dict[str, dict[str, Any]]:
    """Each measure with an interval from resampling prompts, the samples of one staying together."""
    judge, human = (np.array([pairs[item][side] for item in both]) for side in (0, 1))

    def measure(chosen: Sequence[int]) -> dict[str, float | None]:
        a, b = judge[list(chosen)], human[list(chosen)]
        units = [[judge[i], *people[i]] for i in chosen]
        return correlations(a, b) | {
            "kappa_quadratic": cohen_kappa(a, b, quadratic=True),
            "krippendorff_alpha": krippendorff_alpha(units, interval=True),
        }

    by_prompt: dict[str, list[int]] = defaultdict(list)
    for index, (name, _) in enumerate(both):
        by_prompt[name].append(index)
    return _resampled(measure, list(by_prompt.values()), config)


def _resampled(
    measure: Callable[[Sequence[int]], dict[str, float | None]], groups: list[list[int]], config: ReportConfig
) -> dict[str, dict[str, Any]]:
    point = measure([index for group in groups for index in group])
    draws: dict[str, list[float]] = {name: [] for name in point}
    generator = np.random.default_rng(0)
    for _ in range(min(config.bootstrap_samples, MAX_RESAMPLES)):
        chosen = generator.integers(0, len(groups), len(groups))
        for name, value in measure([index for group in chosen for index in groups[group]]).items():
            if value is not None:  # a resample without spread has no correlation
                draws[name].append(value)
    tail = (1 - config.confidence) / 2
    result: dict[str, dict[str, Any]] = {}
    for name, value in point.items():
        drawn = draws[name] if value is not None else []
        low, high = np.quantile(drawn, [tail, 1 - tail]).tolist() if len(drawn) > 1 else (None, None)
        if len(drawn) > 1 and np.ptp(drawn) < 1e-12:  # as for a full agreement: an interval of no width is none
            result[name] = {"mean": value, "low": None, "high": None, "method": _NO_SPREAD}
            continue
        result[name] = {"mean": value, "low": low, "high": high}
    return result


def _means(
    judged: Mapping[Item, float | None], pairs: Mapping[Item, tuple[float, float]], config: ReportConfig
) -> dict[str, dict[str, Any]]:
    """By prompt, as the samples of one prompt are no separate evidence."""
    everything = _by_prompt({item: score for item, score in judged.items() if score is not None})
    people = _by_prompt({item: rating for item, (_, rating) in pairs.items()})
    errors = _by_prompt({item: rating - score for item, (score, rating) in pairs.items()})
    unrated = [score for name, score in everything.items() if name not in people]
    corrected = corrected_mean(unrated, [(0.0, error) for error in errors.values()], confidence=config.confidence)
    return {
        "naive": analytic_mean(list(everything.values()), confidence=config.confidence).to_json(),
        "human": analytic_mean(list(people.values()), confidence=config.confidence).to_json(),
        "corrected": corrected.to_json(),
    }


def _by_prompt(values: Mapping[Item, float]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for (name, _), value in values.items():
        groups[name].append(value)
    return {name: fmean(group) for name, group in groups.items()}


def _good_share(
    judged: Mapping[Item, float | None], pairs: Mapping[Item, tuple[float, float]], config: ReportConfig
) -> dict[str, Any] | None:
    unrated = [score for item, score in judged.items() if score is not None and item not in pairs]
    good = [judge >= PASS_MARK for judge, human in pairs.values() if human >= PASS_MARK]
    bad = [judge < PASS_MARK for judge, human in pairs.values() if human < PASS_MARK]
    rate = corrected_rate(
        sum(score >= PASS_MARK for score in unrated),
        len(unrated),
        (sum(good), len(good), sum(bad), len(bad)),
        confidence=config.confidence,
    )
    if rate is None:
        return None
    return {
        "pass_mark": PASS_MARK,
        "naive": rate.naive,
        "corrected": rate.corrected.to_json(),
        "sensitivity": rate.sensitivity,
        "specificity": rate.specificity,
    }


def as_text(result: Mapping[str, Any]) -> str:
    """The result as lines for a terminal.

    Args:
        result: What `agree` returns.

    Returns:
        Text that ends without a line break.
    """
    lines = [
        f"{result['num_compared']} answers have a verdict and a rating, of {result['num_judged']} judged and "
        f"{result['num_rated']} rated, by {result['num_raters']} rater{'s' * (result['num_raters'] != 1)} "
        f"(no score from the judge: {result['num_unscored']})",
        "",
    ]
    for name, title in MEASURES.items():
        lines.append(f"{title:<40}{_figure(result['measures'][name], 3)}")
    if result["human_alpha"] is not None:
        lines.append(f"{'Krippendorff alpha, raters alone':<40}{result['human_alpha']:.3f}")
    lines.append("")
    for name, title in (("naive", "Mean by the judge"), ("human", "Mean by people, rated answers only"),
                        ("corrected", "Mean corrected for the judge's error")):  # fmt: skip
        lines.append(f"{title:<40}{_figure(result['mean'][name], 1)}")
    share = result["good_share"]
    if share is None:
        lines.append(
            f"Share of answers of at least {PASS_MARK:g}: not corrected. That needs judged answers that people did not "
            "rate, rated ones on both sides of the mark, and a judge better than chance."
        )
    else:
        lines += [
            f"Share of answers of at least {share['pass_mark']:g}, by the judge: {share['naive']:.3f}, "
            f"corrected: {_figure(share['corrected'], 3)}",
            f"The judge finds {share['sensitivity']:.3f} of the good and {share['specificity']:.3f} of the bad ones.",
        ]
    return "\n".join(lines)


def _figure(estimate: Mapping[str, Any], digits: int) -> str:
    if estimate["mean"] is None:
        return "not measured"
    text = f"{estimate['mean']:.{digits}f}"
    if estimate["low"] is not None and estimate["high"] is not None:
        text += f" [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"
    return text if estimate.get("method") is None else f"{text} ({estimate['method']})"
