"""A run as a job of a Ray cluster that exists: what is sent, and submitting, following and stopping it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import launcher
from launcher.config import RunConfig, dump_config
from launcher.errors import ConfigError, LauncherError
from launcher.submit.sweep import Member, settings_of
from trainer.data.names import is_hub_id

PACKAGES = ("launcher", "trainer", "evaluation", "slurm")
SUFFIXES = {".py", ".sh", ".html", ".css", ".js", ".j2", ".json", ".jinja", ".txt"}
LIMIT_BYTES = 10 * 2**20
RUN_KEY = "tunelift_run"
# Ray kills a job 3 s after it asked it to stop; a run needs the time to save.
STOP_S = 600


def package(config: RunConfig, folder: Path) -> list[tuple[str, int]]:
    """Put what the job needs into an empty folder: this package's own files and the configuration, nothing else.

    Args:
        config: the run's configuration, with absolute paths.
        folder: an empty folder.

    Returns:
        Each file's path in the folder, and its bytes.

    Raises:
        LauncherError: if it is more than LIMIT_BYTES.
    """
    top = Path(launcher.__file__).parent.parent
    for name in PACKAGES:
        for file in sorted((top / name).rglob("*")):
            inside = file.relative_to(top)
            if file.is_file() and file.suffix in SUFFIXES and not any(part.startswith(".") for part in inside.parts):
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / inside)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    files = [(str(file.relative_to(folder)), file.stat().st_size) for file in folder.rglob("*") if file.is_file()]
    total = sum(size for _, size in files)
    if total > LIMIT_BYTES:
        largest = ", ".join(f"{name} ({size:,})" for name, size in sorted(files, key=lambda file: -file[1])[:5])
        raise LauncherError(f"the job's files have {total:,} bytes, the limit is {LIMIT_BYTES:,}; largest: {largest}")
    return sorted(files)


def made_absolute(config: RunConfig, working_folder: Path) -> RunConfig:
    """The configuration with paths that mean the same on every machine that sees the same storage. Pure but for looks.

    Args:
        config: the run's configuration.
        working_folder: what its relative paths start from.

    Returns:
        The changed configuration. A name that is no file or folder here stays: it may be a hub id.
    """
    tree = config.model_dump(mode="json")

    def absolute(section: dict[str, Any], key: str, *, always: bool = False) -> None:
        value = section.get(key)
        if value is not None and (always or (working_folder / value).exists()):
            section[key] = str(working_folder / value)

    absolute(tree["run"], "work" if config.run.url else "storage", always=True)
    absolute(tree["data"], "path", always=not is_hub_id(str(config.data.path)))
    absolute(tree["data"], "cache", always=True)
    for source in tree["data"]["sources"]:
        absolute(source, "path")
    for split in ("validation", "test"):
        if tree["data"]["split"]["type"] == "files":
            absolute(tree["data"]["split"], split, always=True)
    absolute(tree["model"], "name_or_path")
    absolute(tree["model"], "adapter")
    for judge in tree["judge"].get("judges", [tree["judge"]]):
        absolute(judge, "model")
    for model in tree["generation"]["models"].values():
        absolute(model, "path")
        absolute(model, "adapter")
    absolute(tree["generation"]["lm_eval"] or {}, "include_path")
    return RunConfig.model_validate(tree)


def absolute_words(words: Sequence[str], members: Sequence[Member], working_folder: Path) -> list[str]:
    """A sweep's words with the paths among their values made absolute, as `made_absolute` does it for a configuration.

    Args:
        words: texts key=value,value,... of the sweep.
        members: the sweep's members, loaded from these words.
        working_folder: what their relative paths start from.

    Returns:
        The words; a value without a path stays as it was typed.
    """
    moved: dict[str, str] = {}
    for member in members:
        typed, absolute = member.config, made_absolute(member.config, working_folder)
        for text in member.settings:
            location = [part.strip() for part in text.partition("=")[0].split(".")]
            before, after = (_value_at(config.model_dump(mode="json"), location) for config in (typed, absolute))
            if before != after:
                moved[text] = json.dumps(after, ensure_ascii=False)
    axes = [(word.partition("=")[0], settings_of([word])) for word in words]
    return [f"{key}={','.join(moved.get(text, text.partition('=')[2]) for (text,) in listed)}" for key, listed in axes]


def _value_at(tree: Any, location: Sequence[str]) -> Any:  # noqa: ANN401 - any part of a configuration
    for part in location:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


@contextmanager
def connected(address: str) -> Iterator[JobSubmissionClient]:
    """A client of the cluster's job server; what goes wrong there is told in words.

    Args:
        address: the dashboard's, such as http://head:8265; a token is taken from RAY_AUTH_TOKEN_PATH.

    Yields:
        The client.

    Raises:
        ConfigError: if nothing answers at the address.
        LauncherError: if the job server refuses.
    """
    try:
        yield JobSubmissionClient(address)
    except ConnectionError as error:
        raise ConfigError(f"--address {address}: no Ray dashboard answers there: {error}") from None
    except RuntimeError as error:
        hint = "; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" if "401" in str(error) or "403" in str(error) else ""
        raise LauncherError(f"the Ray cluster at {address} refuses: {error}{hint}") from None


def active_job(client: JobSubmissionClient, run_dir: Path) -> JobDetails | None:
    """The job that works on a run now, or waits to."""
    jobs = [job for job in _jobs_of(client, run_dir) if not job.status.is_terminal()]
    return jobs[-1] if jobs else None


def newest_job(client: JobSubmissionClient, run_dir: Path) -> JobDetails:
    """The last job that was submitted for a run.

    Args:
        client: the cluster's.
        run_dir: the run's folder.

    Returns:
        The job.

    Raises:
        LauncherError: if the cluster knows none.
    """
    jobs = _jobs_of(client, run_dir)
    if not jobs:
        raise LauncherError(f"{run_dir}: this Ray cluster knows no job of this run")
    return jobs[-1]


def _jobs_of(client: JobSubmissionClient, run_dir: Path) -> list[JobDetails]:
    jobs = [job for job in client.list_jobs() if (job.metadata or {}).get(RUN_KEY) == str(run_dir)]
    return sorted(jobs, key=lambda job: (job.start_time or 0, job.submission_id or ""))


def submit(
    client: JobSubmissionClient,
    config: RunConfig,
    run_dir: Path,
    folder: Path,
    python: str,
    further: Sequence[str] = (),
) -> str:
    """Hand a packaged run to the cluster.

    Args:
        client: the cluster's.
        config: the run's configuration.
        run_dir: the run's folder, on storage that the cluster's nodes see.
        folder: what `package` filled.
        python: Python on the cluster's nodes.
        further: words for `launcher run`, such as a sweep's.

    Returns:
        The job's id: the run's name, a hash of its folder, and the number of the submission, so that two that submit
        the same run at once don't both succeed.
    """
    digest = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]
    number = len(_jobs_of(client, run_dir)) + 1
    command = [python, "-m", "launcher", "run", "config.yaml", "--run-dir", str(run_dir)]
    command += ["--set", "cluster.address=auto", *further]
    return client.submit_job(
        submission_id=f"{config.run.name}-{digest}-{number}",
        entrypoint=f"exec {shlex.join(command)}",
        metadata={RUN_KEY: str(run_dir)},
        runtime_env={"working_dir": str(folder), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}},
    )


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> int:
    """Show a job's output until it ends.

    Args:
        client: the cluster's.
        job: the job's id.
        write: shows a piece of the output as it is.

    Returns:
        The exit code of the run; 143 if it was stopped, 1 if Ray could not start it.
    """

    async def tail() -> None:
        async for piece in client.tail_job_logs(job):
            write(piece)

    asyncio.run(tail())
    return exit_code(client.get_job_info(job))


def cancel(client: JobSubmissionClient, job: JobDetails, *, wait_s: float, say: Callable[[str], None]) -> None:
    """Let a run save, then end its job.

    Args:
        client: the cluster's.
        job: the job.
        wait_s: longest wait for the run to end, in seconds; Ray ends it after STOP_S at the latest.
        say: shows a line of text.
    """
    name = str(job.submission_id)
    if job.status.is_terminal():
        say(f"job {name} has ended already")
        return
    say(f"job {name}: asked to save and end; waiting up to {wait_s:.0f} s")
    client.stop_job(name)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if client.get_job_status(name).is_terminal():
            say(f"job {name}: ended")
            return
        time.sleep(1)
    say(f"job {name}: still saving; Ray kills it {STOP_S} s after it was asked")


def exit_code(job: JobDetails) -> int:
    """The exit code of a job that has ended."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    return job.driver_exit_code or (143 if job.status == JobStatus.STOPPED else 1)


def describe(job: JobDetails) -> str:
    """A job's state in one line."""
    ended = f", exit code {exit_code(job)}" if job.status.is_terminal() else ""
    return f"job {job.submission_id}: {job.status.value}{ended}" + (f" ({job.message.strip()})" if job.message else "")
