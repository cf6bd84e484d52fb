"""Data sets that the datasets library reads: from the hub, or from a folder that it wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # the HTTP library's own, whichever it is

from trainer.config import SourceConfig
from trainer.errors import TrainerError
from trainer.hub import commit_of, downloaded, is_commit


def read_saved(path: Path, split: str) -> Iterator[tuple[str, int, object]]:
    """Rows of a folder written by save_to_disk, mapped into memory.

    Args:
        path: the folder.
        split: taken where the folder holds several.

    Yields:
        The folder, the row's number from 1, and the row.

    Raises:
        TrainerError: there is no such split.
    """
    saved = load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise TrainerError(f"{path} has no split {split!r}; it has {', '.join(saved)}: set the source's hub_split")
        saved = saved[split]
    for number, row in enumerate(saved, start=1):
        yield str(path), number, row


def pin(source: SourceConfig) -> SourceConfig:
    """The source with its revision resolved to a commit, so that what was read can be read again.

    Args:
        source: its path is a hub id.

    Returns:
        The same source at one commit.

    Raises:
        TrainerError: the hub does not answer, or has no such data set or revision.
    """
    if is_commit(source.revision):
        return source
    try:
        commit = commit_of("dataset", source.path, source.revision)
    except TrainerError:
        folder = downloaded("dataset", source.path, source.revision)
        if folder is None:
            raise
        commit = folder.name
    return source.model_copy(update={"revision": commit})


def read_hub(source: SourceConfig) -> Iterator[tuple[str, int, object]]:
    """Rows of a data set on the hub, streamed from its files: those in this machine's cache if all are there.

    Args:
        source: pinned to a commit.

    Yields:
        The id, the row's number from 1, and the row.

    Raises:
        TrainerError: it cannot be loaded.
    """
    folder = downloaded("dataset", source.path, source.revision)
    if folder is None:
        commit_of("dataset", source.path, source.revision)  # load_dataset would try for a minute to reach it
    place: dict[str, Any] = (
        {"path": source.path, "revision": source.revision} if folder is None else {"path": str(folder)}
    )
    try:
        rows = load_dataset(**place, name=source.subset, split=source.hub_split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield source.path, number, row
    except (HTTPError, OSError, ValueError, DatasetsError) as error:
        raise TrainerError(f"data: {source.path} at {source.revision} cannot be loaded: {error}") from error
