"""Models and data sets on the Hugging Face hub: asked for once, at a commit, with a short error where that fails."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined] # HTTPError: its HTTP library's

from trainer.errors import TrainerError

_TIMEOUT_S = 5.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


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


def _refusal(kind: str, name: str, revision: str | None, error: Exception) -> str:
    place = f"{name} at {revision}" if revision else name
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, HfHubHTTPError | ValueError):
        return (
            f"there is no folder {name}, and the hub does not give the {kind} {place}: {reason}. If it is private or "
            "gated, set HF_TOKEN or log in with: hf auth login"
        )
    if constants.is_offline_mode():
        return (
            f"there is no folder {name}, HF_HUB_OFFLINE is set, and the {kind} {place} is not in this machine's cache: "
            "download it (hf download), or give a folder"
        )
    return (
        f"there is no folder {name}, and the hub ({constants.ENDPOINT}) cannot be reached for the {kind} {place}: "
        f"{reason}. Where there is no network, download it elsewhere (hf download) and give the folder"
    )
