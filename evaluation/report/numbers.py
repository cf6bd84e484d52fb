"""The numbers of report.json, from a run directory's files: pure, no file is touched here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean, median
from typing import Any

import numpy as np

from evaluation.config import ReportConfig
from evaluation.report.headline import comparison_of, headline_of
from evaluation.report.problems import find_problems
from evaluation.report.run_files import STAGES, STATES, RunFiles
from evaluation.report.scores import (
    BeforeAfter,
    ModelScores,
    asked_ids,
    categories_of,
    gather_scores,
    have_one_judge,
    mean_of,
    pair,
)
from evaluation.rows import Row
from evaluation.statistics import bounds_with_missing, classification, holm, krippendorff_alpha, proportion, spread


def build_numbers(files: RunFiles, config: ReportConfig) -> dict[str, Any]:
    """Everything that report.json holds.

    Args:
        files: The run directory's content.
        config: Of the report.

    Returns:
        A JSON-able dictionary; the parts whose files are missing are empty and named under `missing`.
    """
    ids = asked_ids(files)
    models = {name: gather_scores(files.verdicts.get(name, {}), ids) for name in files.models()}
    empty = gather_scores({}, ids)
    base, tuned = models.get("base", empty), models.get("tuned", empty)
    # Scores of different judges have no difference; each model keeps its own mean.
    both = replace(pair(ids if have_one_judge(base, tuned) else [], base, tuned, config), num_asked=len(ids))
    headline = headline_of(both, config)
    return {
        "schema_version": 1,
        "name": files.run_dir.resolve().name,
        "headline": headline,
        "confidence": config.confidence,
        "comparison": comparison_of(both, config, is_pairwise=files.judge_summary.get("protocol") == "pairwise"),
        "models": _models(files, models, ids, config),
        "categories": _categories(files, ids, both, config),
        "histogram": {name: _histogram(scores.scores.values()) for name, scores in models.items()},
        "samples": _samples(both, config.num_samples),
        "benchmarks": _benchmarks(files.harness),
        "export_check": _export_check(files.records.get("export")),
        "curves": _curves(files.metrics),
        "data": files.summary,
        "judge": files.judge_summary,
        "stages": [_stage(stage, files.records[stage]) for stage in STAGES if stage in files.records],
        "throughput": _throughput(files),
        "versions": _versions(files.records),
        "problems": find_problems(files, models, len(ids), headline),
        "missing": files.missing,
    }


def _models(
    files: RunFiles, models: Mapping[str, ModelScores], ids: Sequence[str], config: ReportConfig
) -> dict[str, dict[str, Any]]:
    """Each model on its own, and against base with p values corrected for the number of models."""
    base = models.get("base")
    others = {
        name: pair(ids, base, own, config).difference
        for name, own in models.items()
        if base and name != "base" and have_one_judge(base, own)
    }
    tested = {name: d.p_sign_flip for name, d in others.items() if d.p_sign_flip is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    result = {}
    for name, own in models.items():
        details = [
            row.get("details") or {} for row in files.verdicts.get(name, {}).values() if row["state"] == "scored"
        ]
        result[name] = _model(own, len(ids), config) | {
            "difference_to_base": others[name].estimate.to_json() if name in others else None,
            "p_holm": corrected.get(name),
            "num_cut": sum(row.get("finish_reason") == "length" for row in files.responses.get(name, {}).values()),
            "thoughts": _thoughts(list(files.responses.get(name, {}).values()), config),
            "verdict_alpha": _verdict_alpha(files.verdicts.get(name, {})),
            "measures": _measures(details),
            "classification": _classification(details),
        }
    return result


def _model(scores: ModelScores, num_asked: int, config: ReportConfig) -> dict[str, Any]:
    worst, best = bounds_with_missing(list(scores.scores.values()), num_asked - len(scores.scores))
    return {
        "mean": mean_of(scores.scores.values(), config).to_json(),
        "num_asked": num_asked,
        "states": {state: sum(s == state for s in scores.states.values()) for state in STATES},
        "causes": dict(scores.causes.most_common()),
        "mean_if_missing_scored_lowest": worst,
        "mean_if_missing_scored_highest": best,
        "num_verdicts": scores.num_verdicts,
        "num_scored_verdicts": scores.num_scored_verdicts,
        "spread": asdict(spread(list(scores.verdicts.values()))),
        "judges": list(scores.judges),
    }


def _thoughts(responses: Sequence[Row], config: ReportConfig) -> dict[str, Any] | None:
    """How long a model thinks and how often it does not come to an end; None where it never thought."""
    own = [row for row in responses if row.get("thought_closed") is not None]
    if not own:
        return None
    closed = [len(row["thought"]) for row in own if row["thought_closed"] and row.get("thought")]
    num_unclosed = sum(not row["thought_closed"] for row in own)
    return {
        "num_responses": len(responses),
        "num_thoughts": len(own),
        "num_unclosed": num_unclosed,
        "unclosed_share": proportion(num_unclosed, len(own), confidence=config.confidence).to_json(),
        "mean_characters": fmean(closed) if closed else None,
        "median_characters": float(median(closed)) if closed else None,
        "longest_characters": max(closed, default=None),
    }


def _verdict_alpha(verdicts: Mapping[tuple[str, int, int], Row]) -> float | None:
    """How far repeated verdicts on the same response agree: Krippendorff's alpha for intervals."""
    repeats: dict[tuple[str, int], list[float | None]] = {}
    for (name, sample, _), row in verdicts.items():
        if row["state"] == "scored":
            repeats.setdefault((name, sample), []).append(float(row["score"]))
    return krippendorff_alpha(list(repeats.values()), interval=True)


