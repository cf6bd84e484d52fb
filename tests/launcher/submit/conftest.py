"""A real Slurm of two hosts, each with a network of its own, on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.quickstart_data import write_quickstart_data

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "pgrep")


class SlurmCluster:
    """The running cluster, and what a test does to it."""

    def __init__(self, script: Path, folder: Path) -> None:
        self._script = script
        self.folder = folder

    def act(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the set-up script: up, down, kill N, kill-slurmd N, start N."""
        # Its daemons outlive it and hold its output, so that goes to a file.
        log = self.folder / "script.log"
        with log.open("a") as output:
            done = subprocess.run(
                [self._script, *words, self.folder], stdout=output, stderr=output, check=False, timeout=60
            )
        return subprocess.CompletedProcess(words, done.returncode, log.read_text(errors="replace"), "")

    def command(self, *words: str | Path) -> str:
        """Run one of Slurm's commands and return what it prints."""
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def inside(self, host: int) -> list[str]:
        """Words that run a command on a host, beside its jobs."""
        holder = subprocess.run(
            ["pgrep", "-P", (self.folder / f"n{host}/pid").read_text().strip()],
            capture_output=True,
            text=True,
            check=True,
        )
        return ["nsenter", "--target", holder.stdout.strip(), "--all", "--"]

    def processes(self) -> list[str]:
        """Command lines of all processes on the two hosts."""
        found = []
        for pid in (self.folder / "n1/pid", self.folder / "n2/pid"):
            waiting = [pid.read_text().strip()]
            while waiting:
                parent = waiting.pop()
                waiting += subprocess.run(
                    ["pgrep", "-P", parent], capture_output=True, text=True, check=False
                ).stdout.split()
                command = Path(f"/proc/{parent}/cmdline")
                found.append(
                    command.read_bytes().replace(b"\0", b" ").decode(errors="replace") if command.exists() else ""
                )
        return found


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """The cluster, up; SLURM_CONF names it to every command that the tests run."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"a real Slurm needs root and these programs: {', '.join(missing) or '(all here)'}")
    folder = tmp_path_factory.mktemp("slurm")
    cluster = SlurmCluster(Path(__file__).parents[2] / "slurm_cluster.sh", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_TEST_NET", f"10.213.{os.getpid() % 250 + 1}")
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            up = cluster.act("up")
            assert up.returncode == 0, up.stdout
            yield cluster
        finally:
            cluster.act("down")


@pytest.fixture
def submitting(tmp_path: Path) -> Path:
    """A folder with data, in a place whose name a careless script would trip over."""
    folder = tmp_path / "my runs' $(touch pwned) #1"
    folder.mkdir()
    write_quickstart_data(folder / "data.json", 600, 0)
    return folder
