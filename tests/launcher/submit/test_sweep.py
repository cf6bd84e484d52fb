"""A sweep's members: which they are, what is found before any starts, and how they are run."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import typer

from launcher.config import load_config
from launcher.errors import ConfigError, Preempted
from launcher.results import compare
from launcher.run_directory import write_json
from launcher.submit import sweep
from launcher.submit.sweep import members_of, run_members, settings_of, table, write_members
from tests.evaluation.report.synthetic import make_run
from tests.launcher.submit.small_runs import configure, launcher


def test_every_combination_once_the_last_key_fastest() -> None:
    words = ["training.lr=1e-5,2e-5", "data.split={type: files, test: 'a,b'},{type: random}", "run.seed=1"]
    assert settings_of(words) == [
        ("training.lr=1e-5", "data.split={type: files, test: 'a,b'}", "run.seed=1"),
        ("training.lr=1e-5", "data.split={type: random}", "run.seed=1"),
        ("training.lr=2e-5", "data.split={type: files, test: 'a,b'}", "run.seed=1"),
        ("training.lr=2e-5", "data.split={type: random}", "run.seed=1"),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["training.lr"], "must look like"),
        (["training.lr="], "must look like"),
        (["=1,2"], "must look like"),
        (["training.lr=1,]["], "must look like"),
        (["training.lr=1,1"], "the same value is there twice"),
        (["run.seed=1,2", "run.seed=3"], "the key is there twice"),
        ([f"run.seed={','.join(map(str, range(32)))}", f"training.lr={','.join(map(str, range(32)))}"], "1,024 runs"),
    ],
)
def test_what_makes_no_sweep_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings_of(words)


def test_mistakes_of_all_members_are_told_before_anything_is_made(tmp_path: Path, repository: Path) -> None:
    config = configure(tmp_path, repository)
    with pytest.raises(ConfigError) as caught:
        members_of(config, [], ["training.lr=-1,1e-3", "data.train_on=all,nothing"])
    assert "training.lr = -1" in str(caught.value)
    assert "'nothing'" in str(caught.value)
    with pytest.raises(ConfigError, match="--set names this key too"):
        members_of(config, ["training.lr=1e-4"], ["training.lr=1e-3,2e-3"])
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_each_member_is_a_run_of_its_own(tmp_path: Path, repository: Path) -> None:
    config = configure(tmp_path, repository)
    members = members_of(config, ["run.seed=3"], ["training.lr=1e-3,2e-3", "data.train_on=all"])
    assert [member.name for member in members] == ["1-lr-1e-3-train_on-all", "2-lr-2e-3-train_on-all"]
    folder = tmp_path / "small"
    write_members(members, folder)
    for member in members:
        own = load_config(folder / member.name / sweep.MEMBER_CONFIG)
        assert own == member.config
        assert own.run.directory == folder / member.name
        assert (own.run.seed, own.data.train_on) == (3, "all")
    assert table(members, folder).splitlines()[2].endswith("training.lr=2e-3 data.train_on=all")
    at_url = members_of(config, ["run.storage=s3://bucket/runs"], ["training.lr=1e-3"], folder)
    assert at_url[0].config.run.url == "s3://bucket/runs/small/1-lr-1e-3"
    assert at_url[0].config.run.directory == folder / "1-lr-1e-3"

    (tmp_path / "single").mkdir()
    (tmp_path / "single/config.yaml").touch()
    with pytest.raises(ConfigError, match="holds a single run"):
        write_members(members, tmp_path / "single")


def test_words_behind_sweep_are_its_own_and_others_are_not(tmp_path: Path, repository: Path) -> None:
    config = configure(tmp_path, repository)
    shown = launcher("submit", "slurm", config, "--sweep", "training.lr=1,0.5", "run.seed=1,2", "--print", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "4 runs in" in shown.stderr
    assert "#SBATCH --array=0-3" in shown.stdout
    stray = launcher("submit", "slurm", config, "run.seed=1,2", "--print", cwd=tmp_path)
    assert stray.returncode == 2
    assert "unexpected run.seed=1,2" in stray.stderr


# In Python's place: notes when it begins and ends, and what it is asked.
STAND_IN = """#!/bin/bash
run=${*: -1}
echo "begin $(basename "$run")" >>"$LOG"
trap '[ "$(basename "$run")" = a ] || sleep 0.6; echo "saved $(basename "$run")" >>"$LOG"; exit 75' TERM
for _ in $(seq 5 5 "$MS"); do sleep 0.005 & wait $!; done
echo "end $(basename "$run")" >>"$LOG"
case $run in *bad*) exit 3 ;; esac
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program, log = tmp_path / "python", tmp_path / "log"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setattr(sweep.sys, "executable", str(program))
    monkeypatch.setenv("LOG", str(log))
    monkeypatch.setenv("MS", "50")
    for name in ("a", "bad", "c"):
        (tmp_path / name).mkdir()
    return log


def test_one_after_the_other_and_a_failure_ends_nothing(stand_in: Path, tmp_path: Path) -> None:
    told: list[str] = []
    run_members(["a", "bad", "c"], tmp_path, [], side_by_side=1, say=told.append)
    assert stand_in.read_text().split() == [
        "begin",
        "a",
        "end",
        "a",
        "begin",
        "bad",
        "end",
        "bad",
        "begin",
        "c",
        "end",
        "c",
    ]
    assert "bad: ended with exit code 3" in told
    assert "c: done" in told


def test_side_by_side_so_many_and_no_more(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MS", "300")
    run_members(["a", "bad", "c"], tmp_path, [], side_by_side=2, say=[].append)
    events = [line.split()[0] for line in stand_in.read_text().splitlines()]
    assert events[:2] == ["begin", "begin"]
    assert events[2] == "end"
    assert sorted(events[3:]) == ["begin", "end", "end"]


def test_asked_to_stop_it_lets_the_running_save_and_starts_no_more(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MS", "60000")

    def ask() -> None:
        while not stand_in.exists() or stand_in.read_text().count("begin") < 2:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    with pytest.raises(Preempted, match="the same command goes on"):
        run_members(["a", "bad", "c"], tmp_path, [], side_by_side=2, say=[].append)
    assert stand_in.read_text().splitlines()[2:] == ["saved a", "saved bad"]


def test_a_sweeps_folder_is_compared_and_a_member_that_is_missing_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["1-lr-1e-3", "2-lr-2e-3", "3-lr-4e-3"]
    for name, mean in zip(names[:2], (60.0, 80.0), strict=True):
        make_run(tmp_path / name, num_rows=60, tuned_mean=mean)
        (tmp_path / name / "judge.record.json").write_text("{}")

    def compared(members: list[str]) -> int:
        write_json(tmp_path / sweep.SWEEP_FILE, {"members": {name: [] for name in members}})
        with pytest.raises(typer.Exit) as ended:
            compare([tmp_path])
        return ended.value.exit_code

    assert compared(names[:2]) == 0
    assert "differences to 1-lr-1e-3" in capsys.readouterr().out
    assert compared(names) == 2
    shown = capsys.readouterr()
    assert "2-lr-2e-3" in shown.out
    assert f"not finished, and left out: {tmp_path}/3-lr-4e-3" in shown.err
    with pytest.raises(ConfigError, match="no member of this sweep has finished"):
        write_json(tmp_path / sweep.SWEEP_FILE, {"members": {"3-lr-4e-3": []}})
        compare([tmp_path])
