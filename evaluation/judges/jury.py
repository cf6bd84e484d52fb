"""Several judges at once: the mean of their scores, and how far they agree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evaluation.config import JuryJudge
from evaluation.judges.scores_file import frequent_causes
from evaluation.rows import Row, content_key, read_rows, write_json, write_rows
from evaluation.statistics import krippendorff_alpha


def merge_members(
    config: JuryJudge,
    models: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    folders: Sequence[Path],
    run_dir: Path,
) -> dict[str, Any]:
    """Average what the members said into `scores/<model>.jsonl` and `judge/summary.json`.

    Args:
        config: The jury.
        models: The models' names.
        results: What each member's stage returned.
        folders: Where each member wrote `scores/<model>.jsonl` and `summary.json`.
        run_dir: The run's folder.

    Returns:
        The same as the stage returns for one judge.
    """
    name = f"jury of {len(config.judges)}"
    merged, ratings = {}, []
    for model in models:
        files = [read_rows(folder / "scores" / f"{model}.jsonl") for folder in folders]
        rows = [_merge(name, members) for members in _by_response(files)]
        ratings += [row["details"]["scores"] for row in rows if "scores" in row["details"]]
        write_rows(run_dir / "scores" / f"{model}.jsonl", rows)
        merged[model] = _count(rows) | {"wall_s": sum(result["models"][model]["wall_s"] for result in results)}
    summaries = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    write_json(run_dir / "judge" / "summary.json", _summary(name, summaries, ratings))
    return {"judge": name, "models": merged}


def _by_response(files: Sequence[Sequence[Row]]) -> list[list[list[Row]]]:
    """Bring together each response's rows of each member; a member's repeats stay together."""
    groups: dict[tuple[str, int], list[list[Row]]] = {}
    for number, rows in enumerate(files):
        for row in rows:
            members = groups.setdefault((row["id"], row["sample"]), [[] for _ in files])
            members[number].append(row)
    return list(groups.values())


def _merge(name: str, members: Sequence[Sequence[Row]]) -> Row:
    """Average one response's scores; it is scored only where each member scored it."""
    first = members[0][0]
    merged = first | {
        "repeat": 0,
        "judge": name,
        "raw": None,
        "key": content_key([row["key"] for m in members for row in m]),
    }
    scores = [[row["score"] for row in rows if row["state"] == "scored"] for rows in members]
    merged["details"] = {
        "members": {rows[0]["judge"]: (fmean(s) if s else None) for rows, s in zip(members, scores, strict=True)}
    }
    for count in ("num_calls", "num_prompt_tokens", "num_response_tokens"):
        merged[count] = sum(row[count] for rows in members for row in rows)
    if all(scores):
        means = [fmean(s) for s in scores]
        merged["details"]["scores"] = means
        return merged | {"state": "scored", "score": fmean(means), "cause": None}
    lacking = next(row for rows, s in zip(members, scores, strict=True) for row in rows if not s)
    return merged | {"state": lacking["state"], "score": None, "cause": f"{lacking['judge']}: {lacking['cause']}"}


def _count(rows: Sequence[Row]) -> dict[str, Any]:
    scores = [row["score"] for row in rows if row["state"] == "scored"]
    counts: dict[str, Any] = {"asked": len(rows), "mean": fmean(scores) if scores else None, "reused": 0}
    for row in rows:
        counts[row["state"]] = counts.get(row["state"], 0) + 1
    return counts | frequent_causes(rows)


def _summary(name: str, members: Sequence[Row], ratings: Sequence[Sequence[float]]) -> Row:
    """Put the members' summaries under one roof, with their agreement (Krippendorff's alpha for intervals)."""
    kinds = {f"{member['judge']}: {kind}": n for member in members for kind, n in member["canaries"]["kinds"].items()}
    return {
        "judge": name,
        "members": list(members),
        "agreement": {"krippendorff_alpha": krippendorff_alpha(ratings, interval=True) if ratings else None},
        "canaries": {
            "limit": max(member["canaries"]["limit"] for member in members),
            "talked_over": any(member["canaries"]["talked_over"] for member in members),
            "kinds": kinds,
        },
        "null_models": members[0]["null_models"],
    }
