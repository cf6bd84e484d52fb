"""Models and data sets by their hub id, from a hub on loopback, with the hub's real libraries."""

import json
import os
import subprocess
import sys

import pytest

from tests.trainer.data.chat_templates import make_tokenizer
from tests.trainer.data.hub_server import COMMIT, hub
from trainer.config import DataConfig, SourceConfig
from trainer.data.collect import Rejected, collect
from trainer.data.sources import read_source, splits_of
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
    rows = {"path": "them/rows"}
    changes = [
        (model, data if {"path", "sources"} & data.keys() else {"sources": [rows | data]}) for model, data in changes
    ]
    configs = [
        {
            "model": {"name_or_path": "them/model"} | model,
            "data": data | {"sequence_length": 128, "template": "chat"},
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
    (folder / "split").mkdir()
    for name, held in (("train", rows[:30]), ("test", rows[30:])):
        (folder / "split" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, held)))
    return {
        "models/them/model": folder / "model",
        "datasets/them/rows": folder / "rows",
        "datasets/them/split": folder / "split",
    }


@pytest.mark.slow  # two processes that load everything: 15 s
def test_a_model_and_a_data_set_from_the_hub(repositories, tmp_path):
    with hub(repositories) as (endpoint, asked):
        (summary, held, no_revision, no_model), _ = run(
            endpoint,
            tmp_path,
            tmp_path / "there",
            ({}, {}),
            ({}, {"path": "them/split"}),
            ({}, {"revision": "v7"}),
            ({"name_or_path": "them/typo"}, {}),
        )
    assert summary["sources"] == [{"path": "them/rows", "format": "prompt_completion", "revision": COMMIT}]
    assert sum(split["rows"] for split in summary["splits"].values()) == 40
    assert held["sources"] == [{"path": "them/split", "format": "prompt_completion", "revision": COMMIT}]
    assert {name: split["rows"] for name, split in held["splits"].items()} == {"train": 29, "validation": 1, "test": 10}
    assert not [line for line in asked if "safetensors" in line], "prepare needs no weights"
    assert "the hub does not give the dataset them/rows at v7" in no_revision
    assert "the hub does not give the model them/typo" in no_model
    assert "HF_TOKEN" in no_model

    # The hub is gone: the model is in this machine's cache, the rows were streamed.
    local = {"sources": [{"path": str(repositories["datasets/them/rows"])}]}
    (no_rows, no_model), logged = run(
        endpoint, tmp_path, tmp_path / "gone", ({}, {"revision": COMMIT}), ({"name_or_path": "them/typo"}, local)
    )
    assert f"there is no folder them/rows, and the hub ({endpoint}) cannot be reached for the dataset" in no_rows
    assert f"there is no folder them/typo, and the hub ({endpoint}) cannot be reached for the model" in no_model
    assert not logged, "one clear error is enough"


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """Writes the files of a hub data set, as they are after a download."""

    def write(**files):
        for name, rows in files.items():
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return SourceConfig(path="them/rows", revision=COMMIT)

    monkeypatch.setattr("trainer.data.hub.downloaded", lambda *_: tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / ".cache"))
    return write


def test_a_hub_data_set_gives_its_splits(data_set):
    source = data_set(train=[{"prompt": "a", "score": 0.5}, {"prompt": "b", "score": None}], test=[{"prompt": "c"}])
    assert splits_of(source) == ["train", "test"]
    found = [(place, number, row["prompt"]) for place, number, row in read_source(source)]
    assert found == [("them/rows:train", 1, "a"), ("them/rows:train", 2, "b"), ("them/rows:test", 1, "c")]
    chosen = source.model_copy(update={"hub_split": "test"})
    assert [row["prompt"] for *_, row in read_source(chosen)] == ["c"]
    with pytest.raises(TrainerError, match="them/rows has no split 'dev'; it has train, test: set the source's hub"):
        list(read_source(source.model_copy(update={"hub_split": "dev"})))


def test_hub_splits_of_one_meaning_twice_are_refused(data_set, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}]
    data_set(test=rows, train=rows)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train_sft, path: train.jsonl}\n  - {split: train_gen, path: test.jsonl}\n---\n"
    )
    data = DataConfig(path="them/rows")
    with pytest.raises(TrainerError, match=r"them/rows holds several splits: train_sft, train_gen: .* each once"):
        collect(data, 0, tmp_path / "rows.out", Rejected(tmp_path / "rejected.out", skip=False))


def test_a_hub_data_set_of_several_subsets_names_them(data_set, tmp_path):
    source = data_set(a=[{"q": 1}], b=[{"q": 2}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- {config_name: one, data_files: a.jsonl}\n- {config_name: two, data_files: b.jsonl}\n---\n"
    )
    with pytest.raises(TrainerError, match=r"(?s)one.*two.*: set the source's subset to one of them"):
        splits_of(source)
    assert [row for *_, row in read_source(source.model_copy(update={"subset": "two"}))] == [{"q": 2}]


def test_offline_mode_is_told(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TrainerError, match=r"HF_HUB_OFFLINE is set, and the model them/typo is not in this machine's"):
        tokenizer_folder("them/typo", None)