def _measures(details: Sequence[Row]) -> dict[str, dict[str, float | int]]:
    """Means of what the judge measured besides the score: every number or yes-or-no in the verdicts' details.

    Rubrics keep their criteria one level down.
    """
    values: dict[str, list[float]] = {}
    for row in details:
        for key, value in (row | (row.get("criteria") or {})).items():
            if isinstance(value, int | float):
                values.setdefault(key, []).append(float(value))
    return {key: {"mean": fmean(found), "num": len(found)} for key, found in values.items()}


def _classification(details: Sequence[Row]) -> dict[str, Any] | None:
    labelled = [row for row in details if isinstance(row.get("expected"), str) and "given" in row]
    found = classification([row["expected"] for row in labelled], [row["given"] for row in labelled])
    return None if found is None else asdict(found)


def _categories(files: RunFiles, ids: Sequence[str], both: BeforeAfter, config: ReportConfig) -> list[dict[str, Any]]:
    categories = categories_of(files)
    groups: dict[str, list[str]] = {}
    for name in ids:
        groups.setdefault(categories[name], []).append(name)
    rows = []
    for category, names in sorted(groups.items()):
        group = pair(names if both.paired else [], both.base, both.tuned, config)
        rows.append(
            {
                "category": category,
                "num_asked": len(names),
                "num_prompts": len(group.paired),
                "base": mean_of([both.base.scores[name] for name in group.paired], config).to_json(),
                "tuned": mean_of([both.tuned.scores[name] for name in group.paired], config).to_json(),
                "difference": group.difference.estimate.to_json(),
                "wins": group.difference.wins,
                "ties": group.difference.ties,
                "losses": group.difference.losses,
            }
        )
    return rows


def _histogram(scores: Iterable[float]) -> list[int]:
    """Prompts by score in ten bins of ten points; 100 lies in the last."""
    counts, _ = np.histogram(list(scores), bins=10, range=(0, 100))
    return [int(count) for count in counts]


def _samples(both: BeforeAfter, num: int) -> dict[str, list[str]]:
    """Ids of the examples to show; ties keep the test set's order."""
    tuned = both.tuned
    change = {name: tuned.scores[name] - both.base.scores[name] for name in both.paired}
    return {
        "best": sorted(tuned.scores, key=lambda name: -tuned.scores[name])[:num],
        "worst": sorted(tuned.scores, key=lambda name: tuned.scores[name])[:num],
        "most_changed": sorted((name for name in both.paired if change[name]), key=lambda n: -abs(change[n]))[:num],
    }


