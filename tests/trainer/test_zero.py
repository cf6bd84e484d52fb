"""DeepSpeed's JSON, compared with recorded files in zero/; a missing record fails."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from trainer.config import DeepSpeedConfig, TrainingConfig
from trainer.errors import TrainerError
from trainer.zero import deepspeed_dict

RECORDS = Path(__file__).with_name("zero")
TRAINING = TrainingConfig(global_batch_size=64, micro_batch_size=2)
CASES = {
    "stage-0-fp32": (TRAINING.model_copy(update={"precision": "fp32", "max_grad_norm": None}), {"stage": 0}, 8),
    "stage-0-bf16": (TRAINING, {"stage": 0, "grad_accum_dtype": "bf16"}, 8),
    "stage-1": (TRAINING, {"stage": 1}, 8),
    "stage-2": (TRAINING, {}, 8),
    "stage-1-fp16": (TRAINING.model_copy(update={"precision": "fp16", "loss_scale_power": 12}), {"stage": 1}, 2),
    "stage-2-8-bit": (TRAINING.model_copy(update={"optimizer": "adamw_8bit"}), {}, 8),
    "stage-1-offload": (TRAINING, {"stage": 1, "offload_optimizer": "cpu"}, 4),
    "stage-3-offload-all": (TRAINING, {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}, 16),
    "stage-3-nvme": (
        TRAINING,
        {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "nvme", "nvme_path": "/local"},
        16,
    ),
    "stage-3-nvme-all": (
        TRAINING,
        {"stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": "/local"},
        16,
    ),
    "stage-3-raw": (
        TRAINING,
        {"stage": 3, "raw": {"zero_optimization": {"overlap_comm": False}, "communication_data_type": "fp32"}},
        2,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_json_is_as_recorded(name):
    training, deepspeed, world_size = CASES[name]
    made = deepspeed_dict(training, DeepSpeedConfig(**deepspeed), world_size)
    assert made == json.loads((RECORDS / f"{name}.json").read_text())
    assert json.loads(json.dumps(made)) == made


def test_every_record_is_compared():
    assert {path.stem for path in RECORDS.iterdir()} == set(CASES)


def test_a_batch_that_ranks_can_not_share_is_refused():
    with pytest.raises(TrainerError, match=r"global_batch_size \(64\) must be a multiple.*3 x 2 = 6"):
        deepspeed_dict(TRAINING, DeepSpeedConfig(), 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage": 0, "offload_optimizer": "cpu"}, "needs stage 1 or more"),
        ({"stage": 2, "offload_optimizer": "cpu", "offload_parameters": "cpu"}, "needs stage 3"),
        ({"stage": 3, "offload_parameters": "cpu"}, "needs offload_optimizer: cpu or nvme"),
        ({"stage": 2, "offload_optimizer": "nvme", "nvme_path": "/local"}, "nvme needs stage 3; stage is 2"),
        ({"stage": 3, "offload_optimizer": "nvme"}, "nvme_path"),
        ({"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "nvme"}, "nvme_path"),
        ({"nvme_path": "/local"}, "nvme_path"),
    ],
)
def test_offload_that_does_not_fit_is_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        DeepSpeedConfig(**values)
