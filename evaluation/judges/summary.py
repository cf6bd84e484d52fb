"""What is known about a judge after its work: was it fooled, is it related to the models, what did it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.config import ApiJudge, VllmJudge
from evaluation.judges import checks
from evaluation.judges.budget import prices_of
from evaluation.judges.language_model import PromptedJudge
from evaluation.rows import Row
from evaluation.statistics import classification, position_bias

_CONFIDENCE = 0.95


def reliability(
    config: VllmJudge | ApiJudge,
    asked: PromptedJudge,
    tried: Sequence[Row],
    scores: Mapping[str, Sequence[Row]],
    responses: Mapping[str, Sequence[Row]],
    run_dir: Path,
) -> dict[str, Any]:
    """Sum up what speaks for and against a judge.

    Args:
        config: The judge's settings.
        asked: The judge.
        tried: Finished rows of its checks.
        scores: Finished rows by model.
        responses: The judged responses by model.
        run_dir: The run's folder; `responses/models.json` tells what the models are.

    Returns:
        The content of `judge/summary.json`.
    """
    canaries = [row for row in tried if row["id"].startswith("canary/")]
    known = [row for row in tried if row["id"].startswith("self-test/")]
    generated = {name: [row for row in rows if row["state"] == "generated"] for name, rows in responses.items()}
    summary: dict[str, Any] = {
        "judge": asked.name,
        "protocol": asked.form.name,
        "self_test": {row["id"].partition("/")[2]: row["score"] for row in known} if config.self_test else None,
        "canaries": checks.judge_canaries(canaries, config.canary_limit),
        "null_models": checks.null_models(generated),
        **_relations(config, asked.identity, run_dir),
        "spent": _spent(config, [*tried, *(row for rows in scores.values() for row in rows)]),
    }
    if asked.form.name == "pairwise":
        summary["position"] = {name: _position(rows) for name, rows in scores.items()}
    return summary


def classified(rows: Sequence[Row]) -> Row | None:
    """Sum up verdicts on labels.

    Args:
        rows: Rows of a `LabelMeter`, with `expected` and `given` in the details of those that are scored.

    Returns:
        Accuracy, F1 and, for each expected label, the counts of what was given (the empty word is no label); None
        where no row is scored.
    """
    details = [row["details"] for row in rows if row["state"] == "scored"]
    found = classification([each["expected"] for each in details], [each["given"] for each in details])
    if found is None:
        return None
    confusion = {
        label: {given: count for given, count in zip((*found.labels, ""), counts, strict=True) if count}
        for label, counts in zip(found.labels, found.confusion, strict=True)
        if sum(counts)
    }
    measures = {name: getattr(found, name) for name in ("accuracy", "macro_f1", "micro_f1", "f1")}
    return measures | {"confusion": confusion}


def _relations(config: VllmJudge | ApiJudge, identity: Row, run_dir: Path) -> dict[str, list[str]]:
    """Name the models under test that the judge is, or whose family it is of: it may favour its own words."""
    path = run_dir / "responses" / "models.json"
    models = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    name = config.model.casefold()
    same = [key for key, facts in models.items() if _is_same(facts, identity)]
    family = [key for key, facts in models.items()
              if identity.get("family", "") == facts["family"] or facts["family"].casefold() in name]  # fmt: skip
    return {"same_model_as": same, "same_family_as": family}


def _is_same(facts: Row, identity: Row) -> bool:
    """Tell whether a model under test is the judge: by its weights, or by its name at the same endpoint."""
    if "base_url" in facts:
        return (facts["base_url"], facts["model"]) == (identity.get("base_url"), identity.get("model"))
    return bool(facts["fingerprint"] == identity.get("fingerprint"))


def _spent(config: VllmJudge | ApiJudge, rows: Sequence[Row]) -> dict[str, float | None]:
    """Add up calls and tokens over all rows, failed attempts included; each shared verdict counts once."""
    once = {row["key"]: row for row in rows}.values()
    totals: dict[str, float | None] = {
        name: sum(row[name] for row in once) for name in ("num_calls", "num_prompt_tokens", "num_response_tokens")
    }
    prices = prices_of(config)
    tokens = totals["num_prompt_tokens"] or 0, totals["num_response_tokens"] or 0
    return {**totals, "cost": prices.cost(*tokens) if prices else None}


def _position(rows: Sequence[Row]) -> dict[str, Any]:
    """Tell how the order of the two responses moved the judge."""
    pairs = [row["details"] for row in rows if row["state"] == "scored" and "preference_first" in row["details"]]
    bias = position_bias(
        [pair["preference_first"] for pair in pairs],
        [pair["preference_second"] for pair in pairs],
        confidence=_CONFIDENCE,
    )
    return {
        "num_pairs": bias.num_pairs,
        "flip_rate": bias.flip_rate.to_json(),
        "first_rate": bias.first_rate.to_json(),
    }
