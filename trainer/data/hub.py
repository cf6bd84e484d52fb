"""Data sets on the hub, read by the datasets library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # the HTTP library's own, whichever it is

from trainer.config import SourceConfig
from trainer.data.cells import json_value, undo_struct_of_lists
from trainer.data.conversation import BadRowError
from trainer.data.names import missing, selected
from trainer.errors import TrainerError
from trainer.hub import commit_of, downloaded, is_commit

_ERRORS = (HTTPError, OSError, ValueError, RuntimeError, ImportError, DatasetsError)


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
    except TrainerError as error:
        folder = downloaded("dataset", source.path, source.revision)
        if folder is None:
            raise TrainerError(f"data: {missing(Path(source.path))}. As a hub id: {error}") from error
        commit = folder.name
    return source.model_copy(update={"revision": commit})


def hub_splits(source: SourceConfig) -> list[str]:
    """Return the names of a hub data set's splits.

    Args:
        source: Pinned to a commit.

    Returns:
        The names, in the order of the data set.

    Raises:
        TrainerError: It cannot be loaded.
    """
    return list(_load(source))


def read_hub(source: SourceConfig) -> Iterator[tuple[str, int, object]]:
    """Read the rows of a data set on the hub, streamed from its files: those in this machine's cache if all are there.

    Args:
        source: Pinned to a commit; its hub_split selects splits, None takes all.

    Yields:
        The id with the split, the row's number in it from 1, and the row; a BadRowError where it holds what is no JSON.

    Raises:
        TrainerError: It cannot be loaded, or has no such split.
    """
    splits = _load(source)
    try:
        for name in selected(list(splits), source.hub_split, source.path):
            place = source.path if len(splits) == 1 else f"{source.path}:{name}"
            for number, row in enumerate(splits[name], start=1):
                yield place, number, _row(row)
    except _ERRORS as error:
        raise TrainerError(_refusal(source, error)) from error


def _load(source: SourceConfig) -> dict[str, Any]:
    folder = downloaded("dataset", source.path, source.revision)
    if folder is None:
        commit_of("dataset", source.path, source.revision)  # load_dataset would try for a minute to reach it
    place: dict[str, Any] = (
        {"path": source.path, "revision": source.revision} if folder is None else {"path": str(folder)}
    )
    try:
        return dict(load_dataset(**place, name=source.subset, streaming=True))
    except _ERRORS as error:
        raise TrainerError(_refusal(source, error)) from error


def _row(row: dict[str, Any]) -> object:
    try:
        read = {name: json_value(value) for name, value in row.items()}
    except BadRowError as error:
        return error
    undo_struct_of_lists(read)
    return read


def _refusal(source: SourceConfig, error: Exception) -> str:
    way_out = ""
    if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
        way_out = ": set the source's subset to one of them"
    elif "scripts are no longer supported" in str(error):
        way_out = ": a data set that is a program is not run; convert it to Parquet, and give the folder"
    return f"data: {source.path} at {source.revision} cannot be loaded: {str(error).strip()}{way_out}"
