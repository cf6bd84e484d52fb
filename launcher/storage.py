"""A copy of a run at a URL that fsspec opens: brought up to date as the run works, fetched where the run is not yet.

The copy is what `state.json` there lists, and that is written last: files are put there first, and before files that
it lists are changed or removed it is shortened to those that stay. So the copy is whole at any moment, whenever the
machine that writes it goes away. Keys of a store come from where its own library looks for them, never from here.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from launcher.errors import ConfigError, LauncherError
from launcher.run_directory import read_json, set_aside, write_json

STATE = "state.json"
HERE = ".copy.json"  # in the run's folder: who works on it, and which files the copy has
# Of one machine or one attempt: locks, signs to stop, half-written things, what was set aside, a job's own files.
LEFT_OUT = ("attempt", "stop", "superseded", "slurm", "submitted.json")


def what_to_do(
    here: Collection[str | None], there: str | None, *, has_work: bool
) -> Literal["go on", "fetch", "replace", "refuse"]:
    """Whether the run's folder or its copy is ahead. Pure.

    Args:
        here: the processes that last worked in the folder; none where it never had a copy.
        there: the process that wrote the copy last; None where there is no copy.
        has_work: whether the folder holds any stage's work.

    Returns:
        What is to be done before the run goes on: another process than the folder's own has written the copy where the
        run went on elsewhere, and then what is here is older.
    """
    if there is None or there in here:
        return "go on"
    if not has_work:
        return "fetch"
    return "replace" if here else "refuse"


def probe(url: str) -> None:
    """Write a small file at a URL, read it back, and remove it.

    Args:
        url: what fsspec opens.

    Raises:
        ConfigError: if the URL's kind is unknown, or its package is missing.
        LauncherError: if writing or reading fails.
    """
    path = f"probe-{secrets.token_hex(8)}"
    store = _Store.open(url)
    with _told(url, "a write-read probe"):
        store.write(path, path.encode())
        found = store.read(path)
        store.remove(path)
    if found != path.encode():
        raise LauncherError(f"run.storage = {url}: what was written was not read back")


@dataclass(frozen=True)
class _Store:
    """The few things that are asked of a file system; paths are relative to the run's."""

    fs: Any
    root: str
    is_local: bool

    @classmethod
    def open(cls, url: str) -> _Store:
        from fsspec.core import url_to_fs

        is_local = url.startswith(("file:", "local:"))
        try:
            fs, root = url_to_fs(url, **({"auto_mkdir": True} if is_local else {}))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"run.storage = {url}: {error}") from None
        return cls(fs, root.rstrip("/"), is_local)

    def write(self, path: str, data: bytes) -> None:
        target = f"{self.root}/{path}"
        if not self.is_local:  # one object is there whole or not at all
            self.fs.pipe_file(target, data)
            return
        self.fs.pipe_file(f"{target}.partial", data)
        self.fs.mv(f"{target}.partial", target)

    def read(self, path: str) -> bytes | None:
        try:
            return bytes(self.fs.cat_file(f"{self.root}/{path}"))
        except FileNotFoundError:
            return None

    def put(self, file: Path, path: str) -> None:
        self.fs.put_file(str(file), f"{self.root}/{path}")

    def get(self, path: str, file: Path) -> None:
        self.fs.get_file(f"{self.root}/{path}", str(file))

    def remove(self, path: str) -> None:
        try:
            self.fs.rm_file(f"{self.root}/{path}")
        except FileNotFoundError:
            return


@contextmanager
def _told(url: str, what: str) -> Iterator[None]:
    """Stores raise what their libraries please: tell it with the URL and what was being done."""
    try:
        yield
    except LauncherError:
        raise
    except Exception as error:
        raise LauncherError(f"run.storage = {url}: {what} failed ({type(error).__name__}: {error})") from error


