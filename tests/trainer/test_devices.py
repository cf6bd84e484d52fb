import shutil
import subprocess
import sys

import pytest

from trainer.config import DeepSpeedConfig, ModelConfig, TrainingConfig
from trainer.devices import device_problems, refuse_small_disk
from trainer.errors import TrainerError

MODEL = ModelConfig(name_or_path="owner/model")


def problems(model=MODEL, deepspeed=None, *, on_gpu=False, **training):
    return device_problems(model, TrainingConfig(**training), DeepSpeedConfig(**deepspeed or {}), on_gpu=on_gpu)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"precision": "fp16"}, "take bf16"),
        ({"optimizer": "paged_adamw_8bit"}, "on CPUs take adamw_8bit"),
        ({"optimizer": "paged_adamw_32bit"}, "on CPUs take adamw"),
        ({"model": MODEL.model_copy(update={"attention": "flash_attention_2"})}, "take auto, sdpa or eager"),
        ({"model": MODEL.model_copy(update={"attention": "flex_attention"})}, "no backward pass on CPUs"),
    ],
)
def test_what_needs_a_gpu_is_refused_on_cpus_alone(asked, words):
    (line,) = problems(**asked)
    assert words in line
    assert problems(**asked, on_gpu=True) == []


def test_what_runs_on_cpus_is_not_refused():
    assert problems(optimizer="adamw_8bit", precision="fp32") == problems() == []


def test_liger_kernels_need_their_package_and_a_gpu(monkeypatch):
    monkeypatch.setattr("trainer.devices.find_spec", lambda _: None)
    assert problems(liger_kernels=True, on_gpu=True) == [
        "training.liger_kernels needs liger_kernel, which is not installed: "
        f"{sys.executable} -m pip install liger-kernel"
    ]
    monkeypatch.setattr("trainer.devices.find_spec", lambda _: object())
    assert problems(liger_kernels=True, on_gpu=True) == []
    assert problems(liger_kernels=True) == [
        "training.liger_kernels: these kernels are for GPUs; on CPUs leave it false"
    ]


def test_a_tracker_whose_library_is_missing_is_told_before_anything_starts(monkeypatch):
    installed = {"wandb"}
    monkeypatch.setattr("trainer.devices.find_spec", lambda module: object() if module in installed else None)
    assert problems(trackers=["wandb", "mlflow"]) == [
        "training.trackers needs mlflow, which is not installed: "
        f"{sys.executable} -m pip install mlflow-skinny sqlalchemy alembic"
    ]
    installed.add("mlflow")
    assert problems(trackers=["wandb", "mlflow"]) == []


def test_nothing_is_swapped_to_a_folder_that_is_not_there(tmp_path, monkeypatch):
    swapped = {"stage": 3, "offload_optimizer": "nvme", "nvme_path": tmp_path / "disk"}
    (line,) = problems(deepspeed=swapped, on_gpu=True)
    assert f"{tmp_path}/disk is no folder of this machine" in line
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("trainer.devices.find_library", lambda _: "libaio.so.1")
    assert problems(deepspeed=swapped, on_gpu=True) == []


def test_a_disk_without_libaio_or_too_small_is_refused(tmp_path, monkeypatch):
    swapped = {"stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": tmp_path}
    monkeypatch.setattr("trainer.devices.find_library", lambda _: None)
    assert "apt-get install libaio-dev" in problems(deepspeed=swapped, on_gpu=True)[0]
    config, free = DeepSpeedConfig(**swapped), shutil.disk_usage(tmp_path).free
    fits = free // 40
    refuse_small_disk(config, fits, fits, 2)
    with pytest.raises(TrainerError, match=rf"2 ranks of this machine need {40 * (fits * 2):,}"):
        refuse_small_disk(config, fits * 2, fits * 2, 2)
    refuse_small_disk(DeepSpeedConfig(), 10**18, 10**18, 8)


def test_two_lines_that_come_at_every_start_are_left_out_and_others_are_not():
    script = (
        "import trainer, logging; log = logging.getLogger('bitsandbytes.backends.cpu.ops'); "
        "log.warning('Failed to load CPU gemm_4bit_forward from kernels-community: x'); log.warning('a real one')"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stderr.splitlines() == ["a real one"]
