"""What a reader must know before believing the headline: pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from evaluation.reply import is_known_reason
from evaluation.report.run_files import RunFiles
from evaluation.report.scores import ModelScores, have_one_judge
from evaluation.rows import Row
from evaluation.statistics import bounds_with_missing


def find_problems(
    files: RunFiles, models: dict[str, ModelScores], num_asked: int, headline: Mapping[str, Any]
) -> list[str]:
    """What a reader must know before believing the headline, the gravest first."""
    problems = []
    base, tuned = models.get("base"), models.get("tuned")
    if base and tuned and not have_one_judge(base, tuned):
        problems.append(
            f"Base was judged by {', '.join(base.judges)} and tuned by {', '.join(tuned.judges)}: "
            "their difference is not a measurement. Judge both with one judge."
        )
    for name in ("base", "tuned"):
        if not files.verdicts.get(name):
            problems.append(f"There are no verdicts on {name}: run the judge stage.")
    problems += _export_problems(files.records.get("export"))
    problems += judge_problems(files.judge_summary)
    problems += _leak_problems(files)
    skipped = [row for row in files.metrics if row.get("kind") == "skipped"]
    if skipped:
        causes = Counter(str(row.get("cause") or "no cause was written") for row in skipped)
        problems.append(f"Training steps skipped: {len(skipped)} ({'; '.join(causes)}).")
    for name, scores in models.items():
        unscored = num_asked - len(scores.scores)
        if unscored and files.verdicts.get(name):
            worst, best = bounds_with_missing(list(scores.scores.values()), unscored)
            problems.append(
                f"Without a score for {name}: {unscored} of {num_asked} prompts. Had they the lowest or the highest "
                f"score, its mean would be {worst:.1f} or {best:.1f}."
            )
    for name, responses in files.responses.items():
        problems += _response_problems(name, list(responses.values()))
    return problems + _no_spread_problems(headline)


def _response_problems(name: str, responses: list[Row]) -> list[str]:
    """Thoughts that did not end, and answers that ended in a way that nobody knows."""
    unclosed = [row for row in responses if row.get("thought_closed") is False]
    reasons = Counter(str(row["finish_reason"]) for row in responses if not is_known_reason(row.get("finish_reason")))
    problems = []
    if unclosed:
        causes = Counter(str(row.get("cause") or "no cause was written") for row in unclosed)
        problems.append(
            f"{name} did not come to an answer in {len(unclosed)} of {len(responses)} responses, which have no score "
            f"({'; '.join(causes)})."
        )
    if reasons:
        counts = ", ".join(f"{num} with {reason!r}" for reason, num in reasons.most_common())
        problems.append(
            f"{name} has responses that ended for a reason that is not known, so they may be cut: {counts}."
        )
    return problems


def _no_spread_problems(headline: Mapping[str, Any]) -> list[str]:
    marked = {name: headline[name] for name in ("base", "tuned", "difference") if headline[name].get("method")}
    return [
        f"All {headline['num_prompts']} values of {name} are {estimate['mean']:.1f}; {estimate['method']}."
        for name, estimate in marked.items()
    ]


def _export_problems(record: Row | None) -> list[str]:
    """Where vLLM, which made the answers, does not compute the model that was trained."""
    vllm = ((record or {}).get("counts") or {}).get("vllm") or {}
    return [
        f"vLLM does not answer like transformers with the exported model, and export.on_disagreement is warn: {words}"
        for words in vllm.get("disagreements", [])
    ]


def _leak_problems(files: RunFiles) -> list[str]:
    """Train rows that repeat test rows and were not taken out: what was learnt by heart is no answer."""
    leaks = files.summary.get("leaks") or {}
    num_train = int(leaks.get("exact_train_rows") or 0) + int(leaks.get("near_train_rows") or 0)
    settings = yaml.safe_load(files.config) if files.config else None
    data = settings.get("data") if isinstance(settings, dict) else None
    if not num_train or (isinstance(data, dict) and data.get("leaks") == "drop"):
        return []
    return [
        f"{leaks.get('test_rows')} test rows stand in the training data too, word for word or nearly ({num_train} "
        "train rows). Set data.leaks to drop and train again."
    ]


def judge_problems(summary: Row) -> list[str]:
    """What speaks against the judge, in words.

    Args:
        summary: `judge/summary.json`; empty for judges that are no language model.

    Returns:
        One sentence a finding.
    """
    problems = []
    canaries = summary.get("canaries") or {}
    if canaries.get("talked_over"):
        fallen = [kind for kind, count in canaries.get("kinds", {}).items() if count.get("fallen_for")]
        problems.append(
            f"This judge can be talked over: worthless answers scored above {canaries.get('limit')} "
            f"({', '.join(fallen)}). A model may have done the same."
        )
    for judge in [summary, *(summary.get("members") or [])]:
        who = f"The judge {judge['judge']}" if judge is not summary else "The judge"
        same = judge.get("same_model_as") or []
        problems += [f"{who} is {name} itself: it judges its own words." for name in same]
        problems += [
            f"{who} is of the same family as {name} and may favour it."
            for name in judge.get("same_family_as") or []
            if name not in same
        ]
    for name, flag in (summary.get("null_models") or {}).items():
        problems.append(
            f"{name} gives one and the same answer to {100 * float(flag.get('share') or 0):.0f}% of the prompts: "
            f"{str(flag.get('response'))[:80]!r}."
        )
    return problems
