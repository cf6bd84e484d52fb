"""The commands for runs on machines that belong to a queue: submit, status, logs, cancel."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from launcher.config import RunConfig, dump_config, load_config, read_yaml
from launcher.errors import ConfigError, LauncherError
from launcher.run_directory import open_run_directory, read_json, write_atomically, write_json
from launcher.stages import STAGES, Finished, state_of
from launcher.submit.config import SlurmConfig
from launcher.submit.needs import asks_for_gpus, notes
from launcher.submit.script import Place, Script, check_job, parts_of, split_run, whole_run, whole_sweep
from launcher.submit.slurm import Job
from launcher.submit.sweep import Member, members_of, table, write_members

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file, for example configs/8b.yaml.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a value: --set training.lr=1e-4 (repeatable).")
]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="The run's folder, on storage that all nodes see.", metavar="FOLDER")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]
Address = Annotated[str, typer.Option(metavar="URL", help="The cluster's dashboard, such as http://head:8265.")]
OptionalAddress = Annotated[
    str | None, typer.Option("--address", metavar="URL", help="The Ray cluster's dashboard; not given for Slurm.")
]
Sweep = Annotated[
    str | None,
    typer.Option(
        "--sweep", metavar="KEY=V,V... ...", help="A run for each combination: training.lr=1e-5,2e-5 run.seed=1,2."
    ),
]
MoreSweep = Annotated[
    list[str] | None, typer.Argument(hidden=True, metavar="[KEY=V,V...]", help="Further words of --sweep.")
]
Detach = Annotated[bool, typer.Option("--detach", help="Return when it is submitted, instead of following it.")]

submit_app = typer.Typer(no_args_is_help=True, help="Run on Slurm, or on a Ray cluster that exists.")


def register(app: typer.Typer) -> None:
    """Add submit, status, logs and cancel to the launcher's commands."""
    app.add_typer(submit_app, name="submit")
    for command in (status, logs, cancel):
        app.command()(command)


@submit_app.command()
def slurm(
    config: ConfigFile,
    more: MoreSweep = None,
    set_: Overrides = [],  # noqa: B006 - typer copies it
    run_dir: RunDir = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of the job, instead of cluster.slurm.nodes.")] = None,
    sweep: Sweep = None,
    side_by_side: Annotated[int | None, typer.Option(min=1, help="Most members of the sweep that run at once.")] = None,
    split_stages: Annotated[
        bool,
        typer.Option("--split-stages", help="A job for each part of the line, asking for what cluster.stages says."),
    ] = False,
    print_: Annotated[bool, typer.Option("--print", help="Print the sbatch scripts, and submit nothing.")] = False,
    detach: Detach = False,
) -> None:
    """Submit the run, or a sweep of runs, to Slurm and follow it; the exit code is the job's."""
    from launcher.submit import slurm as queue

    words = sweep_words(sweep, more)
    if words and split_stages:
        raise ConfigError("--sweep and --split-stages: give one of them; a sweep's members are one job each")
    request = _request(
        config, set_, run_dir, nodes, words, side_by_side=side_by_side, split=split_stages, check_all=not print_
    )
    if print_:
        _print_scripts(request)
        return
    folder = request.place.run_dir
    jobs = _active_jobs(folder)
    if jobs is None:
        jobs = _submit(request)
    else:
        _say(f"this run is job {_listed(jobs)} already: following it")
    if not detach:
        _say(f"`launcher cancel {folder}` lets it save and ends it; Ctrl-C only stops following it")
        raise typer.Exit(queue.follow(jobs, folder, say=_say, write=_write))


@submit_app.command()
def ray(
    config: ConfigFile,
    address: Address,
    more: MoreSweep = None,
    set_: Overrides = [],  # noqa: B006 - typer copies it
    run_dir: RunDir = None,
    sweep: Sweep = None,
    side_by_side: Annotated[int, typer.Option(min=1, help="Members of the sweep that run at once.")] = 1,
    python: Annotated[
        str, typer.Option(help="Python on the cluster's nodes that has this package's needs.")
    ] = "python",
    detach: Detach = False,
) -> None:
    """Submit the run, or a sweep of runs, to a Ray cluster that exists, and follow it; the exit code is the job's."""
    from launcher.submit import ray_jobs

    words = sweep_words(sweep, more)
    loaded = ray_jobs.made_absolute(load_config(config, set_), Path.cwd())
    folder = _absolute(run_dir or loaded.run.directory)
    if words:
        words = ray_jobs.absolute_words(words, members_of(config, set_, words, folder), Path.cwd())
        _say(table(members_of(config, set_, words, folder), folder))
    further = ["--sweep", *words, "--side-by-side", str(side_by_side)] if words else []
    with ray_jobs.connected(address) as client:
        running = ray_jobs.active_job(client, folder)
        if running is None:
            with tempfile.TemporaryDirectory(prefix="tunelift-job-") as packed:
                files = ray_jobs.package(loaded, Path(packed))
                job = ray_jobs.submit(client, loaded, folder, Path(packed), python, further)
            names = ", ".join(dict.fromkeys(name.split("/")[0] for name, _ in files))
            total = sum(size for _, size in files)
            _say(f"job {job} is submitted with {len(files)} files, {total / 1000:,.0f} kB: {names}")
        else:
            job = str(running.submission_id)
            _say(f"this run is job {job} already: following it")
        if detach:
            return
        _say(f"`launcher cancel {folder} --address {address}` lets it save and ends it; Ctrl-C only stops following")
        code = ray_jobs.follow(client, job, _write)
    raise typer.Exit(code)  # not inside, where it would be taken for an error of the cluster


