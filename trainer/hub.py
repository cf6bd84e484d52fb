"""Models and data sets on the Hugging Face hub: asked for once, at a commit, with a short error where that fails."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import DryRunFileInfo, HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined] # HTTPError: its HTTP library's
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
)

from trainer.errors import TrainerError

_TIMEOUT_S = 5.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
# What is downloaded of a repository: of a model never .bin, nor weights that are there twice; of a data set no code.
_FILES: dict[str, dict[str, Any]] = {
    "model": {
        "allow_patterns": ["*.safetensors", *_TOKENIZER_FILES],
        "ignore_patterns": ["original/*.safetensors", "consolidated*.safetensors"],
    },
    "dataset": {"ignore_patterns": ["*.py"]},
}


def is_commit(revision: str | None) -> bool:
    """Whether a revision names a commit, which never changes."""
    return bool(_COMMIT.fullmatch(revision or ""))


def commit_of(kind: Literal["model", "dataset"], name: str, revision: str | None) -> str:
    """The commit that a branch or tag of a hub repository stands for now; asked once, and no longer than seconds.

    Args:
        kind: of repository.
        name: its hub id.
        revision: branch, tag or commit; None is the main branch.

    Returns:
        40 hexadecimal digits.

    Raises:
        TrainerError: the hub cannot be reached, has no such repository or revision, or does not give it to this user.
    """
    try:
        found = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_TIMEOUT_S)
    except (HTTPError, OSError, ValueError) as error:
        raise TrainerError(_refusal(kind, name, revision, error)) from error
    return str(found.sha)


def tokenizer_folder(name: str, revision: str | None) -> Path:
    """A model's small files: from the hub, or from its cache on this machine where the hub does not give them.

    Args:
        name: hub id of the model.
        revision: branch, tag or commit; None is the main branch.

    Returns:
        A folder in the hub's cache; its name is the commit.

    Raises:
        TrainerError: neither has them.
    """
    wanted: dict[str, Any] = {"repo_id": name, "allow_patterns": _TOKENIZER_FILES}
    try:
        commit_of("model", name, revision)  # snapshot_download itself would try for a minute to reach the hub
    except TrainerError:
        try:
            return Path(snapshot_download(revision=revision, local_files_only=True, **wanted))
        except (OSError, ValueError):
            pass
        raise
    try:
        return Path(snapshot_download(revision=revision, **wanted))
    except (HTTPError, OSError, ValueError) as error:
        raise TrainerError(_refusal("model", name, revision, error)) from error


def cache_folder() -> Path:
    """Return the folder of the hub's cache on this machine; HF_HOME or HF_HUB_CACHE sets it."""
    return Path(constants.HF_HUB_CACHE)


def listed(kind: Literal["model", "dataset"], name: str, revision: str | None) -> list[DryRunFileInfo]:
    """Return the files that a run needs of a repository, with sizes, and whether they are in the cache.

    Args:
        kind: Of repository.
        name: Its hub id.
        revision: Branch, tag or commit; None is the main branch.

    Returns:
        An entry for each file.

    Raises:
        TrainerError: The hub can't be reached, or does not give it to this user.
    """
    commit_of(kind, name, revision)  # its errors are short, and come within seconds
    try:
        return snapshot_download(name, repo_type=kind, revision=revision, dry_run=True, **_FILES[kind])
    except (HTTPError, OSError, ValueError) as error:
        raise TrainerError(_refusal(kind, name, revision, error)) from error


def download(kind: Literal["model", "dataset"], name: str, revision: str | None) -> Path:
    """Download the files of `listed` into the hub's cache; what is there already stays.

    Args:
        kind: Of repository.
        name: Its hub id.
        revision: Branch, tag or commit; None is the main branch.

    Returns:
        The folder of the cache that holds them; its name is the commit.

    Raises:
        TrainerError: The hub can't be reached, or does not give it to this user.
    """
    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision, **_FILES[kind]))
    except (HTTPError, OSError, ValueError) as error:
        raise TrainerError(_refusal(kind, name, revision, error)) from error


def downloaded(kind: Literal["model", "dataset"], name: str, revision: str | None) -> Path | None:
    """Return the folder of what `download` left in the cache; asks no network.

    Args:
        kind: Of repository.
        name: Its hub id.
        revision: Branch, tag or commit; None is the main branch.

    Returns:
        The folder, whose name is the commit; None where some of its files are missing or were never listed.
    """
    try:
        get_cached_repo_tree(name, repo_type=kind, revision=revision)  # without a list nobody knows what is missing
        found = snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True, **_FILES[kind])
    except (OSError, ValueError, CachedRepoTreeNotFoundError):
        return None
    return Path(found)


def _refusal(kind: str, name: str, revision: str | None, error: Exception) -> str:
    place = f"{name} at {revision}" if revision else name
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, GatedRepoError):
        return (
            f"the {kind} {place} is gated: accept its terms at {constants.ENDPOINT}/"
            f"{'datasets/' if kind == 'dataset' else ''}{name}, then set HF_TOKEN or log in with: hf auth login"
        )
    if isinstance(error, HfHubHTTPError | ValueError):
        return (
            f"there is no folder {name}, and the hub does not give the {kind} {place}: {reason}. If it is private or "
            "gated, set HF_TOKEN or log in with: hf auth login"
        )
    if constants.is_offline_mode():
        return (
            f"there is no folder {name}, HF_HUB_OFFLINE is set, and the {kind} {place} is not in this machine's cache: "
            "download it where there is a network (launcher fetch), or give a folder"
        )
    return (
        f"there is no folder {name}, and the hub ({constants.ENDPOINT}) cannot be reached for the {kind} {place}: "
        f"{reason}. Where there is no network, download it elsewhere (launcher fetch) into an HF_HOME that is seen here"
    )
