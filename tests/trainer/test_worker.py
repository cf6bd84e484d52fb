"""A rank's place: its GPU, and where its weights are loaded to. GPUs are stand-ins for torch.cuda."""

import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from trainer.config import DeepSpeedConfig, ModelConfig, QloraTuning, TrainerConfig, TrainingConfig
from trainer.errors import TrainerError
from trainer.model import device_map, load_base
from trainer.tuning import quantization
from trainer.worker import join, rehearse_export, take_device
from trainer.zero import deepspeed_dict


@pytest.fixture
def gpus(monkeypatch):
    """Make this machine one with so many GPUs; returns the indices that were taken."""
    taken = []

    def of(number, **environment):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return taken

    return of


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "index"),
    [
        (8, "3", 3),
        (1, "0", 0),
        (1, "3", 0),  # srun --gpus-per-task=1: the fourth task of the node sees its own GPU alone
    ],
)
def test_local_rank_is_the_index_that_was_taken(gpus, num_gpus, local_rank, index):
    taken = gpus(num_gpus, LOCAL_RANK=local_rank)
    assert take_device() == torch.device("cuda", index)
    assert taken == [index]
    assert os.environ["LOCAL_RANK"] == str(index)


def test_a_rank_alone_takes_the_first_gpu(gpus):
    gpus(2)
    assert take_device() == torch.device("cuda", 0)
    assert os.environ["LOCAL_RANK"] == "0"


def test_more_ranks_than_gpus_are_refused(gpus):
    gpus(2, LOCAL_RANK="2")
    with pytest.raises(TrainerError, match="rank 2 of this machine finds 2 GPUs"):
        take_device()


def test_a_worker_refuses_what_its_own_card_can_not_do(gpus, monkeypatch, tmp_path):
    gpus(1, LOCAL_RANK="0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    sections = {"model": {"name_or_path": "owner/model"}, "data": {"path": "rows.json"}}
    with pytest.raises(TrainerError, match=r"bf16 needs GPUs of compute capability 8\.0 .* these have 7\.5"):
        join(TrainerConfig.model_validate(sections), tmp_path)


def test_without_a_gpu_local_rank_stays(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert take_device() == torch.device("cpu")
    assert os.environ["LOCAL_RANK"] == "1"


@pytest.fixture
def passed(monkeypatch, tmp_path, tiny_base):
    """What from_pretrained gets when the base is loaded for a device."""
    (tmp_path / "base").symlink_to(tiny_base)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    real, seen = AutoModelForCausalLM.from_pretrained, {}

    def stand_in(place, **options):
        seen.update(options)
        return real(place, **options | {"device_map": None, "quantization_config": None})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stand_in)

    def of(device, tuning=None):
        how = quantization(tuning, torch.bfloat16)
        config = ModelConfig.model_validate({"from_scratch": {}})
        load_base(config, tmp_path, torch.bfloat16, torch.device(device), 96, how)
        return seen

    return of


@pytest.mark.parametrize("tuning", [None, QloraTuning(method="qlora")])
def test_weights_are_loaded_to_the_rank_s_own_gpu(passed, tuning):
    options = passed("cuda:3", tuning)
    assert options["device_map"] == {"": torch.device("cuda", 3)}
    assert (options["quantization_config"] is None) == (tuning is None)
    assert options["trust_remote_code"] is False


def test_on_the_cpu_no_map_is_passed(passed):
    assert passed("cpu")["device_map"] is None


def test_under_zero_3_no_map_is_passed():
    settings = deepspeed_dict(TrainingConfig(), DeepSpeedConfig(stage=3), 1)
    sharded = HfDeepSpeedConfig(settings)  # while it lives, transformers refuses a map
    assert device_map(torch.device("cuda", 0)) is None
    del sharded
    assert device_map(torch.device("cuda", 0)) == {"": torch.device("cuda", 0)}


def test_the_export_is_rehearsed_before_weights_are_loaded(tmp_path, tiny_base, capsys):
    shutil.copytree(tiny_base, tmp_path / "base")
    config = TrainerConfig.model_validate({"model": {"from_scratch": {}}, "data": {"path": "x.json"}})
    rehearse_export(config, tmp_path)  # data that no tokenizer was written beside
    shutil.copytree(tiny_base, tmp_path / "data" / "tokenizer")
    generation = tmp_path / "base" / "generation_config.json"
    generation.write_text(json.dumps({"do_sample": False, "temperature": 0.5}))
    rehearse_export(config, tmp_path)
    assert capsys.readouterr().out.startswith("export: generation_config.json: temperature (0.5) is left out")
    generation.write_text(json.dumps({"max_new_tokens": 0}))
    with pytest.raises(TrainerError, match=r"generation_config\.json that can't be read"):
        rehearse_export(config, tmp_path)
