"""A sweep: one run for each combination of values, and how they are done one after the other or side by side."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import yaml

from launcher.config import RunConfig, dump_config, load_config
from launcher.errors import ConfigError, Preempted
from launcher.run_directory import open_run_directory, write_atomically, write_json

MAX_MEMBERS = 1000  # Slurm's own default is 1001 tasks in an array
SWEEP_FILE = "sweep.json"
MEMBER_CONFIG = Path("slurm", "config.yaml")


@dataclass(frozen=True)
class Member:
    """One run of a sweep: its folder's name in the sweep's, its own settings, and its whole configuration."""

    name: str
    settings: tuple[str, ...]
    config: RunConfig


def settings_of(words: Sequence[str]) -> list[tuple[str, ...]]:
    """All combinations of a sweep's values, the last key's changing fastest. Pure.

    >>> settings_of(["training.lr=1e-5,2e-5", "data.train_on=assistant,all"])[1]
    ('training.lr=1e-5', 'data.train_on=all')

    Args:
        words: texts key=value,value,...; a value with a comma of its own stands in brackets or quotes.

    Returns:
        For each member its texts key=value.

    Raises:
        ConfigError: if a word has another form, names a key twice, or repeats a value.
    """
    axes: dict[str, list[str]] = {}
    for word in words:
        key, separator, values = word.partition("=")
        listed = _values_in(values) if separator and key.strip() else []
        if not listed:
            raise ConfigError(f"--sweep {word}: must look like section.key=value,value (say, training.lr=1e-5,2e-5)")
        if key in axes or len(set(listed)) < len(listed):
            raise ConfigError(f"--sweep {word}: the {'key' if key in axes else 'same value'} is there twice")
        axes[key] = [f"{key}={value}" for value in listed]
    found = list(itertools.product(*axes.values()))
    if len(found) > MAX_MEMBERS:
        raise ConfigError(f"--sweep: {len(found):,} runs; at most {MAX_MEMBERS:,} make one sweep")
    return found


def _values_in(text: str) -> list[str]:
    """Cut at the commas that YAML would cut a list at; each piece stays as it was typed."""
    try:
        node = yaml.compose(f"[{text}]", Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return []
    inside = f"[{text}]"
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    return [inside[item.start_mark.index : item.end_mark.index].strip() for item in items]


def members_of(path: Path, overrides: Sequence[str], words: Sequence[str], folder: Path | None = None) -> list[Member]:
    """Load every member's configuration, so that a wrong value is found before anything starts.

    Args:
        path: the YAML file.
        overrides: texts key=value for all members.
        words: texts key=value,value,... of the sweep.
        folder: the sweep's folder; None is run.storage/run.name.

    Returns:
        The members; each one's folder is named for its number and settings, inside the sweep's.

    Raises:
        ConfigError: with every mistake of every member, each once.
    """
    typed = {text.partition("=")[0].strip() for text in overrides}
    members: list[Member] = []
    mistakes: dict[str, None] = {}
    for number, settings in enumerate(settings_of(words), start=1):
        if twice := [text for text in settings if text.partition("=")[0] in typed]:
            raise ConfigError(f"--sweep {twice[0]}: --set names this key too; which is meant?")
        name = member_name(number, settings)
        try:
            loaded = load_config(path, [*overrides, *settings])
        except ConfigError as error:
            mistakes |= dict.fromkeys(str(error).splitlines())
            continue
        members.append(Member(name, settings, _inside(loaded, folder or loaded.run.directory, name)))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return members


def member_name(number: int, settings: Sequence[str]) -> str:
    """A member's folder: short words that any file system, shell and Slurm take. Pure.

    >>> member_name(3, ["training.lr=1e-5", "data.train_on=all"])
    '3-lr-1e-5-train_on-all'
    >>> member_name(1, ["data.path=/shared/sets/short.json"])
    '1-path-short.json'

    Args:
        number: the member's, from 1.
        settings: its own texts key=value.

    Returns:
        The name.
    """
    words = "-".join(text.partition("=")[0].rpartition(".")[2] + "-" + _in_a_name(text) for text in settings)
    return f"{number}-{re.sub('[^A-Za-z0-9._-]+', '_', words)}"[:90].rstrip("._-")


def _in_a_name(setting: str) -> str:
    value = setting.partition("=")[2]
    # Of an absolute path the last part tells most; the member's number keeps equal ones apart.
    return Path(value.strip("\"'")).name if value.lstrip("\"'").startswith("/") else value


def _inside(config: RunConfig, folder: Path, name: str) -> RunConfig:
    return config.model_copy(update={"run": config.run.inside(folder, name)})


def table(members: Sequence[Member], folder: Path) -> str:
    """The sweep as text: a line for each member."""
    width = max(len(member.name) for member in members)
    lines = [f"  {member.name:<{width}}  {' '.join(member.settings)}" for member in members]
    return "\n".join([f"{len(members)} runs in {folder}:", *lines])


def write_members(members: Sequence[Member], folder: Path) -> None:
    """Make the sweep's folder and every member's, each with the configuration that it reads.

    Args:
        members: the members.
        folder: the sweep's folder.

    Raises:
        ConfigError: if the folder holds a single run.
    """
    if (folder / "config.yaml").exists():
        raise ConfigError(f"{folder}: holds a single run; choose another run.name or --run-dir for the sweep")
    for member in members:
        with open_run_directory(folder / member.name):
            write_atomically(folder / member.name / MEMBER_CONFIG, dump_config(member.config))
    write_json(folder / SWEEP_FILE, {"members": {member.name: list(member.settings) for member in members}})


def run_members(
    names: Sequence[str], folder: Path, further: Sequence[str], *, side_by_side: int, say: Callable[[str], None]
) -> None:
    """Run every member as a launcher of its own, so many at a time; one that fails does not end the others.

    Args:
        names: the members' folders in the sweep's.
        folder: the sweep's folder.
        further: words for each `launcher run`.
        side_by_side: most members at a time.
        say: shows a line of text.

    Raises:
        Preempted: if a member was asked to stop and has saved; the same command goes on.
    """
    waiting = list(names)
    running: dict[str, subprocess.Popen[bytes]] = {}
    with _passing_signals(running) as asked:
        while running or (waiting and not asked):
            while waiting and len(running) < side_by_side and not asked:
                name = waiting.pop(0)
                log = folder / name / "output.log"
                say(f"{name}: begins; its output is {log}")
                command = [sys.executable, "-m", "launcher", "run", str(folder / name / MEMBER_CONFIG)]
                with log.open("ab") as output:
                    running[name] = subprocess.Popen(
                        [*command, "--run-dir", str(folder / name), *further], stdout=output, stderr=output
                    )
            time.sleep(0.2)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                code = running.pop(name).returncode
                say(f"{name}: {'done' if code == 0 else f'ended with exit code {code}'}")
    if asked:
        raise Preempted("the sweep was asked to stop; the same command goes on from what its members have saved")


@contextmanager
def _passing_signals(running: dict[str, subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass SIGTERM and SIGUSR1 on to the members, which save and end; yields the signals that came."""
    asked: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        for process in list(running.values()):
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
