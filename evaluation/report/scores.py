"""A run's verdicts, drawn together: one score a prompt, two models side by side; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from evaluation.config import ReportConfig
from evaluation.report.run_files import RunFiles
from evaluation.rows import Row
from evaluation.statistics import Estimate, PairedDifference, bootstrap_mean, paired_difference

NO_CATEGORY = "(no category)"


@dataclass(frozen=True)
class ModelScores:
    """One model's verdicts, drawn together by prompt.

    `scores` holds only prompts with at least one scored verdict: the mean over samples of the mean over repeats.
    `verdicts` are all of a prompt's scores. `states` and `causes` count prompts; a prompt
    without any scored verdict has the state and cause of its last one.
    """

    scores: dict[str, float]
    verdicts: dict[str, list[float]]
    states: dict[str, str]
    causes: Counter[str]
    num_verdicts: int
    num_scored_verdicts: int
    judges: tuple[str, ...]


def gather_scores(verdicts: dict[tuple[str, int, int], Row], ids: Iterable[str]) -> ModelScores:
    """Verdicts to one score a prompt.

    Args:
        verdicts: By (id, sample, repeat).
        ids: Every prompt that was asked, in the test set's order; one without verdicts counts as skipped.

    Returns:
        The model's scores.
    """
    by_id: dict[str, list[Row]] = {name: [] for name in ids}
    for (name, _, _), row in sorted(verdicts.items()):
        by_id[name].append(row)
    scores, every, states = {}, {}, {}
    causes: Counter[str] = Counter()
    for name, rows in by_id.items():
        scored = [row for row in rows if row["state"] == "scored"]
        if scored:
            samples: dict[int, list[float]] = {}
            for row in scored:
                samples.setdefault(int(row.get("sample", 0)), []).append(float(row["score"]))
            scores[name] = fmean(fmean(repeats) for repeats in samples.values())
            every[name] = [float(row["score"]) for row in scored]
            states[name] = "scored"
            continue
        states[name] = rows[-1]["state"] if rows else "skipped"
        cause = (rows[-1].get("cause") or "no cause was written") if rows else "no verdict was written"
        causes[f"{states[name]}: {cause}"] += 1
    return ModelScores(
        scores=scores,
        verdicts=every,
        states=states,
        causes=causes,
        num_verdicts=len(verdicts),
        num_scored_verdicts=sum(row["state"] == "scored" for row in verdicts.values()),
        judges=tuple(sorted({str(row.get("judge", "unknown")) for row in verdicts.values()})),
    )


def asked_ids(files: RunFiles) -> list[str]:
    """The prompts that were asked: the test set's, or without it all that any file names."""
    if files.test:
        return list(files.test)
    names: dict[str, None] = {}
    groups: list[Mapping[Any, Row]] = [*files.responses.values(), *files.verdicts.values()]
    for rows in groups:
        names.update((str(row["id"]), None) for row in rows.values())
    return list(names)


def categories_of(files: RunFiles) -> dict[str, str]:
    """Each asked prompt's category, from the test set or else from its responses and verdicts."""
    rows: dict[str, Row] = {}
    groups: list[Mapping[Any, Row]] = [*files.verdicts.values(), *files.responses.values()]
    for group in groups:
        rows.update({str(row["id"]): row for row in group.values()})
    rows.update(files.test)
    return {name: str(row.get("category") or NO_CATEGORY) for name, row in rows.items()}


@dataclass(frozen=True)
class BeforeAfter:
    """Base and tuned over some prompts; `paired` are the ids scored for both, in order."""

    num_asked: int
    paired: list[str]
    base: ModelScores
    tuned: ModelScores
    difference: PairedDifference


def pair(ids: Sequence[str], base: ModelScores, tuned: ModelScores, config: ReportConfig) -> BeforeAfter:
    """Join two models' scores by id.

    Args:
        ids: The prompts to look at.
        base: The model before.
        tuned: The model after.
        config: Of the report.

    Returns:
        The two with their paired difference.
    """
    paired = [name for name in ids if name in base.scores and name in tuned.scores]
    difference = paired_difference(
        [base.scores[name] for name in paired],
        [tuned.scores[name] for name in paired],
        confidence=config.confidence,
        num_resamples=config.bootstrap_samples,
    )
    return BeforeAfter(len(ids), paired, base, tuned, difference)


def have_one_judge(base: ModelScores, tuned: ModelScores) -> bool:
    """Whether two models' scores may be compared at all: one of them has none, or both have the same judges'."""
    return not (base.judges and tuned.judges) or base.judges == tuned.judges


def mean_of(scores: Iterable[float], config: ReportConfig) -> Estimate:
    """The mean of one score a prompt with its bootstrap interval."""
    return bootstrap_mean(list(scores), confidence=config.confidence, num_resamples=config.bootstrap_samples)
