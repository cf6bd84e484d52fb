"""`launcher fetch`: models and data sets into the hub's cache, from a hub on loopback, with the hub's real library."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import fetch
from launcher.config import RunConfig
from launcher.fetch import wanted_of
from tests.trainer.data.chat_templates import make_tokenizer
from tests.trainer.data.hub_server import hub

# The command itself, then what it has loaded.
COMMAND = """
import sys
from launcher.cli import main
sys.argv[0] = "launcher"
try:
    main()
finally:
    print("LOADED", *({"torch", "transformers", "vllm", "ray", "datasets"} & sys.modules.keys()))
"""
PREPARE = """
import json, sys
from pathlib import Path
from trainer.config import load_trainer_config
from trainer.prepare import prepare
print(json.dumps(prepare(load_trainer_config(Path(sys.argv[1])), Path(sys.argv[2]))))
"""


def run(home: Path, config: Path, *words: str, endpoint: str, **more: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "fetch", str(config), *words],
        env=plain | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)} | more,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def filled(folder: Path, files: dict[str, int]) -> Path:
    for name, size in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    return folder


@pytest.fixture
def repositories(tmp_path: Path) -> dict[str, Path]:
    base = filled(
        tmp_path / "base",
        {
            "model-1.safetensors": 5000,
            "model-2.safetensors": 3000,
            "pytorch_model.bin": 9000,
            "consolidated.safetensors": 8000,
            "original/params.json": 2,
            "original/consolidated.00.pth": 8000,
        },
    )
    make_tokenizer("zephyr").save_pretrained(base)
    rows = filled(tmp_path / "rows", {"loading.py": 10})
    for part in (0, 1):
        texts = [{"prompt": f"Say {i}", "completion": f"{i}, of course"} for i in range(part * 20, part * 20 + 20)]
        (rows / f"train-{part}.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return {
        "models/them/base": base,
        "models/them/judge": filled(tmp_path / "judge", {"model.safetensors": 700, "config.json": 30}),
        "models/them/old": filled(tmp_path / "old", {"pytorch_model.bin": 9000, "config.json": 30}),
        "datasets/them/rows": rows,
    }


def configured(tmp_path: Path, judge: str = "them/judge") -> Path:
    path = tmp_path / "run.yaml"
    tree = {
        "run": {"name": "x", "storage": str(tmp_path / "runs")},
        "model": {"name_or_path": "them/base"},
        "data": {"sources": [{"path": "them/rows"}], "sequence_length": 128, "template": "chat"},
        "judge": {"type": "vllm", "model": judge},
    }
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def cached(home: Path) -> set[str]:
    return {str(file.relative_to(file.parents[1])) for file in home.glob("hub/*/snapshots/*/*") if file.is_file()}


def test_fetch_downloads_what_the_run_names_and_nothing_else(repositories: dict[str, Path], tmp_path: Path) -> None:
    home, config = tmp_path / "home", configured(tmp_path)
    with hub(repositories) as (endpoint, asked):
        listed = run(home, config, "--dry-run", endpoint=endpoint)
        assert listed.returncode == 0, listed.stderr
        assert not cached(home)
        fetched = run(home, config, endpoint=endpoint)
        assert fetched.returncode == 0, fetched.stderr
        before = len(asked)
        again = run(home, config, endpoint=endpoint)
        downloads = [line for line in asked[before:] if line.startswith("GET") and "/resolve/" in line]
    assert "model them/judge: 2 files, 730 bytes, 730 bytes to download" in listed.stdout
    assert "dry run: " in listed.stdout
    assert {name.partition("/")[2] for name in cached(home)} >= {
        "model-1.safetensors",
        "model-2.safetensors",
        "tokenizer.json",
        "model.safetensors",
        "config.json",
        "train-0.jsonl",
        "train-1.jsonl",
    }
    everything = " ".join(asked)
    assert not [word for word in (".bin", ".pth", "consolidated.safetensors", "loading.py") if word in everything]
    assert f'cluster.slurm.environment: {{HF_HOME: {home}, HF_HUB_OFFLINE: "1"}}' in fetched.stdout
    assert again.stdout.count("all there already") == 3
    assert not downloads
    assert "LOADED\n" in fetched.stdout, "fetch runs on a login node: nothing heavy is loaded"


@pytest.mark.slow  # two processes that load everything
def test_an_offline_node_prepares_from_what_was_fetched(repositories: dict[str, Path], tmp_path: Path) -> None:
    home, config = tmp_path / "home", configured(tmp_path)
    with hub(repositories) as (endpoint, _):
        assert run(home, config, endpoint=endpoint).returncode == 0

    def prepare(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", PREPARE, str(config), str(tmp_path / name)],
            env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    done = prepare("whole")
    assert done.returncode == 0, done.stderr
    assert sum(split["rows"] for split in json.loads(done.stdout)["splits"].values()) == 40
    # Half of the rows would make another run without a word.
    next(home.glob("hub/datasets--them--rows/snapshots/*/train-1.jsonl")).unlink()
    refused = prepare("half")
    assert refused.returncode != 0
    assert "the dataset them/rows is not in this machine's cache" in refused.stderr


def test_everything_the_hub_refuses_is_named_before_a_download(repositories: dict[str, Path], tmp_path: Path) -> None:
    home, config = tmp_path / "home", configured(tmp_path, judge="them/old")
    more = ["--set", "generation.models={rival: them/typo}"]
    with hub(repositories, gated=["models/them/base"]) as (endpoint, _):
        refused = run(home, config, *more, endpoint=endpoint)
        allowed = run(home, configured(tmp_path), "--dry-run", endpoint=endpoint, HF_TOKEN="hf_x")
    assert refused.returncode == 2
    assert f"model.name_or_path: the model them/base is gated: accept its terms at {endpoint}/them/base" in (
        refused.stderr
    )
    assert "generation.models.rival.path: there is no folder them/typo" in refused.stderr
    assert "judge.model: the model them/old has no weights in safetensors" in refused.stderr
    assert "nothing was downloaded" in refused.stderr
    assert not [name for name in cached(home) if "safetensors" in name]
    assert allowed.returncode == 0, allowed.stderr


def test_folders_and_endpoints_are_not_fetched(tmp_path: Path) -> None:
    tree = {
        "run": {"name": "x"},
        "model": {"name_or_path": str(tmp_path)},
        "data": {"path": "rows.json"},
        "generation": {
            "models": {
                "near": {"path": "them/rival", "revision": "v2"},
                "far": {"type": "api", "base_url": "http://localhost/v1", "model": "m"},
            }
        },
        "judge": {
            "type": "jury",
            "judges": [
                {"type": "vllm", "model": "them/judge"},
                {"type": "vllm", "model": "them/judge"},
                {"type": "api", "base_url": "http://localhost/v1", "model": "m"},
            ],
        },
    }
    named = wanted_of(RunConfig.model_validate(tree))
    assert [str(one) for one in named] == ["model them/rival at v2", "model them/judge"]
    assert doctest.testmod(fetch).failed == 0
