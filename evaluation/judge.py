"""The stage that gives every response a verdict, in bulk, and never pays for one twice.

Verdicts are appended to `scores/<model>.jsonl` as they come. Each carries a hash of the row, the response, the judge
and its prompt: a run that was killed asks only for what is missing, and a changed letter in the rubric asks again.
Each row that was asked for ends in exactly one state, and nothing without a verdict is given a number.

A judge that is a language model is tried first: on five known responses, and on canaries, responses that try to fool
it. Their verdicts are in `judge/checks.jsonl`; what they say about the judge is in `judge/summary.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.config import (
    ApiJudge,
    JudgeConfig,
    JuryJudge,
    LabelJudge,
    PairwiseProtocol,
    ReferenceJudge,
    VllmJudge,
)
from evaluation.errors import EvaluationError
from evaluation.judges import checks
from evaluation.judges.base import Judge, Unit
from evaluation.judges.budget import Budget, Range, prices_of
from evaluation.judges.forms import Form, form_of
from evaluation.judges.jury import merge_members
from evaluation.judges.language_model import Engine, PromptedJudge
from evaluation.judges.reference import LabelMeter, ReferenceMeter
from evaluation.judges.scores_file import ScoresFile, open_scores
from evaluation.judges.summary import classified, reliability
from evaluation.progress import RowCounter
from evaluation.rows import Row, read_rows, write_json

PromptedConfig = VllmJudge | ApiJudge

_STATES = ("scored", "judge_failed", "generation_failed", "too_long", "skipped")


def judge(config: JudgeConfig, models: Sequence[str], run_dir: Path, *, strict: bool = False) -> dict[str, Any]:
    """Score the responses of each model. A vLLM judge needs Ray, which the caller has initialised.

    Args:
        config: Which judge, and how it is asked.
        models: Names of the models; `responses/<model>.jsonl` of each is there.
        run_dir: The run's folder; `scores/<model>.jsonl` is written into it.
        strict: True fails the stage where the judge fell for a canary; else the report says so.

    Returns:
        The judge's name and, under `models`, for each model the rows asked, the rows by state, how many were there
        already, the mean over the scored ones, calls, tokens and seconds.

    Raises:
        EvaluationError: Responses are missing, the judge cannot be reached or cannot judge, a limit on calls or cost
            ended the stage early, or too few rows could be scored.
    """
    responses = {name: _read_responses(run_dir, name) for name in models}
    # Another judge's summary says nothing about this one.
    (run_dir / "judge" / "summary.json").unlink(missing_ok=True)
    if isinstance(config, JuryJudge):
        result = _judge_as_jury(config, responses, run_dir)
    else:
        result = _judge_alone(config, responses, run_dir, run_dir / "scores", run_dir / "judge")
    _require_scored(result, config.min_scored)
    summary_path = run_dir / "judge" / "summary.json"
    if strict and summary_path.exists():
        _require_unfooled(json.loads(summary_path.read_text(encoding="utf-8")))
    return result


def estimate(config: JudgeConfig, models: Sequence[str], run_dir: Path) -> dict[str, Any]:
    """Tell what the stage would take now, without a call: verdicts that are there already cost nothing.

    Args:
        config: Which judge, and how it would be asked.
        models: Names of the models; `responses/<model>.jsonl` of each is there.
        run_dir: The run's folder; nothing in it is changed.

    Returns:
        For each judge, by its name: `calls`, `prompt_tokens`, `reply_tokens`, and `cost` where prices are given, each
        with `low`, `expected` and `high`. A judge that asks nobody takes nothing and is left out.
    """
    members = config.judges if isinstance(config, JuryJudge) else [config]
    responses = {name: _read_responses(run_dir, name) for name in models}
    result: dict[str, Any] = {}
    for number, member in enumerate(members):
        folder = run_dir / "judge" / f"member-{number}" if isinstance(config, JuryJudge) else run_dir / "judge"
        scores = folder / "scores" if isinstance(config, JuryJudge) else run_dir / "scores"
        asked = build_judge(member, responses)
        if not isinstance(member, PromptedConfig) or not isinstance(asked, PromptedJudge):
            continue
        tried, batches = _plan(member, asked, responses, scores, folder)
        units = {unit.key: unit for batch in (tried, *batches.values()) if batch for unit in batch.missing()}
        found = asked.estimate(units.values())
        if (prices := prices_of(member)) is not None:
            pairs = zip(found["prompt_tokens"], found["reply_tokens"], strict=True)
            found["cost"] = Range(*(prices.cost(*pair) for pair in pairs))
        result[f"{asked.name} ({number})" if asked.name in result else asked.name] = {
            name: quantity._asdict() for name, quantity in found.items()
        }
    return result


def build_judge(config: JudgeConfig, responses: Mapping[str, Sequence[Row]]) -> Judge:
    """Make the judge that the configuration names."""
    match config:
        case ReferenceJudge():
            return ReferenceMeter()
        case LabelJudge():
            references = {row["reference"] for rows in responses.values() for row in rows}
            return LabelMeter(config.labels or sorted(references))
        case VllmJudge() | ApiJudge():
            form = form_of(config.protocol, expectation=isinstance(config, VllmJudge) and config.expectation)
            budget = Budget(config.max_calls, getattr(config, "max_cost", None), prices_of(config))
            return PromptedJudge(
                _engine(config, form), form, repeats=config.repeats, attempts=config.attempts, budget=budget
            )
        case JuryJudge():
            raise EvaluationError("a jury judges through its members")


def _engine(config: PromptedConfig, form: Form) -> Engine:
    # Ray, vLLM and the client are loaded only by the judge that needs them: it takes seconds.
    if isinstance(config, VllmJudge):
        from evaluation.judges.vllm import VllmEngine

        return VllmEngine(config, form)
    from evaluation.judges.api import ApiEngine

    return ApiEngine(config, form)


def _read_responses(run_dir: Path, model: str) -> list[Row]:
    path = run_dir / "responses" / f"{model}.jsonl"
    if not path.is_file():
        raise EvaluationError(f"{path} is missing; run `launcher generate` first")
    return read_rows(path)


def _judge_as_jury(config: JuryJudge, responses: Mapping[str, list[Row]], run_dir: Path) -> dict[str, Any]:
    """Let each member judge into files of its own, which resume on their own; then average them."""
    results, folders = [], []
    for number, member in enumerate(config.judges):
        folder = run_dir / "judge" / f"member-{number}"
        results.append(_judge_alone(member, responses, run_dir, folder / "scores", folder))
        folders.append(folder)
    return merge_members(config, list(responses), results, folders, run_dir)


def _judge_alone(
    config: ReferenceJudge | LabelJudge | PromptedConfig,
    responses: Mapping[str, list[Row]],
    run_dir: Path,
    scores: Path,
    folder: Path,
) -> dict[str, Any]:
    started = time.monotonic()
    asked = build_judge(config, responses)
    tried, batches = _plan(config, asked, responses, scores, folder)
    for batch in (tried, *batches.values()):
        if batch is not None:
            batch.begin()
    _ask(config, asked, tried, list(batches.values()))
    models = {name: batch.finish() for name, batch in batches.items()}
    for count in models.values():
        count["wall_s"] = time.monotonic() - started
    if tried is not None and isinstance(asked, PromptedJudge) and isinstance(config, PromptedConfig):
        tried.finish()
        summary = reliability(
            config,
            asked,
            tried.rows(),
            {name: batch.rows() for name, batch in batches.items()},
            responses,
            run_dir,
        )
        write_json(folder / "summary.json", summary)
    elif isinstance(asked, LabelMeter):
        found = {name: classified(batch.rows()) for name, batch in batches.items()}
        write_json(folder / "summary.json", {"judge": asked.name, "classification": found})
    return {"judge": asked.name, "models": models}


def _plan(
    config: ReferenceJudge | LabelJudge | PromptedConfig,
    asked: Judge,
    responses: Mapping[str, list[Row]],
    scores: Path,
    folder: Path,
) -> tuple[ScoresFile | None, dict[str, ScoresFile]]:
    """List the judge's checks, if it needs any, and the verdicts that each model is owed; changes no file."""
    tried: ScoresFile | None = None
    if isinstance(asked, PromptedJudge) and isinstance(config, PromptedConfig):
        if isinstance(config.protocol, PairwiseProtocol):
            responses = _pair(responses, config.protocol.baseline)
        tried = open_scores(asked, _check_rows(config, asked, responses), folder / "checks.jsonl", repeats=1)
    batches = {
        name: open_scores(asked, rows, scores / f"{name}.jsonl", asked.repeats) for name, rows in responses.items()
    }
    return tried, batches