def _benchmarks(harness: Mapping[str, Row]) -> list[Row]:
    """The lm-evaluation-harness's measures, the models side by side: one row a task, metric and filter."""
    rows: dict[tuple[str, str, str], Row] = {}
    for model, result in sorted(harness.items(), key=lambda item: ({"base": 0, "tuned": 1}.get(item[0], 2), item[0])):
        for measure in result["measures"]:
            key = (measure["task"], measure["metric"], measure["filter"])
            row = rows.setdefault(key, dict(zip(("task", "metric", "filter"), key, strict=True)) | {"models": {}})
            row["models"][model] = {
                name: measure[name] for name in ("value", "standard_error", "num", "num_fewshot", "version")
            } | {"harness_version": result["harness_version"]}
            row["higher_is_better"] = measure["higher_is_better"]
    return list(rows.values())


_VLLM_MEASURES = (
    *("num_prompts", "num_tokens", "mean_difference", "mean_limit", "own_difference", "far_difference", "far_share"),
    *("far_share_limit", "largest_difference", "widest_gap", "gap_limit"),
)


def _export_check(record: Row | None) -> dict[str, Any] | None:
    """What the export stage measured of the exported folder; null for what it did not measure."""
    if record is None:
        return None
    counts = record.get("counts", {})
    vllm = counts.get("vllm")
    measured = {name: counts.get(name) for name in ("trained_loss", "exported_loss", "loss_tolerance")}
    if vllm is None:
        return measured | {"vllm": None}
    numbers = {name: vllm.get(name) for name in _VLLM_MEASURES}
    return measured | {"vllm": numbers | {"disagreements": vllm.get("disagreements", [])}}


def _curves(metrics: list[Row]) -> dict[str, list[Row]]:
    train_keys = ("step", "epoch", "total_tokens", "loss", "lr", "grad_norm", "tokens_per_s", "memory_bytes", "mfu")
    train = [row for row in metrics if row.get("kind") == "train"]
    tokens = {row["step"]: row.get("total_tokens") for row in train}
    return {
        "train": [{key: row.get(key) for key in train_keys} for row in train],
        "validation": [
            {
                "step": row.get("step"),
                "epoch": row.get("epoch"),
                "loss": row.get("loss"),
                "total_tokens": 0 if row.get("step") == 0 else tokens.get(row.get("step")),
            }
            for row in metrics
            if row.get("kind") == "validation"
        ],
    }


def _stage(name: str, record: Row) -> dict[str, Any]:
    return {
        "stage": name,
        "wall_s": record.get("wall_s"),
        "finished_at": record.get("finished_at"),
        "counts": record.get("counts", {}),
    }


def _throughput(files: RunFiles) -> list[dict[str, Any]]:
    """What each stage got through in a second, its start-up included; the training rate is the steps' own median."""
    rows: list[dict[str, Any]] = []

    def add(stage: str, unit: str, num: float | None, wall_s: float | None) -> None:
        if num and wall_s:
            rows.append({"stage": stage, "unit": unit, "num": num, "per_s": num / wall_s})

    wall = {stage: record.get("wall_s") for stage, record in files.records.items()}
    splits = files.summary.get("splits", {})
    add("prepare", "rows", sum(split.get("rows", 0) for split in splits.values()), wall.get("prepare"))
    rates = [row["tokens_per_s"] for row in files.metrics if row.get("kind") == "train" and row.get("tokens_per_s")]
    if rates:
        total = sum(row.get("num_tokens", 0) for row in files.metrics if row.get("kind") == "train")
        rows.append({"stage": "train", "unit": "tokens", "num": total, "per_s": float(np.median(rates))})
    responses = [row for model in files.responses.values() for row in model.values()]
    add("generate", "responses", len(responses), wall.get("generate"))
    add("generate", "tokens", sum(row.get("num_response_tokens") or 0 for row in responses), wall.get("generate"))
    add("judge", "verdicts", sum(len(rows) for rows in files.verdicts.values()), wall.get("judge"))
    return rows


def _versions(records: dict[str, Row]) -> dict[str, str]:
    merged: dict[str, set[str]] = {}
    for record in records.values():
        for name, version in record.get("versions", {}).items():
            merged.setdefault(str(name), set()).add(str(version))
    return {name: " / ".join(sorted(versions)) for name, versions in sorted(merged.items())}
