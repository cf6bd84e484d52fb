"""Models and data sets by their hub id, from a hub on loopback, with the hub's real libraries."""

import json
import os
import subprocess
import sys

import pytest

from tests.trainer.data.chat_templates import make_tokenizer
from tests.trainer.data.hub_server import COMMIT, hub
from trainer.errors import TrainerError
from trainer.hub import tokenizer_folder

PREPARE = """
import json, sys
from pathlib import Path
from trainer.config import TrainerConfig
from trainer.errors import TrainerError
from trainer.prepare import prepare

for number, config in enumerate(json.loads(sys.argv[1])):
    try:
        print(json.dumps(prepare(TrainerConfig.model_validate(config), Path(sys.argv[2], str(number)))))
    except TrainerError as error:
        print(json.dumps(str(error)))
"""


def run(endpoint, home, folder, *changes):
    """Prepare with each (model, data) in a process of its own: the hub's address is read when its library is loaded."""
    configs = [
        {
            "model": {"name_or_path": "them/model"} | model,
            "data": {"sources": [{"path": "them/rows"} | data], "sequence_length": 128, "template": "chat"},
        }
        for model, data in changes
    ]
    told = subprocess.run(
        [sys.executable, "-c", PREPARE, json.dumps(configs), str(folder)],
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return [json.loads(line) for line in told.stdout.splitlines()], told.stderr


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repositories")
    make_tokenizer("zephyr").save_pretrained(folder / "model")
    (folder / "model" / "model.safetensors").write_bytes(b"weights that prepare has no use for")
    (folder / "rows").mkdir()
    rows = [{"prompt": f"Say {i}", "completion": f"{i}, of course"} for i in range(40)]
    (folder / "rows" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"models/them/model": folder / "model", "datasets/them/rows": folder / "rows"}


@pytest.mark.slow  # two processes that load everything: 15 s
def test_a_model_and_a_data_set_from_the_hub(repositories, tmp_path):
    with hub(repositories) as (endpoint, asked):
        (summary, no_revision, no_model), _ = run(
            endpoint,
            tmp_path,
            tmp_path / "there",
            ({}, {}),
            ({}, {"revision": "v7"}),
            ({"name_or_path": "them/typo"}, {}),
        )
    assert summary["sources"] == [{"path": "them/rows", "format": "prompt_completion", "revision": COMMIT}]
    assert sum(split["rows"] for split in summary["splits"].values()) == 40
    assert not [line for line in asked if "safetensors" in line], "prepare needs no weights"
    assert "the hub does not give the dataset them/rows at v7" in no_revision
    assert "the hub does not give the model them/typo" in no_model
    assert "HF_TOKEN" in no_model

    # The hub is gone: the model is in this machine's cache, the rows were streamed.
    local = {"path": str(repositories["datasets/them/rows"])}
    (no_rows, no_model), logged = run(
        endpoint, tmp_path, tmp_path / "gone", ({}, {"revision": COMMIT}), ({"name_or_path": "them/typo"}, local)
    )
    assert f"there is no folder them/rows, and the hub ({endpoint}) cannot be reached for the dataset" in no_rows
    assert f"there is no folder them/typo, and the hub ({endpoint}) cannot be reached for the model" in no_model
    assert not logged, "one clear error is enough"


def test_offline_mode_is_told(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TrainerError, match=r"HF_HUB_OFFLINE is set, and the model them/typo is not in this machine's"):
        tokenizer_folder("them/typo", None)