def status(run: Run, address: OptionalAddress = None) -> None:
    """What the queue says of a submitted run."""
    if address is not None:
        from launcher.submit import ray_jobs

        with ray_jobs.connected(address) as client:
            typer.echo(ray_jobs.describe(ray_jobs.newest_job(client, _absolute(run))))
        return
    from launcher.submit import slurm as queue

    jobs = _submitted(run)
    for job in jobs:
        typer.echo(queue.describe(job, run) + ("" if len(jobs) == 1 else f"  {job.does}"))


def logs(
    run: Run,
    address: OptionalAddress = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """The output of a submitted run."""
    if address is not None:
        from launcher.submit import ray_jobs

        with ray_jobs.connected(address) as client:
            job = str(ray_jobs.newest_job(client, _absolute(run)).submission_id)
            if not follow:
                _write(client.get_job_logs(job))
                return
            code = ray_jobs.follow(client, job, _write)
        raise typer.Exit(code)
    from launcher.submit import slurm as queue

    jobs = _submitted(run)
    if follow:
        raise typer.Exit(queue.follow(jobs, run, say=_say, write=_write))
    for one in jobs:
        if not one.shown:
            _say(f"{one.does}: launcher logs {run / one.does}")
        elif (run / one.log).exists():
            _write((run / one.log).read_text(encoding="utf-8", errors="replace"))


def cancel(
    run: Run,
    address: OptionalAddress = None,
    wait_s: Annotated[float, typer.Option(min=0, help="Longest wait for the run to save, in seconds.")] = 120,
) -> None:
    """Let a submitted run save, then end it."""
    if address is not None:
        from launcher.submit import ray_jobs

        with ray_jobs.connected(address) as client:
            ray_jobs.cancel(client, ray_jobs.newest_job(client, _absolute(run)), wait_s=wait_s, say=_say)
        return
    from launcher.submit import slurm as queue

    queue.cancel(_submitted(run), wait_s=wait_s, say=_say)


def sweep_words(sweep: str | None, more: Sequence[str] | None) -> list[str]:
    """The words of --sweep: the first is the option's value, further ones stand behind it.

    Args:
        sweep: the option's value.
        more: words without an option.

    Returns:
        All of them; none where there is no sweep.

    Raises:
        ConfigError: if there are further words and no --sweep.
    """
    if more and sweep is None:
        raise ConfigError(f"unexpected {' '.join(more)}; values of a sweep stand behind --sweep")
    return [*([sweep] if sweep is not None else []), *(more or [])]


@dataclass(frozen=True)
class _Request:
    """What shall be submitted: a run, or a sweep's members, and the scripts that do it."""

    config: RunConfig
    place: Place
    scripts: list[Script]
    members: list[Member]


def _request(
    config: Path,
    overrides: list[str],
    run_dir: Path | None,
    nodes: int | None,
    words: list[str],
    *,
    side_by_side: int | None,
    split: bool,
    check_all: bool,
) -> _Request:
    loaded = with_site(load_config(config, overrides), nodes)
    place = Place((run_dir or loaded.run.directory).resolve(), Path.cwd(), sys.executable)
    found = members_of(config, overrides, words, place.run_dir) if words else []
    members = [replace(member, config=with_site(member.config, nodes)) for member in found]
    _check_request([member.config for member in members] or [loaded], split=split, check_all=check_all)
    if members:
        scripts = whole_sweep(loaded, place, {member.name: member.config for member in members}, side_by_side)
    else:
        scripts = split_run(loaded, place) if split else whole_run(loaded, place)
    return _Request(loaded, place, scripts, members)


def _print_scripts(request: _Request) -> None:
    if request.members:
        _say(table(request.members, request.place.run_dir))
    for script in request.scripts:
        if len(request.scripts) > 1:
            waits = {"": "", "afterok": ", when the one before it has succeeded", "afterany": ", when all have ended"}
            _say(f"--- {script.name}.sh{waits[script.after]}")
        _say_what_is_asked(request, script)
        typer.echo(script.text, nl=False)


def _say_what_is_asked(request: _Request, script: Script) -> None:
    for line in notes(request.config, script.slurm, script.stages):
        _say(f"{script.name}: {line}")


def _check_request(configs: Sequence[RunConfig], *, split: bool, check_all: bool) -> None:
    """Refuse everything that is known to be wrong with the run and with what its jobs ask for, at once."""
    from launcher import plan

    found: dict[str, None] = {}
    looks = plan.first_looks(configs) if check_all else [plan.FirstLook()] * len(configs)
    for config, look in zip(configs, looks, strict=True):
        parts = parts_of(config) if split else [STAGES]
        checks = [partial(check_job, config, part, split=split) for part in parts]
        checks += [partial(plan.check, config, look=look)] if check_all else []
        for check in checks:
            try:
                check()
            except ConfigError as error:
                # What does not fit into the job is named once: by the check that knows the keys of cluster.slurm.
                keys = {line.partition(" = ")[0] for line in found}
                lines = [line for line in str(error).splitlines() if line != "nothing was started"]
                found |= dict.fromkeys(
                    line for line in lines if check.func is check_job or line.partition(" = ")[0] not in keys
                )
    if found:
        raise ConfigError("\n".join([*found, "nothing was submitted"]))


def _submit(request: _Request) -> list[Job]:
    from launcher.submit import slurm as queue

    folder, scripts = request.place.run_dir, request.scripts
    with open_run_directory(folder):
        if request.members:
            _say(table(request.members, folder))
            write_members(request.members, folder)
        else:
            write_atomically(folder / "slurm" / "config.yaml", dump_config(request.config))
        if len(scripts) > 1 and not request.members:
            left = [stage for stage in STAGES if not isinstance(state_of(stage, request.config, folder), Finished)]
            scripts = split_run(request.config, request.place, left or ["report"])
        for script in scripts:
            _say_what_is_asked(request, script)
        jobs = queue.submit(scripts, folder)
        _record(folder, jobs)
        for job in jobs:
            if not job.shown:
                _record(folder / job.does, [replace(job, log=f"../{job.log}", shown=True)])
    _say(f"job {_listed(jobs)} is submitted; its files are in {folder / 'slurm'}")
    return jobs


def _listed(jobs: Sequence[Job]) -> str:
    return ", ".join(job.job if len(jobs) == 1 else f"{job.job} ({job.does})" for job in jobs)


def with_site(config: RunConfig, nodes: int | None) -> RunConfig:
    """Lay cluster.slurm over the site's file, and the number of nodes over both; GPUs that are asked for are used.

    Args:
        config: the configuration as loaded.
        nodes: nodes of the job, as typed; None keeps what is configured.

    Returns:
        The configuration that is submitted: it joins the cluster that the job starts.

    Raises:
        ConfigError: if the site's file is wrong.
    """
    path = site_file()
    site = read_yaml(path)[0] if path.is_file() else {}
    own = config.cluster.slurm.model_dump(exclude_unset=True) if config.cluster.slurm else {}
    # GPUs are asked for in one of two ways; the run's own takes the place of the site's.
    if "gpu" in str(own.get("gres")):
        site.pop("gpus_per_node", None)
    if "gpus_per_node" in own and "gpu" in str(site.get("gres")):
        site.pop("gres")
    try:
        merged = SlurmConfig.model_validate({**site, **own, **({"nodes": nodes} if nodes else {})})
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError("\n".join([f"{path}, with cluster.slurm laid over it:", *lines])) from None
    device = config.cluster.device
    if device == "auto" and asks_for_gpus(merged):
        device = "cuda"  # this machine may have none; those of the job count
    cluster = config.cluster.model_copy(update={"slurm": merged, "address": "auto", "device": device})
    return config.model_copy(update={"cluster": cluster})


def site_file() -> Path:
    """Where a site or a person writes what every job needs: the keys of cluster.slurm."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return home / "tunelift" / "slurm.yaml"


def _active_jobs(folder: Path) -> list[Job] | None:
    from launcher.submit import slurm as queue

    record = read_json(folder / "submitted.json")
    jobs = [Job(**job) for job in record["jobs"]] if record else []
    return jobs if queue.is_active(jobs) else None


def _absolute(run: Path) -> Path:
    return Path(os.path.abspath(run))  # noqa: PTH100 - links stay as they are, as when it was submitted


def _submitted(run: Path) -> list[Job]:
    if run.is_file():
        raise ConfigError(f"{run}: is a file; give the run's folder, run.storage/run.name")
    record = read_json(run / "submitted.json")
    if record is None:
        raise LauncherError(
            f"{run}: holds no run that was submitted to Slurm; on a Ray cluster, give its "
            "--address; what a run of this machine has done, launcher plan CONFIG tells, stage by stage"
        )
    return [Job(**job) for job in record["jobs"]]


def _record(folder: Path, jobs: Sequence[Job]) -> None:
    told = {"system": "slurm", "jobs": [asdict(job) for job in jobs]}
    write_json(folder / "submitted.json", told | {"submitted_at": datetime.now(UTC).isoformat(timespec="seconds")})


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