def _pair(responses: Mapping[str, list[Row]], baseline: str) -> dict[str, list[Row]]:
    """Give each row the baseline's response to the same prompt and sample."""
    if baseline not in responses:
        raise EvaluationError(f"judge.protocol.baseline: there is no model {baseline!r}, only {', '.join(responses)}")
    opponents = {(row["id"], row["sample"]): row for row in responses[baseline]}
    paired: dict[str, list[Row]] = {}
    for name, rows in responses.items():
        paired[name] = []
        for row in rows:
            opponent = opponents.get((row["id"], row["sample"]))
            if row["state"] == "generated" and (opponent is None or opponent["state"] != "generated"):
                cause = f"{baseline} has no response to compare with"
                paired[name].append(row | {"state": "skipped", "cause": cause})
            else:
                paired[name].append(row | {"opponent_response": opponent and opponent["response"]})
    return paired


def _check_rows(config: PromptedConfig, asked: PromptedJudge, responses: Mapping[str, list[Row]]) -> list[Row]:
    rows = checks.self_test_rows() if config.self_test else []
    first = next(iter(responses.values()), [])
    return rows + checks.canary_rows([row for row in first if row["state"] == "generated"], asked.form)


def _ask(config: JudgeConfig, asked: Judge, tried: ScoresFile | None, batches: Sequence[ScoresFile]) -> None:
    """Get the missing verdicts in one stream, the checks first: one load of the model, and a broken judge ends soon."""
    files = [tried, *batches] if tried is not None else list(batches)
    # Equal responses to one prompt are one question, whichever models gave them.
    homes: dict[str, list[tuple[ScoresFile, Unit]]] = {}
    for batch in files:
        for unit in batch.missing():
            homes.setdefault(unit.key, []).append((batch, unit))
    _require_self_test(config, tried)
    if not homes:
        return
    with RowCounter(f"judge ({asked.name}): verdicts", len(homes)) as counter:
        for unit, verdict in asked.verdicts([places[0][1] for places in homes.values()]):
            for batch, twin in homes[unit.key]:
                batch.add(twin, verdict)
            counter.advance()
            if homes[unit.key][0][0] is tried:
                _require_self_test(config, tried)
    if isinstance(asked, PromptedJudge) and asked.budget.reached is not None:
        num_given = sum(key in places[0][0].finished for key, places in homes.items())
        raise EvaluationError(
            f"the judge stopped at {asked.budget.reached}: {num_given} of {len(homes)} missing verdicts were given "
            "and are kept; raise the limit and run the stage again to go on"
        )


