"""Several runs on one leaderboard, and the gates that a release has to pass.

The first run is the baseline and the others are candidates, by their tuned models; a single run is compared with its
own base. All are measured over the same prompts with the same judge, or it is not a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from evaluation.config import ReportConfig
from evaluation.errors import EvaluationError
from evaluation.report.headline import interval_text
from evaluation.report.run_files import RunFiles, read_run
from evaluation.report.scores import ModelScores, categories_of, gather_scores, mean_of, pair
from evaluation.statistics import Estimate, PairedDifference, holm

# A mean over fewer of the prompts than this says too little about all of them.
MIN_SCORED_SHARE = 0.99
# Words of the judge's section that say how fast or how long it may be asked, not what it answers.
JUDGE_PACE = (
    "concurrency",
    "per_minute",
    "timeout",
    "retries",
    "max_cost",
    "max_calls",
    "api_key",
    "base_url",
    "price",
)


@dataclass(frozen=True)
class Gates:
    """What a candidate must reach; None and False ask for nothing.

    `min_score`: its mean score, in points. `max_drop`: how far, in points, its mean may lie below the baseline's.
    `significant`: its gain over the baseline must be distinguishable from chance. `category_min_score` and
    `category_max_drop`: the same for the prompts of one category, by its name.
    """

    min_score: float | None = None
    max_drop: float | None = None
    significant: bool = False
    category_min_score: Mapping[str, float] = field(default_factory=dict)
    category_max_drop: Mapping[str, float] = field(default_factory=dict)

    @property
    def categories(self) -> set[str]:
        """The categories that have a gate of their own."""
        return {*self.category_min_score, *self.category_max_drop}


@dataclass(frozen=True)
class CategoryResult:
    """One category of one candidate; the difference is to the baseline."""

    num_prompts: int
    mean: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Entry:
    """One line of the leaderboard; the difference is to the baseline, which itself has none.

    `categories` holds those that have a gate and at least one prompt.
    """

    name: str
    num_scored: int
    mean: Estimate
    difference: PairedDifference | None
    p_holm: float | None
    is_significant: bool
    categories: Mapping[str, CategoryResult]


@dataclass(frozen=True)
class GateResult:
    """Whether one candidate passed one gate; `value` is None where nothing was measured, which is no pass.

    `category` is None for a gate over all prompts.
    """

    gate: Literal["min_score", "max_drop", "significant"]
    candidate: str
    limit: float
    value: float | None
    passed: bool
    category: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The leaderboard, best mean first, with what speaks against it and how the gates went."""

    baseline: str
    num_prompts: int
    num_asked: int
    judge: str
    entries: tuple[Entry, ...]
    gates: tuple[GateResult, ...]
    problems: tuple[str, ...]
    forced: bool

    @property
    def exit_code(self) -> int:
        """0 passed, 1 a gate failed, 2 not a valid measurement."""
        return exit_code(
            self.problems, self.gates, forced=self.forced, means=[entry.mean.mean for entry in self.entries]
        )

    def to_json(self) -> dict[str, Any]:
        """All fields and the exit code, JSON-able."""
        return asdict(self) | {"exit_code": self.exit_code}

    @property
    def text(self) -> str:
        """The leaderboard for a terminal."""
        return as_text(self)


def exit_code(
    problems: Sequence[str], gates: Sequence[GateResult], *, forced: bool, means: Sequence[float | None]
) -> int:
    """The policy of `launcher compare`.

    Args:
        problems: Why this is no valid measurement.
        gates: All results.
        forced: The user looked at the problems and wants the numbers all the same.
        means: Of all entries.

    Returns:
        2 without a mean, without the number that a gate asks for, or with a problem that was not forced; 1 when a gate
        failed; else 0.
    """
    unmeasured = any(mean is None for mean in means) or any(gate.value is None for gate in gates)
    if unmeasured or (problems and not forced):
        return 2
    return 0 if all(gate.passed for gate in gates) else 1


