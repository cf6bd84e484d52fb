"""The copy of a run at a URL: whole at any moment, fetched where the run is not yet, owned by one process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest

from launcher import plan, storage
from launcher.config import load_config
from launcher.errors import ConfigError, LauncherError
from launcher.quickstart_data import write_quickstart_data
from launcher.storage import RunCopy, TakenOver, probe, what_to_do
from tests.launcher.submit.small_runs import configure, train_rows, until


def fill(run: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}://{tmp_path}/store/run"


def content(run: Path) -> dict[str, str]:
    return {name: (run / name).read_text() for name in storage._files(run)}


def at(url: str) -> dict[str, Any]:
    with fsspec.open(f"{url}/state.json") as file:
        return json.load(file)["files"]


def begun(url: str, run: Path, told: list[str] | None = None) -> RunCopy:
    run.mkdir(exist_ok=True)
    copy = RunCopy(url, run)
    copy.begin((told if told is not None else []).append)
    return copy


@pytest.mark.parametrize(
    ("here", "there", "has_work", "expected"),
    [
        ((), None, False, "go on"),
        ((), None, True, "go on"),
        ((), "a", False, "fetch"),
        ((), "a", True, "refuse"),
        (("a", None), "a", True, "go on"),
        (("b", "a"), "a", True, "go on"),
        (("b", "a"), "c", True, "replace"),
        (("b", "a"), "c", False, "fetch"),
    ],
)
def test_who_is_ahead(here: tuple[str, ...], there: str | None, has_work: bool, expected: str) -> None:
    assert what_to_do(here, there, has_work=has_work) == expected


def test_another_machine_gets_what_is_whole_and_nothing_of_one_machine_alone(url: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    copy = begun(url, first)
    whole = {
        "data/train/a": "packs",
        "prepare.record.json": "{}",
        "checkpoints/step-5/rank-0": "weights",
        "checkpoints/step-5/seal.json": "{}",
    }
    fill(first, whole)
    fill(first, {"checkpoints/step-9.A1-x/rank-0": "half", "attempt": "1 x", "slurm/7.log": "", "stop": ""})
    copy.push()
    assert copy.problem is None
    told: list[str] = []
    begun(url, second, told)
    assert content(second) == content(first) == whole
    assert "fetched 4 files" in told[0]


def test_the_copy_follows_and_a_push_that_dies_half_way_leaves_it_whole(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    copy = begun(url, run)
    fill(run, {"model/weights": "old", "export.record.json": "old", "data/a": "kept"})
    copy.push()
    fill(run, {"model/weights": "new", "export.record.json": "new!", "report.html": "page"})

    put = storage._Store.put

    def dies(self: Any, file: Path, path: str) -> None:
        if path == "report.html":
            raise OSError("the machine went away")
        put(self, file, path)

    with monkeypatch.context() as broken:
        broken.setattr(storage._Store, "put", dies)
        copy.push()
        assert copy.problem is not None
        assert "the machine went away" in copy.problem
    # The record of a stage whose files were being changed is not among what another machine would get.
    assert at(url) == {"data/a": 4, "model/weights": None}

    # The same folder goes on, as a new process, and takes away what is gone.
    (run / "data/a").unlink()
    again = begun(url, run)
    again.push()
    assert again.problem is None
    assert at(url) == {"export.record.json": 4, "model/weights": 3, "report.html": 4}
    begun(url, tmp_path / "elsewhere")
    assert content(tmp_path / "elsewhere") == content(run)
    assert again._store.read("data/a") is None


def test_a_copy_that_was_lost_is_written_anew(url: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    copy = begun(url, run)
    fill(run, {"data/a": "1", "data/b": "2"})
    copy.push()
    copy._store.fs.rm(copy._store.root, recursive=True)
    again = begun(url, run)
    again.push()
    assert again.problem is None
    begun(url, tmp_path / "elsewhere")
    assert content(tmp_path / "elsewhere") == {"data/a": "1", "data/b": "2"}


def test_who_is_taken_over_writes_no_more_and_what_it_had_is_set_aside(url: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    thought_dead = begun(url, first)
    fill(first, {"data/a": "1"})
    thought_dead.push()
    successor = begun(url, second)
    fill(second, {"data/a": "22"})
    successor.push()
    fill(first, {"data/a": "333", "data/b": "late"})
    with pytest.raises(TakenOver, match="another process has taken this run over"):
        thought_dead.push()
    assert at(url) == {"data/a": 2}
    told: list[str] = []
    begun(url, first, told)
    assert content(first) == {"data/a": "22"}
    assert "what was here is in" in told[0]
    assert next(first.glob("superseded/*/data/b")).read_text() == "late"


def test_a_folder_with_another_run_is_refused(url: str, tmp_path: Path) -> None:
    copy = begun(url, tmp_path / "first")
    fill(tmp_path / "first", {"data/a": "1"})
    copy.push()
    fill(tmp_path / "other", {"data/a": "own"})
    with pytest.raises(ConfigError, match="the copy of another"):
        begun(url, tmp_path / "other")
    assert content(tmp_path / "other") == {"data/a": "own"}


def test_a_copy_with_a_missing_or_cut_file_is_refused(url: str, tmp_path: Path) -> None:
    copy = begun(url, tmp_path / "first")
    fill(tmp_path / "first", {"data/a": "long"})
    copy.push()
    copy._store.write("data/a", b"cut")
    with pytest.raises(LauncherError, match=r"data/a: 3 bytes, 4 were written"):
        begun(url, tmp_path / "second")
    copy._store.remove("data/a")
    with pytest.raises(LauncherError, match=r"data/a is listed in state.json and is not there"):
        begun(url, tmp_path / "third")


def test_a_list_that_leads_out_of_the_folder_is_refused(url: str, tmp_path: Path) -> None:
    copy = begun(url, tmp_path / "first")
    copy._write_state({"../../evil": 1})
    with pytest.raises(LauncherError, match="outside of the run's folder"):
        begun(url, tmp_path / "second")


def test_what_cannot_be_a_store_is_told_before_anything_starts(repository: Path, tmp_path: Path) -> None:
    quickstart = repository / "configs/quickstart.yaml"
    with pytest.raises(ConfigError, match="keys belong into the store's own environment variables"):
        load_config(quickstart, ["run.storage=s3://key:secret@bucket/runs"])
    config = load_config(quickstart, ["run.storage=nosuch://bucket", f"run.work={tmp_path}"])
    assert config.run.directory == tmp_path / "quickstart"
    assert config.run.url == "nosuch://bucket/quickstart"
    assert any("run.storage = nosuch://bucket: Protocol not known" in problem for problem in plan.problems(config))
    (tmp_path / "file").touch()
    with pytest.raises(LauncherError, match="a write-read probe failed"):
        probe(f"file://{tmp_path}/file/run")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_run_goes_on_on_a_machine_that_has_nothing_of_it(tmp_path: Path, repository: Path) -> None:
    write_quickstart_data(tmp_path / "data.json", 600, 0)
    config = configure(tmp_path, repository, training={"max_steps": 60, "checkpoint_every": 20, "num_workers": 1})
    program = [sys.executable, "-m", "launcher", "run", str(config), "--to", "train"]
    program += ["--set", f"run.storage=file://{tmp_path / 'store'}"]
    place: dict[str, Any] = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    one, two = ([*program, "--set", f"run.work={tmp_path}/{name}"] for name in ("one", "two"))
    first = subprocess.Popen(one, **place)
    until((tmp_path / "store/small/checkpoints/step-20/seal.json").exists, 150, lambda: str(first.poll()))
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    assert first.returncode in (0, 75), said

    second = subprocess.run(two, **place, check=False, timeout=200)
    assert second.returncode == 0, second.stdout
    assert "fetched" in second.stdout
    assert "prepare is done" in second.stdout
    assert [row["step"] for row in train_rows(tmp_path / "two/small")] == list(range(1, 61))
    assert at(f"file://{tmp_path}/store/small").keys() >= {"train.record.json", "metrics.jsonl"}
