"""The commands. Nothing heavy is imported here: `launcher --help` answers at once."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher import results
from launcher.config import RunConfig, dump_config, load_config
from launcher.errors import ConfigError, LauncherError, Preempted
from launcher.stages import STAGES, Stage
from launcher.submit.commands import MoreSweep, Sweep, register, sweep_words

app = typer.Typer(
    help="Fine-tune a causal language model, and report with error bars how much better it answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
register(app)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file, for example configs/8b.yaml.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a value: --set training.lr=1e-4 (repeatable).")
]
RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", help="The run's folder; default: run.storage/run.name from the configuration."),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Fail if the judge gives a high score to an empty or forged response.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Do it again even if it is finished; the old result is set aside.")
]


@app.command()
def run(
    config: ConfigFile,
    more: MoreSweep = None,
    set_: Overrides = [],  # noqa: B006 - typer copies it
    run_dir: RunDir = None,
    from_: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Begin at this stage.")] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="End after this stage.")] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="STAGE", help="This stage alone.")] = None,
    sweep: Sweep = None,
    side_by_side: Annotated[
        int, typer.Option(min=1, help="Members of the sweep that run at once, on a cluster that exists.")
    ] = 1,
    force: Force = False,
    strict: Strict = False,
) -> None:
    """All six stages in order; finished ones are skipped. With --sweep, for each combination of values."""
    if words := sweep_words(sweep, more):
        if from_ or to or only or force:
            raise ConfigError("--sweep does all stages: leave --from, --to, --only and --force out")
        _sweep(config, set_, run_dir, words, side_by_side=side_by_side, strict=strict)
        return
    if only is not None and (from_ or to):
        raise ConfigError("give --only alone, or --from and --to")
    first = _stage("--from", from_) if from_ else _stage("--only", only) if only else STAGES[0]
    last = first if only else _stage("--to", to) if to else STAGES[-1]
    stages = list(STAGES[STAGES.index(first) : STAGES.index(last) + 1])
    if not stages:
        raise ConfigError(f"--from {first} --to {last}: {last} comes before {first}")
    _run(config, set_, run_dir, stages, force=force, strict=strict)


@app.command()
def plan(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    run_dir: RunDir = None,
    tokens_per_s: Annotated[float | None, typer.Option(min=1, help="Speed of training to reckon with.")] = None,
    gpu_hour_price: Annotated[float | None, typer.Option(min=0, help="Price of one worker's hour.")] = None,
    scale: Annotated[bool, typer.Option("--scale", help="Tell how the run would grow from 1 to 1,000 GPUs.")] = False,
    network_gb_per_s: Annotated[
        float, typer.Option(min=0.001, help="With --scale: what each GPU sends in a second, in GB.")
    ] = 12.5,
) -> None:
    """Check everything and tell what a run would do and need, without starting anything."""
    from launcher import plan as planning
    from launcher.submit.commands import with_site
    from launcher.submit.script import Place, whole_run

    loaded = load_config(config, set_)
    folder = _folder(loaded, run_dir)
    if loaded.cluster.slurm is not None:
        loaded = with_site(loaded, None)  # as it would be submitted: what the job has counts, not this machine
    look = planning.first_look(loaded)
    typer.echo(planning.describe(loaded, folder, look, tokens_per_s=tokens_per_s, gpu_hour_price=gpu_hour_price))
    if scale:
        from launcher.estimate.scale import scale as scaled

        typer.echo("\n".join(["", *scaled(loaded, folder, network_bytes_per_s=network_gb_per_s * 1e9)]))
    planning.check(loaded, look=look)
    if loaded.cluster.slurm is not None:
        place = Place(folder.resolve(), Path.cwd(), sys.executable)
        typer.echo(f"\nThe job's script:\n\n{whole_run(loaded, place)[0].text}", nl=False)


@app.command()
def prepare(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    run_dir: RunDir = None,
    force: Force = False,
    show: Annotated[int, typer.Option(min=0, help="Print so many training rows, the part without loss dimmed.")] = 0,
) -> None:
    """Instructions to packed, prompt-masked shards."""
    _run(config, set_, run_dir, ["prepare"], force=force)
    if show:
        from rich.console import Console

        from trainer.prepare import show as show_rows

        loaded = load_config(config, set_)
        show_rows(loaded.trainer, _folder(loaded, run_dir), show, Console())


@app.command()
def train(config: ConfigFile, set_: Overrides = [], run_dir: RunDir = None, force: Force = False) -> None:  # noqa: B006
    """Shards to checkpoints: Ray places DeepSpeed workers; goes on from the newest checkpoint."""
    _run(config, set_, run_dir, ["train"], force=force)


@app.command()
def export(config: ConfigFile, set_: Overrides = [], run_dir: RunDir = None, force: Force = False) -> None:  # noqa: B006
    """The newest checkpoint to a Hugging Face folder."""
    _run(config, set_, run_dir, ["export"], force=force)


@app.command()
def generate(config: ConfigFile, set_: Overrides = [], run_dir: RunDir = None, force: Force = False) -> None:  # noqa: B006
    """The base and the tuned model answer the test set, on vLLM."""
    _run(config, set_, run_dir, ["generate"], force=force)


@app.command()
def judge(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    run_dir: RunDir = None,
    force: Force = False,
    responses: Annotated[
        Path | None, typer.Option(help="Judge this file of responses made elsewhere instead of the run's models.")
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="Reference answers for --responses without them, as AlpacaEval outputs.")
    ] = None,
    model: Annotated[str, typer.Option("--as", help="Name of the model that made --responses.")] = "other",
    strict: Strict = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Tell calls, tokens and cost of what is missing; ask nobody.")
    ] = False,
) -> None:
    """Score the responses from 0 to 100."""
    if estimate:
        from launcher.run import estimate_judging

        loaded = load_config(config, set_)
        typer.echo(estimate_judging(loaded, _folder(loaded, run_dir)))
        return
    if responses is None:
        _run(config, set_, run_dir, ["judge"], force=force, strict=strict)
        return
    from rich.console import Console

    from launcher.run import judge_file

    loaded = load_config(config, set_)
    judge_file(
        loaded,
        _folder(loaded, run_dir),
        responses,
        model,
        references=references,
        strict=strict,
        console=Console(highlight=False),
    )


@app.command()
def report(config: ConfigFile, set_: Overrides = [], run_dir: RunDir = None, force: Force = False) -> None:  # noqa: B006
    """Write report.html, report.json and report.md."""
    _run(config, set_, run_dir, ["report"], force=force)


@app.command()
def fetch(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List sizes, and download nothing.")] = False,
) -> None:
    """Download the models and data sets that the run names by hub id, for nodes without a network."""
    from launcher.fetch import fetch as download

    download(load_config(config, set_), dry_run=dry_run, say=typer.echo)


@app.command()
def show_config(config: ConfigFile, set_: Overrides = []) -> None:  # noqa: B006
    """Print the whole configuration, every default written out."""
    typer.echo(dump_config(load_config(config, set_)), nl=False)


@app.command()
def make_quickstart_data(
    path: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    num_rows: Annotated[int, typer.Option(min=1, max=100_000, help="How many rows.")] = 5400,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same rows.")] = 0,
) -> None:
    """Write the quickstart's instruction data: eight small text tasks, made from nothing."""
    from launcher.quickstart_data import write_quickstart_data

    write_quickstart_data(path, num_rows, seed)
    typer.echo(f"wrote {num_rows} rows: {path}")