def compare(runs: Sequence[Path], config: ReportConfig, gates: Gates, *, force: bool = False) -> Comparison:
    """Put runs on one leaderboard.

    Args:
        runs: Run folders, the baseline first.
        config: Coverage and resamples.
        gates: What candidates must reach.
        force: Compare over the prompts in common although judges or data differ.

    Returns:
        The leaderboard; its exit code says whether it is valid and passed.

    Raises:
        EvaluationError: A folder is no run, a file in it is broken, or a run is given twice.
    """
    contestants = _contestants(runs)
    shared, problems = _shared_ids([files for files, _ in contestants.values()])
    problems += _judge_problems(contestants)
    scores = {
        name: gather_scores(
            {key: row for key, row in files.verdicts.get(model, {}).items() if key[0] in shared}, shared
        )
        for name, (files, model) in contestants.items()
    }
    problems += _coverage_problems(scores, len(shared))
    common = [name for name in shared if all(name in own.scores for own in scores.values())]
    categories = categories_of(next(iter(contestants.values()))[0])
    gated = {name: [row for row in common if categories[row] == name] for name in sorted(gates.categories)}
    problems += [
        f"No prompt is of category {name!r}, which has a gate; there are {', '.join(sorted(set(categories.values())))}."
        for name in sorted(gates.categories - set(categories.values()))
    ]
    entries = _entries(scores, common, gated, config)
    baseline = next(iter(contestants))
    return Comparison(
        baseline=baseline,
        num_prompts=len(common),
        num_asked=len(shared),
        judge=" and ".join(sorted({judge for own in scores.values() for judge in own.judges})) or "none",
        entries=tuple(
            sorted(entries, key=lambda entry: (entry.mean.mean is None, -(entry.mean.mean or 0.0), entry.name))
        ),
        gates=tuple(check_gates([entry for entry in entries if entry.name != baseline], gates)),
        problems=tuple(problems),
        forced=force,
    )


def _contestants(runs: Sequence[Path]) -> dict[str, tuple[RunFiles, str]]:
    """Name on the board to (run, model), the baseline first."""
    if not runs:
        raise EvaluationError("nothing to compare: give one run folder or more")
    loaded = [read_run(path) for path in runs]
    if len(loaded) == 1:
        return {"base": (loaded[0], "base"), "tuned": (loaded[0], "tuned")}
    resolved = [files.run_dir.resolve() for files in loaded]
    if len(set(resolved)) < len(resolved):
        raise EvaluationError(f"a run is given twice: {', '.join(map(str, runs))}")
    names = [path.name for path in resolved]
    if len(set(names)) < len(names):
        names = [str(path) for path in resolved]
    return {name: (files, "tuned") for name, files in zip(names, loaded, strict=True)}


def _shared_ids(runs: Sequence[RunFiles]) -> tuple[list[str], list[str]]:
    """Prompts that are the same everywhere, and what speaks against comparing the rest."""
    first = runs[0]
    without = [str(files.run_dir) for files in runs if not files.test]
    if without:
        return [], [f"There is no data/test.jsonl in {', '.join(dict.fromkeys(without))}: run its prepare stage."]

    def asked(files: RunFiles, name: str) -> tuple[object, ...] | None:
        row = files.test.get(name)
        return None if row is None else (row.get("messages") or row.get("prompt"), row.get("reference"))

    shared = [name for name in first.test if all(asked(files, name) == asked(first, name) for files in runs)]
    everything = {name for files in runs for name in files.test}
    if len(shared) == len(everything):
        return shared, []
    return shared, [
        f"The runs have different test data: {len(shared)} of {len(everything)} rows are the same in all. "
        "Train and judge them on one split, or force the comparison over the rows in common."
    ]


def _judge_problems(contestants: Mapping[str, tuple[RunFiles, str]]) -> list[str]:
    judges = {}
    for name, (files, model) in contestants.items():
        names = sorted({str(row.get("judge")) for row in files.verdicts.get(model, {}).values()})
        fingerprint = files.records.get("judge", {}).get("fingerprint", {})
        settings = {
            key: value
            for key, value in fingerprint.items()
            if key.startswith("judge.") and not any(word in key for word in JUDGE_PACE)
        }
        judges[name] = (names, settings)
    baseline, *others = judges.items()
    problems = []
    for name, (names, settings) in others:
        expected_names, expected = baseline[1]
        changed = sorted(key for key in settings.keys() | expected.keys() if settings.get(key) != expected.get(key))
        if names != expected_names:
            problems.append(
                f"{name} was judged by {' and '.join(names) or 'nobody'}, {baseline[0]} by {expected_names}."
            )
        elif changed and settings and expected:
            problems.append(f"{name} was judged with other settings than {baseline[0]}: {', '.join(changed)} differ.")
    return problems


def _coverage_problems(scores: Mapping[str, ModelScores], num_asked: int) -> list[str]:
    return [
        f"{name} has a score for {len(own.scores)} of {num_asked} prompts; {MIN_SCORED_SHARE:.0%} are needed."
        for name, own in scores.items()
        if len(own.scores) < MIN_SCORED_SHARE * num_asked
    ]