class RunCopy:
    """The copy of one run, kept by the process that works on the run.

    Args:
        url: where it is.
        run_dir: the run's folder, held by this process.
    """

    def __init__(self, url: str, run_dir: Path) -> None:
        self._url = url
        self._run_dir = run_dir
        self._store = _Store.open(url)
        self._owner = secrets.token_hex(8)
        self._before: str | None = None
        self._listed: dict[str, int | None] = {}
        self._pushed: dict[str, tuple[int, int]] = {}
        self._steps: set[str] = set()
        self.problem: str | None = None

    def begin(self, say: Callable[[str], None]) -> None:
        """Take the copy over, and bring the run's folder to where the copy is if that is ahead.

        Args:
            say: shows a line of text.

        Raises:
            ConfigError: if the folder holds work that the copy knows nothing of.
            LauncherError: if the store fails.
        """
        probe(self._url)
        with _told(self._url, "reading the copy"):
            state = self._read_state()
            here = read_json(self._run_dir / HERE)
            known = {here["owner"], here["before"]} if here else set()
            todo = what_to_do(known, state["owner"] if state else None, has_work=bool(_files(self._run_dir)))
            if state and todo == "refuse":
                raise ConfigError(
                    f"{self._run_dir} holds a run, and {self._url} the copy of another ({state['host']}, "
                    f"{state['pushed_at']}): choose another run.name, run.work or run.storage"
                )
            if state and todo in ("fetch", "replace"):
                self._fetch(state, say, replace=todo == "replace")
            elif state and here:  # only what the copy still lists needs no second writing
                kept = {path: version for path, version in here["files"].items() if state["files"].get(path)}
                self._pushed = {path: (size, changed) for path, (size, changed) in kept.items()}
            self._before = state["owner"] if state else None
            self._write_state(state["files"] if state else {})
        self._steps = _sealed(self._run_dir)

    def _fetch(self, state: dict[str, Any], say: Callable[[str], None], *, replace: bool) -> None:
        if replace:
            made = [path.name for path in self._run_dir.iterdir() if _counts(path)]
            aside = set_aside(self._run_dir, made, keep=False)
            say(f"the run was gone on with on {state['host']}: what was here is in {aside}")
        for path, size in sorted(state["files"].items(), key=lambda item: _last(item[0])):
            target = self._run_dir / path
            if not target.resolve().is_relative_to(self._run_dir.resolve()):
                raise LauncherError(f"{self._url}/{STATE} lists {path}, which is outside of the run's folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            try:
                self._store.get(path, partial)
            except FileNotFoundError:
                partial.unlink(missing_ok=True)
                if size is not None:
                    raise LauncherError(f"{self._url}: {path} is listed in {STATE} and is not there") from None
                continue
            if size is not None and partial.stat().st_size != size:
                raise LauncherError(f"{self._url}/{path}: {partial.stat().st_size:,} bytes, {size:,} were written")
            partial.replace(target)
        self._pushed = _files(self._run_dir)
        total = sum(size for size, _ in self._pushed.values())
        say(f"fetched {len(self._pushed)} files, {total / 1e6:,.1f} MB, from {self._url} ({state['pushed_at']})")

    def push(self) -> None:
        """Bring the copy up to date: all that is new or changed here, and nothing that is gone here.

        A store that fails is noted in `problem`, for the next push may succeed.

        Raises:
            TakenOver: if another process works on the run now.
        """
        self._steps = _sealed(self._run_dir)
        for _ in range(3):  # a checkpoint may be removed while it is copied: look again
            try:
                with _told(self._url, "copying the run"):
                    self._push()
                self.problem = None
            except TakenOver:
                raise
            except LauncherError as error:
                self.problem = str(error)
                if isinstance(error.__cause__, FileNotFoundError):
                    continue
            return

    def push_checkpoint(self) -> None:
        """Push if a checkpoint has been sealed since the last time; quick where none has."""
        if _sealed(self._run_dir) - self._steps:
            self.push()

    def _push(self) -> None:
        if (state := self._read_state()) is None or state["owner"] != self._owner:
            raise TakenOver(f"{self._url}: another process has taken this run over; nothing more is written there")
        now = _files(self._run_dir)
        new = [path for path, version in now.items() if self._pushed.get(path) != version]
        gone = [path for path in self._listed if path not in now]
        if not new and not gone:
            return
        # From here until the end the copy is what stays as it is; what changes has no size, and a record is left out.
        stay = {path: size for path, size in self._listed.items() if path in now and path not in new}
        self._write_state(stay | {path: None for path in new if path in self._listed and not _last(path)})
        for path in sorted(new, key=_last):
            self._store.put(self._run_dir / path, path)
        self._pushed = now
        self._write_state({path: size for path, (size, _) in now.items()})
        for path in gone:
            self._store.remove(path)

    def _read_state(self) -> dict[str, Any] | None:
        text = self._store.read(STATE)
        return None if text is None else dict(json.loads(text))

    def _write_state(self, files: dict[str, int | None]) -> None:
        # First here: a process that dies in between finds either of the two owners there.
        write_json(self._run_dir / HERE, {"owner": self._owner, "before": self._before, "files": self._pushed})
        self._listed = files
        told = {"owner": self._owner, "host": socket.gethostname(), "files": files}
        told["pushed_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._store.write(STATE, json.dumps(told, indent=1).encode())


class TakenOver(LauncherError):  # noqa: N818 - nothing is wrong
    """Another process works on the run now."""


def _counts(path: Path) -> bool:
    """Whether something at the top of a run's folder belongs to the run, and not to one machine or one attempt."""
    return not path.name.startswith((".", "attempt")) and path.name not in LEFT_OUT and ".partial" not in path.name


def _files(run_dir: Path) -> dict[str, tuple[int, int]]:
    """The run's files: path in its folder, to size in bytes and time of change in nanoseconds."""
    found = {}
    sealed = _sealed(run_dir)
    for top in sorted(run_dir.iterdir()):
        if not _counts(top):
            continue
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            inside = path.relative_to(run_dir)
            whole = inside.parts[0] != "checkpoints" or inside.parts[1] in sealed
            if whole and ".partial" not in path.name and path.is_file():
                at = path.stat()
                found[inside.as_posix()] = (at.st_size, at.st_mtime_ns)
    return found


def _sealed(run_dir: Path) -> set[str]:
    return {seal.parent.name for seal in run_dir.glob("checkpoints/step-*/seal.json") if seal.parent.name[5:].isdigit()}


def _last(path: str) -> bool:
    """What says that something is whole: seals and records."""
    return path.endswith(("/seal.json", ".record.json"))