results.add_commands(app)


def main() -> None:
    """The console script: errors a user can mend end in their message and an exit status, not in a traceback."""
    from evaluation.errors import EvaluationError
    from trainer.errors import TrainerError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is stopped
    signal.signal(signal.SIGUSR1, _preempted)
    try:
        app()
    except LauncherError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.code)
    except (TrainerError, EvaluationError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        sys.exit(130)


def _preempted(*_: object) -> None:
    """End after SIGUSR1 outside of training, which takes it as a request to save."""
    raise Preempted("stopped by SIGUSR1; what was finished is kept, and the same command resumes from here")


def _run(
    config: Path, overrides: list[str], run_dir: Path | None, stages: list[Stage], *, force: bool, strict: bool = False
) -> None:
    from rich.console import Console

    from launcher.run import run_stages

    loaded = load_config(config, overrides)
    typed = ["launcher", "run", str(config), *(word for text in overrides for word in ("--set", text))]
    typed += ["--run-dir", str(run_dir)] if run_dir else []
    run_stages(
        loaded,
        _folder(loaded, run_dir),
        stages,
        force=force,
        strict=strict,
        command=shlex.join(typed),
        console=Console(highlight=False),
    )


def _sweep(
    config: Path, overrides: list[str], run_dir: Path | None, words: list[str], *, side_by_side: int, strict: bool
) -> None:
    from launcher import plan as planning
    from launcher.submit.sweep import members_of, run_members, table, write_members

    folder = _folder(load_config(config, overrides), run_dir).absolute()
    members = members_of(config, overrides, words, folder)
    if side_by_side > 1 and any(member.config.cluster.address == "local" for member in members):
        raise ConfigError("--side-by-side needs a Ray cluster that exists (cluster.address): each would take all here")
    for member, look in zip(members, planning.first_looks([member.config for member in members]), strict=True):
        planning.check(member.config, look=look)
    typer.echo(table(members, folder))
    write_members(members, folder)
    further = ["--strict"] if strict else []
    run_members([member.name for member in members], folder, further, side_by_side=side_by_side, say=typer.echo)
    results.compare([folder])


def _folder(config: RunConfig, run_dir: Path | None) -> Path:
    return run_dir or config.run.directory


def _stage(option: str, name: str) -> Stage:
    for stage in STAGES:
        if stage == name:
            return stage
    raise ConfigError(f"{option} {name}: no such stage; the stages are {', '.join(STAGES)}")