def _entries(
    scores: Mapping[str, ModelScores],
    common: Sequence[str],
    gated: Mapping[str, Sequence[str]],
    config: ReportConfig,
) -> list[Entry]:
    baseline, *candidates = scores
    differences = {name: pair(common, scores[baseline], scores[name], config).difference for name in candidates}
    tested = [name for name in candidates if differences[name].p_sign_flip is not None]
    corrected = dict(zip(tested, holm([differences[name].p_sign_flip or 0.0 for name in tested]), strict=True))
    entries = []
    for name, own in scores.items():
        difference, p = differences.get(name), corrected.get(name)
        is_significant = (
            difference is not None and p is not None and difference.is_distinguishable(config.confidence)
        ) and p <= 1 - config.confidence
        mean = mean_of([own.scores[row] for row in common], config)
        parts = {
            category: CategoryResult(
                len(rows),
                mean_of([own.scores[row] for row in rows], config),
                pair(rows, scores[baseline], own, config).difference.estimate,
            )
            for category, rows in gated.items()
            if rows
        }
        entries.append(Entry(name, len(own.scores), mean, difference, p, is_significant, parts))
    return entries


def check_gates(candidates: Sequence[Entry], gates: Gates) -> list[GateResult]:
    """Every gate for every candidate; a missing number does not pass.

    Args:
        candidates: Entries with a difference to the baseline.
        gates: What is asked.

    Returns:
        One result a gate and candidate.
    """
    results: list[GateResult] = []
    for entry in candidates:
        mean = entry.mean.mean
        change = entry.difference.estimate.mean if entry.difference else None
        if gates.min_score is not None:
            results.append(_floor("min_score", entry.name, gates.min_score, mean))
        if gates.max_drop is not None:
            results.append(_floor("max_drop", entry.name, gates.max_drop, change))
        for category in sorted(gates.categories):
            part = entry.categories.get(category)
            if category in gates.category_min_score:
                value = None if part is None else part.mean.mean
                results.append(_floor("min_score", entry.name, gates.category_min_score[category], value, category))
            if category in gates.category_max_drop:
                value = None if part is None else part.difference.mean
                results.append(_floor("max_drop", entry.name, gates.category_max_drop[category], value, category))
        if gates.significant:
            passed = entry.is_significant and change is not None and change > 0
            results.append(GateResult("significant", entry.name, 0.0, change, passed))
    return results


def _floor(
    gate: Literal["min_score", "max_drop"],
    candidate: str,
    limit: float,
    value: float | None,
    category: str | None = None,
) -> GateResult:
    least = limit if gate == "min_score" else -limit
    return GateResult(gate, candidate, limit, value, value is not None and value >= least, category)


def as_text(comparison: Comparison) -> str:
    """The comparison as lines.

    Args:
        comparison: What `compare` returned.

    Returns:
        Text that ends without a line break.
    """
    width = max(len(entry.name) for entry in comparison.entries)
    lines = [
        f"{comparison.num_prompts} of {comparison.num_asked} prompts scored for all, {comparison.judge} judge, "
        f"differences to {comparison.baseline}",
        "",
    ]
    for entry in comparison.entries:
        line = f"{entry.name:<{width}}  {interval_text(entry.mean.to_json()):<22}"
        if entry.difference is not None:
            p, verdict = "", ""
            if entry.p_holm is not None:
                p = "  p < 0.001" if entry.p_holm < 0.001 else f"  p {entry.p_holm:.3f}"
                verdict = "" if entry.is_significant else "  not distinguishable"
            line += f"  {interval_text(entry.difference.estimate.to_json(), signed=True):<24}{p}{verdict}"
        lines.append(line.rstrip())
    for gate in comparison.gates:
        value = "nothing measured" if gate.value is None else f"{gate.value:.1f}"
        words = {
            "min_score": f"mean at least {gate.limit:g}",
            "max_drop": f"no more than {gate.limit:g} points below {comparison.baseline}",
            "significant": f"better than {comparison.baseline} beyond chance",
        }[gate.gate]
        where = "" if gate.category is None else f" in category {gate.category}"
        lines.append(f"{'passed' if gate.passed else 'FAILED'}  {gate.candidate}: {words}{where} ({value})")
    if comparison.problems:
        lines += ["", "Forced although:" if comparison.forced else "Not a valid measurement:"]
        lines += [f"- {problem}" for problem in comparison.problems]
    return "\n".join(lines)
