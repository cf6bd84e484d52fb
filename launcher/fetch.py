"""Download what a run takes from the hub, on a machine with a network, for nodes that have none.

Everything goes into the hub's own cache (HF_HOME), from which transformers, vLLM and the trainer read it. Only
safetensors and the small text files beside them are taken of a model: never .bin, which can run code.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evaluation.config import JuryJudge, ModelSource, VllmJudge
from launcher.config import RunConfig
from launcher.errors import ConfigError


@dataclass(frozen=True)
class Wanted:
    """One repository on the hub that a run reads.

    Attributes:
        key: The setting that names it.
        kind: Of repository.
        name: Its hub id.
        revision: Branch, tag or commit; None is the main branch.
    """

    key: str
    kind: Literal["model", "dataset"]
    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" at {self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Listing:
    """The files of a repository that a run needs.

    Attributes:
        num_files: How many.
        total: Their bytes.
        missing: Bytes that are not in the cache.
    """

    num_files: int
    total: int
    missing: int


def wanted_of(config: RunConfig) -> list[Wanted]:
    """Return the repositories that a run reads by hub id, each once.

    Args:
        config: The run's configuration; what is a folder or file here is left out.

    Returns:
        Models and data sets, in the order of the stages that need them.
    """
    from trainer.data.names import is_hub_id

    found: dict[tuple[str, str, str | None], Wanted] = {}
    for wanted in _named(config):
        if is_hub_id(wanted.name):
            found.setdefault((wanted.kind, wanted.name, wanted.revision), wanted)
    return list(found.values())


def _named(config: RunConfig) -> Iterator[Wanted]:
    for number, source in enumerate(config.data.all_sources):
        key = f"data.sources.{number}.path" if config.data.sources else "data.path"
        yield Wanted(key, "dataset", source.path, source.revision)
    if config.model.name_or_path is not None:
        yield Wanted("model.name_or_path", "model", config.model.name_or_path, config.model.revision)
    for name, model in config.generation.models.items():
        if isinstance(model, ModelSource):
            yield Wanted(f"generation.models.{name}.path", "model", model.path, model.revision)
    judges = config.judge.judges if isinstance(config.judge, JuryJudge) else [config.judge]
    for judge in judges:
        if isinstance(judge, VllmJudge):
            yield Wanted("judge.model", "model", judge.model, judge.revision)


def fetch(config: RunConfig, *, dry_run: bool, say: Callable[[str], None]) -> None:
    """Download what is missing, after everything has been looked up.

    Args:
        config: The run's configuration.
        dry_run: List sizes, and download nothing.
        say: Shows a line of text.

    Raises:
        ConfigError: With everything that the hub does not give, or where the disk is too small; nothing was downloaded.
    """
    from trainer.errors import TrainerError
    from trainer.hub import cache_folder, download

    wanted = wanted_of(config)
    listings, problems = _look_up(wanted, say)
    missing = sum(listing.missing for listing in listings)
    cache = cache_folder()
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if missing > free:
        problems.append(f"HF_HOME: {in_gb(missing)} are missing, {cache} has {in_gb(free)} free: set HF_HOME elsewhere")
    if problems:
        raise ConfigError("\n".join([*problems, "nothing was downloaded"]))
    if not dry_run:
        for one, listing in zip(wanted, listings, strict=True):
            if listing.missing:
                say(f"downloading {one}")
            try:
                download(one.kind, one.name, one.revision)
            except TrainerError as error:
                raise ConfigError(f"{one.key}: {error}; the same command resumes") from error
    for line in _closing(config, wanted, cache, missing, dry_run=dry_run):
        say(line)


def _look_up(wanted: list[Wanted], say: Callable[[str], None]) -> tuple[list[Listing], list[str]]:
    from trainer.errors import TrainerError
    from trainer.hub import listed

    listings, problems = [], []
    for one in wanted:
        try:
            files = listed(one.kind, one.name, one.revision)
        except TrainerError as error:
            problems.append(f"{one.key}: {error}")
            continue
        found = Listing(
            len(files),
            sum(file.file_size or 0 for file in files),
            sum(file.file_size or 0 for file in files if file.will_download),
        )
        state = f"{in_gb(found.missing)} to download" if found.missing else "all there already"
        say(f"{one}: {found.num_files} files, {in_gb(found.total)}, {state}")
        listings.append(found)
        if one.kind == "model" and not any(file.filename.endswith(".safetensors") for file in files):
            problems.append(
                f"{one.key}: the {one} has no weights in safetensors; .bin files can run code and are not downloaded: "
                "convert it where you trust it, and give the folder"
            )
    return listings, problems


def _closing(config: RunConfig, wanted: list[Wanted], cache: Path, missing: int, *, dry_run: bool) -> list[str]:
    if not wanted:
        return ["nothing to fetch: the configuration names no model and no data set by hub id"]
    lines = []
    if config.generation.lm_eval is not None:
        lines.append("generation.lm_eval: the harness loads its tasks' data sets itself; these are not fetched")
    if dry_run:
        return [*lines, f"dry run: {in_gb(missing)} would be downloaded to {cache}"]
    return [
        *lines,
        f"all of it is in {cache}; for nodes without a network:",
        f'  cluster.slurm.environment: {{HF_HOME: {cache.parent}, HF_HUB_OFFLINE: "1"}}',
    ]


def in_gb(size: int) -> str:
    """Return a size in words.

    >>> in_gb(16_060_000_000), in_gb(1_234_567), in_gb(999)
    ('16.1 GB', '1.2 MB', '999 bytes')

    Args:
        size: In bytes.

    Returns:
        The size with its unit.
    """
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{size / 10**power:,.1f} {unit}"
    return f"{size} bytes"
