import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config import DeepSpeedConfig, ModelConfig, TrainingConfig
from trainer.devices import device_problems, is_installed, refuse_small_disk, slow_precision
from trainer.errors import TrainerError

MODEL = ModelConfig(name_or_path="owner/model")


FLASH = {name: MODEL.model_copy(update={"attention": name}) for name in ("flash_attention_2", "flash_attention_3")}
V100, T4, A100, H100 = (7, 0), (7, 5), (8, 0), (9, 0)


def problems(model=MODEL, deepspeed=None, *, on_gpu=False, capability=None, **training):
    sections = model, TrainingConfig(**training), DeepSpeedConfig(**deepspeed or {})
    return device_problems(*sections, on_gpu=on_gpu, capability=capability)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"precision": "fp16"}, "take bf16"),
        ({"optimizer": "paged_adamw_8bit"}, "on CPUs take adamw_8bit"),
        ({"optimizer": "paged_adamw_32bit"}, "on CPUs take adamw"),
        ({"model": MODEL.model_copy(update={"attention": "flex_attention"})}, "no backward pass on CPUs"),
    ],
)
def test_what_needs_a_gpu_is_refused_on_cpus_alone(asked, words):
    (line,) = problems(**asked)
    assert words in line
    assert problems(**asked, on_gpu=True) == []


def test_what_runs_on_cpus_is_not_refused():
    assert problems(optimizer="adamw_8bit", precision="fp32") == problems() == []


@pytest.mark.parametrize("capability", [V100, T4])
def test_bf16_is_refused_on_gpus_that_have_none(capability):
    (line,) = problems(on_gpu=True, capability=capability, deepspeed={"stage": 0})
    assert "training.precision: bf16 needs GPUs of compute capability 8.0 or more" in line
    assert f"these have {capability[0]}.{capability[1]}" in line
    assert line.endswith("set training.precision to fp16 and deepspeed.stage to 1")
    assert problems(on_gpu=True, capability=capability)[0].endswith("to fp16")
    for precision in ("fp16", "fp32"):
        assert problems(on_gpu=True, capability=capability, precision=precision) == []


@pytest.mark.parametrize("capability", [A100, H100, None])
def test_bf16_is_taken_where_it_works_or_the_card_is_not_known(capability):
    assert problems(on_gpu=True, capability=capability) == []


@pytest.mark.parametrize(
    ("attention", "package"), [("flash_attention_2", "flash-attn"), ("flash_attention_3", "flash-attn-3")]
)
def test_flash_attention_without_its_package_is_refused(monkeypatch, attention, package):
    asked = []
    monkeypatch.setattr("trainer.devices.is_installed", lambda name: bool(asked.append(name)))
    (line,) = problems(FLASH[attention], on_gpu=True, capability=H100)
    assert f"model.attention: {attention} needs the package {package}, which is not installed" in line
    assert "no kernel is fetched from the hub" in line
    assert asked == [package]
    (line,) = problems(FLASH[attention])
    assert "needs a GPU: take auto, sdpa or eager" in line


def test_an_installed_package_is_found_by_its_own_name():
    assert is_installed("pydantic")
    assert not is_installed("flash-attn-of-nobody")


def test_flash_attention_needs_a_newer_gpu_and_16_bits(monkeypatch):
    monkeypatch.setattr("trainer.devices.is_installed", lambda _: True)
    flash = FLASH["flash_attention_2"]
    assert problems(flash, on_gpu=True, capability=A100) == []
    (line,) = problems(flash, on_gpu=True, capability=T4, precision="fp16")
    assert "needs GPUs of compute capability 8.0 or more" in line
    (line,) = problems(flash, on_gpu=True, capability=A100, precision="fp32")
    assert "computes in 16 bits, training.precision is fp32" in line


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


@pytest.mark.parametrize(
    ("precision", "flags", "slow"),
    [
        ("bf16", "fma avx avx2", True),
        ("bf16", "avx2 avx512f avx512dq avx512bw avx512vl", False),
        ("fp32", "fma avx avx2", False),
        ("bf16", None, False),  # no x86, or no such table
    ],
)
def test_16_bits_on_cpus_without_avx_512_are_reported(tmp_path: Path, precision: str, flags: str | None, slow: bool):
    (tmp_path / "cpuinfo").write_text("vendor_id : x\n" + (f"flags\t\t: {flags}\n" if flags else ""))
    words = slow_precision(precision, tmp_path / "cpuinfo")
    assert (words is not None and "set training.precision to fp32" in words) is slow
    assert slow_precision(precision, tmp_path / "none") is None
