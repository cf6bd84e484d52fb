"""What the names of files and folders say: which hold rows, of which split, and what is a hub id. Opens no file."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.errors import TrainerError

SplitName = Literal["train", "validation", "test"]

_KINDS = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".arrow", ".feather")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")
SUFFIXES = (*_KINDS, *(kind + compression for kind in _KINDS for compression in _COMPRESSIONS))
SUFFIXES_IN_WORDS = f"{', '.join(_KINDS)}; each also {', '.join(_COMPRESSIONS)}"
# Files of rows by their suffix, but written by libraries about a data set, a model or a folder.
_METADATA = re.compile(
    r"(dataset_infos?|dataset_dict|state|config|generation_config|metadata|manifest|checksums|package|croissant)\."
    r"(json|jsonl|csv|parquet)"
)
# No rows and no loss: everything else that is left out of a folder is reported.
_DOCUMENTS = re.compile(r"(license|readme|notice|changelog)(\..*)?|.*\.(md|rst|py|ya?ml|sh|crc|md5|sha\d+|lock)")
_SPLIT_WORDS: dict[str, SplitName] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout", "heldout"), "test"),
}
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")  # as the datasets library parts names
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SHOWN = 12


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder.

    Attributes:
        splits: Files of rows by the split that their names say, in the order of their paths; "" where they say none.
        left_out: Files that may hold rows and are not read.
    """

    splits: dict[str, list[Path]]
    left_out: list[Path]

    @property
    def files(self) -> list[Path]:
        """All files of rows, in the order of their paths."""
        return sorted(file for files in self.splits.values() for file in files)


def is_hub_id(path: str) -> bool:
    """Return whether a path is to be looked up on the hub: it does not exist, and it has the form of an id."""
    return not Path(path).exists() and bool(_HUB_ID.fullmatch(path)) and not path.endswith(SUFFIXES)


def missing(path: Path) -> str:
    """Return the words for a path that does not exist: where it was looked for, and what is near it."""
    place = "" if path.is_absolute() else f" in {Path.cwd()}"
    return f"there is no file or folder {path}{place}{near(path)}"


def near(path: Path) -> str:
    """Return the files and folders whose names are like that of a path that does not exist, in words; may be empty."""
    parent = next((folder for folder in path.parents if folder.is_dir()), Path())
    wanted = path.relative_to(parent).parts[0] if path != parent else path.name
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(wanted.lower(), [name.lower() for name in names], n=3, cutoff=0.5)
    like = [str(parent / name) for name in names if name.lower() in close]
    return f"; near it: {', '.join(like)}" if like else ""


def files_of(folder: Path) -> FolderFiles:
    """List a folder's files of rows, those below it too; hidden files and metadata are no rows.

    Args:
        folder: An existing folder; one that datasets' save_to_disk wrote is read by its own lists.

    Returns:
        The files by split; no split where the folder has no file of rows.

    Raises:
        TrainerError: The folder's own lists can't be read.
    """
    declared = folder / "dataset_dict.json"
    if declared.is_file():
        names = _listed(declared, "splits")
        return FolderFiles({str(name): files_of(folder / str(name)).files for name in names}, [])
    splits: dict[str, list[Path]] = {}
    left_out = []
    saved: dict[Path, set[str]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        inside, name = path.relative_to(folder), path.name.lower()
        if any(part.startswith((".", "_")) for part in inside.parts) or _METADATA.fullmatch(name):
            continue
        if not name.endswith(SUFFIXES):
            left_out += [] if _DOCUMENTS.fullmatch(name) else [path]
            continue
        if (path.parent / "state.json").is_file() and name.endswith(".arrow"):
            if path.parent not in saved:
                saved[path.parent] = _files_of_saved(path.parent / "state.json")
            if path.name not in saved[path.parent]:
                continue  # what the datasets library cached beside them
        splits.setdefault(_split_named(inside), []).append(path)
    return FolderFiles(splits, left_out)


def role_of(name: str) -> SplitName | None:
    """Return the split that a name says, such as train_sft or dev; None where it says none, or several."""
    found = _roles(name)
    return found.pop() if len(found) == 1 else None


def selected(names: Sequence[str], wanted: str | None, where: str) -> list[str]:
    """Return the splits that a source's hub_split selects of those that it holds.

    Args:
        names: The splits; "" for files whose names say none.
        wanted: Names joined by +, `all`, or None, which selects all.
        where: The source, for messages.

    Returns:
        Names, in the order in which the source holds them.

    Raises:
        TrainerError: There is no such split.
    """
    if wanted is None or wanted == "all":
        return list(names)
    chosen: list[str] = []
    for word in wanted.split("+"):
        # Its own name first: train of train and train_sft; then another word for it: validation of dev.
        found = [name for name in names if name == word] or [
            name for name in names if name and word in _SPLIT_WORDS and role_of(name) == _SPLIT_WORDS[word]
        ]
        if len(found) != 1:
            held = ", ".join(filter(None, names)) or "none that the names of its files say"
            raise TrainerError(
                f"data: {where} has {'no' if not found else 'more than one'} split {word!r}; it has {held}: set the "
                "source's hub_split to one of them, several joined by +, or all"
            )
        chosen += found
    return [name for name in names if name in chosen]


def in_short(paths: Sequence[Path | str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = len(paths) - _SHOWN
    return ", ".join(map(str, paths[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _roles(text: str) -> set[SplitName]:
    return {_SPLIT_WORDS[word] for word in _BETWEEN_WORDS.split(text.lower()) if word in _SPLIT_WORDS}


def _split_named(inside: Path) -> str:
    """The split of a file by its path inside the folder: train for train/a.json, train_sft for its numbered shards."""
    stem = inside.name.partition(".")[0]
    roles = set().union(*(_roles(part) for part in (*inside.parts[:-1], stem)))
    if len(roles) > 1:  # train/test.jsonl: no split of a known name, so it is never taken as one of both
        return " or ".join(sorted(roles))
    shard = _SHARD.fullmatch(stem)
    if shard and _roles(shard[1]):
        return shard[1]
    return next(iter(roles), "")


def _files_of_saved(state: Path) -> set[str]:
    """The Arrow files of a folder that save_to_disk wrote."""
    if _listed(state, "_indices_data_files", missing_is_empty=True):
        raise TrainerError(
            f"{state}: was saved with a separate list of its rows, by an old version of the datasets library: load it "
            "with load_from_disk and save it again with flatten_indices().save_to_disk(...)"
        )
    return {str(file["filename"]) for file in _listed(state, "_data_files") if isinstance(file, dict)}


def _listed(path: Path, key: str, *, missing_is_empty: bool = False) -> list[object]:
    try:
        found = json.loads(path.read_bytes())
        listed = found.get(key) or [] if missing_is_empty else found[key]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainerError(f"{path}: is not what datasets' save_to_disk writes ({type(error).__name__})") from error
    if not isinstance(listed, list):
        raise TrainerError(f"{path}: is not what datasets' save_to_disk writes: {key} is no list")
    return listed
