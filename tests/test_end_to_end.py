"""The whole line as a person runs it, small: real Ray, DeepSpeed and vLLM, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launcher.quickstart_data import write_quickstart_data

LAUNCHER = Path(sys.executable).parent / "launcher"
# The launcher, which ends with a line of what its process has loaded.
TELLING = """
import sys
from launcher.cli import main
try:
    main()
finally:
    heavy = ("torch", "transformers", "vllm", "deepspeed", "datasets")
    print("loaded:", *(name for name in heavy if name in sys.modules))
"""
CONFIG = """\
run: {{name: small, storage: {folder}, seed: 1}}
model:
  from_scratch: {{vocab_size: 384, hidden_size: 64, intermediate_size: 128, num_layers: 2, num_heads: 2,
                  num_kv_heads: 1, max_position_embeddings: 256}}
data:
  path: {folder}/rows.json
  sequence_length: 256
  split: {{train: 0.9, validation: 0.05, test: 0.05}}
  max_test_rows: 16
training:
  num_workers: 2
  max_steps: {steps}
  num_epochs: 100
  global_batch_size: 4
  micro_batch_size: 2
  lr: 3.0e-3
  validate_every: 20
  checkpoint_every: 5
generation: {{max_model_len: 256, max_tokens: 16}}
"""


def write_run(folder: Path, *, steps: int) -> Path:
    write_quickstart_data(folder / "rows.json", 600)
    config = folder / "small.yaml"
    config.write_text(CONFIG.format(folder=folder, steps=steps))
    return config


def processes_of(mark: str) -> list[int]:
    """Every process that has the mark in its environment, whatever became of its parents."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
        except OSError:
            continue
    return found


def runs(mark: str, word: str) -> bool:
    """Whether a process with the mark has the word in its command line."""
    for pid in processes_of(mark):
        with suppress(OSError):
            if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return True
    return False


def none_left(mark: str, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while processes_of(mark) and time.monotonic() < end:
        time.sleep(0.2)
    return not processes_of(mark)


def start(config: Path, mark: str, log: Path, *words: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", TELLING, "run", str(config), *words],
            env=os.environ | {"RUN_MARK": mark},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell starts what it puts in the background with Ctrl-C ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
        )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run from instructions to its report: its folder, its configuration, what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_run(folder, steps=40)
    mark = uuid.uuid4().hex
    process = start(config, mark, folder / "log", "--set", "report.bootstrap_samples=1000")
    status = process.wait(timeout=400)
    printed = (folder / "log").read_text()
    assert status == 0, printed
    assert none_left(mark, within_s=5)
    return folder / "small", str(config), printed


def test_it_ends_with_the_report_and_one_line(finished: tuple[Path, str, str]) -> None:
    run_dir, _, printed = finished
    headline = json.loads((run_dir / "report.json").read_text())["headline"]
    assert headline["judge"] == "reference"
    assert headline["num_prompts"] == 16
    for name in ("base", "tuned", "difference"):
        assert headline[name]["low"] <= headline[name]["mean"] <= headline[name]["high"]
    assert headline["line"] in printed
    assert str(run_dir / "report.html") in printed


def test_the_launcher_loads_nothing_that_takes_a_gpu(finished: tuple[Path, str, str]) -> None:
    assert finished[2].splitlines()[-1] == "loaded:"


def test_training_learned_from_every_row(finished: tuple[Path, str, str]) -> None:
    metrics = rows(finished[0] / "metrics.jsonl")
    steps = [row for row in metrics if row["kind"] == "train"]
    validation = {row["step"]: row["loss"] for row in metrics if row["kind"] == "validation"}
    assert [row["step"] for row in steps] == list(range(1, 41))
    assert set(validation) == {0, 20, 40}
    assert validation[40] < validation[20] < validation[0]


def test_both_models_answered_and_were_judged(finished: tuple[Path, str, str]) -> None:
    run_dir = finished[0]
    asked = [row["id"] for row in rows(run_dir / "data" / "test.jsonl")]
    assert len(asked) == 16
    for name in ("base", "tuned"):
        responses = rows(run_dir / "responses" / f"{name}.jsonl")
        assert sorted(row["id"] for row in responses) == sorted(asked)
        assert {row["state"] for row in responses} == {"generated"}
        assert sorted(row["id"] for row in rows(run_dir / "scores" / f"{name}.jsonl")) == sorted(asked)


def test_a_second_run_finds_everything_done(finished: tuple[Path, str, str]) -> None:
    _, config, printed = finished
    again = subprocess.run(
        [str(LAUNCHER), "run", config, "--set", "report.bootstrap_samples=1000"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert again.stdout.count("is done") == 6
    assert again.stdout.splitlines()[-2] == printed.splitlines()[-3]


def test_a_changed_setting_stops_with_the_difference(finished: tuple[Path, str, str]) -> None:
    answer = subprocess.run(
        [str(LAUNCHER), "run", finished[1], "--set", "training.lr=1e-4"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert answer.returncode == 2
    assert "training.lr: was 0.003, is now 0.0001" in answer.stderr
    assert "lr: 0.003\n" in (finished[0] / "config.yaml").read_text()  # still the one that made what is there
    assert "--from train --force" in answer.stderr


@pytest.mark.slow
def test_interrupted_in_training_it_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=2000)
    mark = uuid.uuid4().hex
    process = start(config, mark, tmp_path / "log", "--only", "prepare")
    assert process.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    process = start(config, mark, tmp_path / "log", "--only", "train")
    end = time.monotonic() + 120
    while not list(tmp_path.glob("small/checkpoints/step-*/seal.json")) and time.monotonic() < end:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130, (tmp_path / "log").read_text()
    assert none_left(mark, within_s=5)
    reached = max(row["step"] for row in rows(tmp_path / "small" / "metrics.jsonl"))
    process = start(config, mark, tmp_path / "log", "--only", "train")
    end = time.monotonic() + 120
    metrics = tmp_path / "small" / "metrics.jsonl"
    while max(row["step"] for row in rows(metrics)) <= reached + 1 and time.monotonic() < end:
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    steps = [row["step"] for row in rows(metrics) if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > reached + 1
    assert none_left(mark, within_s=5)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_while_exporting_leaves_no_process(
    number: signal.Signals, status: int, finished: tuple[Path, str, str], tmp_path: Path
) -> None:
    run_dir, config, _ = finished
    again = tmp_path / "small"
    shutil.copytree(run_dir, again)
    mark = uuid.uuid4().hex
    # vLLM loads for half a minute: the signal comes while its process does.
    process = start(Path(config), mark, tmp_path / "log", "--only", "export", "--force", "--run-dir", str(again))
    end = time.monotonic() + 200
    while not runs(mark, "trainer.export.ask_vllm:answer") and time.monotonic() < end:
        time.sleep(0.2)
    assert time.monotonic() < end
    os.kill(process.pid, number)
    assert process.wait(timeout=60) == status, (tmp_path / "log").read_text()
    assert none_left(mark, within_s=10)