def _require_self_test(config: JudgeConfig, tried: ScoresFile | None) -> None:
    """Refuse the judge as soon as all verdicts on the known responses are there and out of order."""
    if tried is None or not isinstance(config, PromptedConfig) or not config.self_test:
        return
    rows = [tried.finished.get(unit.key) for unit in tried.owed if unit.row["id"].startswith("self-test/")]
    if all(row is not None for row in rows):
        checks.require_order([row for row in rows if row is not None], config.model)


def _require_scored(result: Mapping[str, Any], min_scored: float) -> None:
    """Fail where too many rows have no score: their mean would be one of the rows that were easy to judge.

    Args:
        result: What the stage found.
        min_scored: Share of the rows asked, in 0..1.

    Raises:
        EvaluationError: Names each such model, with its rows by state.
    """
    short = []
    for name, count in result["models"].items():
        if count.get("scored", 0) < min_scored * count["asked"]:
            states = ", ".join(f"{count[state]} {state}" for state in _STATES if count.get(state))
            why = "".join(f", {num} x {cause}" for cause, num in count.get("causes", {}).items())
            short.append(f"{name}: {states} of {count['asked']} asked{why}")
    if short:
        raise EvaluationError(
            f"fewer than judge.min_scored ({min_scored:.0%}) of the rows are scored ({'; '.join(short)}); the causes "
            "are in the files of scores. Run the stage again to ask for failed verdicts anew, or lower judge.min_scored"
        )


def _require_unfooled(summary: Row) -> None:
    if summary.get("canaries", {}).get("talked_over"):
        fallen = [f"{kind} ({n['fallen_for']} of {n['tried']})" for kind, n in summary["canaries"]["kinds"].items()
                  if n["fallen_for"]]  # fmt: skip
        raise EvaluationError(
            f"the judge {summary['judge']} can be talked over: it scored these above judge.canary_limit "
            f"({summary['canaries']['limit']:g}): {', '.join(fallen)}"
        )
