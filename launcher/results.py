"""The commands about finished runs and about files of other tools: compare, agree, score, export-results.

Their exit status: 0 is good, 1 a gate that failed, 2 input from which nothing valid could be measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from evaluation.config import ReportConfig
from evaluation.errors import EvaluationError
from launcher.errors import ConfigError
from launcher.run_directory import read_json
from launcher.submit.sweep import SWEEP_FILE

OF_CATEGORY = "CATEGORY=POINTS for one category (repeatable)"
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    for command in (compare, agree, score, export_results):
        app.command()(command)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, the baseline first.")],
    min_score: Annotated[list[str] | None, typer.Option(help=f"Gate: least mean score; {OF_CATEGORY}.")] = None,
    max_drop: Annotated[
        list[str] | None, typer.Option(help=f"Gate: most points below the baseline; {OF_CATEGORY}.")
    ] = None,
    significant: Annotated[bool, typer.Option("--significant", help="Gate: the gain is distinguishable.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Compare although judges or data differ.")] = False,
    as_json: AsJson = False,
) -> None:
    """A leaderboard of runs, or of a sweep's, on the same prompts; status 0 passed, 1 a gate failed, 2 not valid."""
    from evaluation import compare as comparing

    least, category_least = _limits("--min-score", min_score or [])
    most, category_most = _limits("--max-drop", max_drop or [])
    gates = comparing.Gates(
        min_score=least,
        max_drop=most,
        significant=significant,
        category_min_score=category_least,
        category_max_drop=category_most,
    )
    try:
        runs, missing = _with_members(runs)
        result = comparing.compare(runs, ReportConfig(), gates, force=force)
    except EvaluationError as error:
        raise ConfigError(str(error)) from None
    typer.echo(json.dumps(result.to_json(), indent=2, ensure_ascii=False) if as_json else result.text)
    for line in missing:
        typer.echo(line, err=True)
    raise typer.Exit(2 if missing else result.exit_code)


def _limits(option: str, values: list[str]) -> tuple[float | None, dict[str, float]]:
    """`60` is for all prompts, `math=55` for those of a category; the limit over all, and the limits by category."""
    over_all: float | None = None
    by_category: dict[str, float] = {}
    for value in values:
        category, is_category, number = value.rpartition("=")
        try:
            points = float(number)
        except ValueError:
            points = -1.0
        if not 0 <= points <= 100:
            raise ConfigError(f"{option} {value}: points from 0 to 100 are needed, alone or as CATEGORY=POINTS")
        if is_category and category not in by_category:
            by_category[category] = points
        elif not is_category and over_all is None:
            over_all = points
        else:
            raise ConfigError(f"{option} {value}: this gate is given twice")
    return over_all, by_category


def _with_members(runs: list[Path]) -> tuple[list[Path], list[str]]:
    """Put a sweep's members in its folder's place; those without scores are told and left out."""
    found, missing = list[Path](), list[str]()
    for run in runs:
        sweep = read_json(run / SWEEP_FILE) or {"members": {}}
        members = [run / name for name in sweep["members"]]
        done = [member for member in members if (member / "judge.record.json").exists()]
        missing += [f"not finished, and left out: {member}" for member in members if member not in done]
        if members and not done:
            raise ConfigError("\n".join(["no member of this sweep has finished", *missing]))
        found += done or [run]
    return found, missing


def agree(
    scores: Annotated[Path, typer.Argument(help="A run's scores/<model>.jsonl.")],
    human: Annotated[Path, typer.Argument(help="JSON Lines of people's scores: id, score, and rater if several.")],
    as_json: AsJson = False,
) -> None:
    """How far a judge agrees with people, and the mean corrected for its error; status 2 where files don't line up."""
    from evaluation import agreement

    try:
        result = agreement.agree(scores, human, ReportConfig())
    except EvaluationError as error:
        raise ConfigError(str(error)) from None
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else agreement.as_text(result))


def score(
    file: Annotated[Path, typer.Argument(help="AlpacaEval's annotations.json.")],
    as_json: AsJson = False,
) -> None:
    """Win rate and standard error of verdicts made elsewhere, asking no model; status 2 where none is valid."""
    from evaluation import interchange

    try:
        result = interchange.score_file(file, ReportConfig())
    except EvaluationError as error:
        raise ConfigError(str(error)) from None
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else interchange.score_text(result))
    raise typer.Exit(interchange.score_exit_code(result))


def export_results(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    kind: Annotated[str, typer.Argument(metavar="FORMAT", help="Another tool's format; a wrong one lists them.")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    model: Annotated[str, typer.Option(help="Whose responses and scores.")] = "tuned",
) -> None:
    """Write a run's responses or verdicts in another tool's format."""
    from evaluation.report import exports

    for known in exports.FORMATS:
        if known == kind:
            typer.echo(f"wrote {exports.export_run(run, known, out, model=model)}")
            return
    raise ConfigError(f"FORMAT {kind}: not known; the formats are {', '.join(exports.FORMATS)}")
