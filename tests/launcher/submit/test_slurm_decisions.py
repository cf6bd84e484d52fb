"""What the batch script decides, run by bash with stand-ins for srun and scontrol: codes, requeues, causes, members."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.config import RunConfig, load_config
from launcher.submit.script import Place, Script, whole_run, whole_sweep

# The one that starts Ray writes the address, or ends with a cause; the one for the launcher ends with DRIVER_CODE,
# or, if that is `saves`, with 75 when it is asked to save.
SRUN = """#!/bin/bash
while [ $# -gt 0 ]; do
  case $1 in
    --folder) folder=$2 ;;
    launcher.submit.node) nodes=yes ;;
    run) printf '%s\\n' "$@" >"$OUT/arguments" ;;
  esac
  shift
done
if [ -z "${nodes:-}" ]; then
  trap 'exit 75' USR1
  if [ "$DRIVER_CODE" = saves ]; then while :; do sleep 0.1 & wait $!; done; fi
  exit "$DRIVER_CODE"
fi
if [ "${NODE_FAILS:-}" ]; then echo "node n2: no space left" >"$folder/cause"; exit 1; fi
echo 10.0.0.1:7000 >"$folder/address"
trap 'exit 0' USR2
trap '' USR1
while :; do sleep 0.1 & wait $!; done
"""
SCONTROL = '#!/bin/bash\necho "$@" >>"$OUT/requeued"\nexit 1\n'  # a real one ends the script here


@dataclass
class Started:
    folder: Path
    process: subprocess.Popen[str]

    def ask(self, number: int) -> None:
        """Send a signal to the script, once the run has begun."""
        deadline = time.monotonic() + 20
        while not (self.folder / "arguments").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.process.send_signal(number)

    def end(self) -> tuple[int, bool, str]:
        """Exit code, whether it went back to the queue, what it said."""
        said = self.process.communicate(timeout=40)[0]
        return self.process.returncode, (self.folder / "requeued").exists(), said


@pytest.fixture
def config(repository: Path) -> RunConfig:
    return load_config(
        repository / "configs/quickstart.yaml", ["cluster.slurm={max_requeues: 2}", "cluster.device=cpu"]
    )


def start(script: Script, place: Place, **environment: str) -> Started:
    folder = place.run_dir
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "job.sh").write_text(script.text)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURMD_NODENAME": "n1"}
    place_of = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "OUT": str(folder), "DRIVER_CODE": "0"}
    process = subprocess.Popen(
        ["bash", str(folder / "job.sh")],
        env=slurm | place_of | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Started(folder, process)


def test_codes_requeues_and_causes(config: RunConfig, tmp_path: Path) -> None:
    cases: dict[str, tuple[dict[str, str], int | None, tuple[int, bool]]] = {
        "done": ({}, None, (0, False)),
        "failed": ({"DRIVER_CODE": "3"}, None, (3, False)),
        "saved before it was asked": ({"DRIVER_CODE": "75"}, None, (75, True)),
        "requeued for the last time": ({"DRIVER_CODE": "75", "SLURM_RESTART_COUNT": "1"}, None, (75, True)),
        "no requeue left": ({"DRIVER_CODE": "75", "SLURM_RESTART_COUNT": "2"}, None, (75, False)),
        "time is nearly up": ({"DRIVER_CODE": "saves"}, signal.SIGUSR1, (75, True)),
        "cancelled": ({"DRIVER_CODE": "saves"}, signal.SIGTERM, (75, False)),
        "Ray failed": ({"NODE_FAILS": "1"}, None, (1, False)),
    }
    started = {}
    for name, (environment, _, _) in cases.items():
        place = Place(tmp_path / name, tmp_path, "python")
        place.run_dir.mkdir()
        started[name] = start(whole_run(config, place)[0], place, **environment)
    for name, (_, number, _) in cases.items():
        if number is not None:
            started[name].ask(number)
    ended = {name: one.end() for name, one in started.items()}
    assert {name: one[:2] for name, one in ended.items()} == {name: case[2] for name, case in cases.items()}
    assert "Ray did not start within 600 s: node n2: no space left" in ended["Ray failed"][2]
    assert not list(tmp_path.rglob("token"))
    arguments = (tmp_path / "done/arguments").read_text().split("\n")
    assert arguments[:4] == ["run", f"{tmp_path}/done/slurm/config.yaml", "--run-dir", f"{tmp_path}/done"]
    assert "cluster.address='10.0.0.1:7000'" in arguments


def test_a_task_of_an_array_does_its_own_member(config: RunConfig, tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path, "python")
    array, _ = whole_sweep(config, place, {"1-lr-1e-5": config, "2-lr-2e-5": config})
    for member in array.members:
        (tmp_path / member).mkdir()
    second = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": "1"}
    code, _, said = start(array, place, DRIVER_CODE="75", **second).end()
    assert code == 75
    assert "job 40_1 attempt 1: starting Ray" in said
    assert (tmp_path / "2-lr-2e-5/slurm/40_1.1/address").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert (tmp_path / "arguments").read_text().split("\n")[1] == f"{tmp_path}/2-lr-2e-5/slurm/config.yaml"
