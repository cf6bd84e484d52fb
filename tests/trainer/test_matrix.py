"""Every tuning method times every ZeRO stage on two ranks: it learns and its export loads, or it is refused."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest
from peft import AutoPeftModelForCausalLM
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from tests.trainer.splits import write_split
from trainer.config import TrainerConfig
from trainer.export.stage import export

STEPS = 20
METHODS = {
    "full": {"method": "full"},
    "freeze": {"method": "freeze", "last_layers": 1},
    "lora": {"method": "lora", "rank": 4},
    "dora": {"method": "lora", "rank": 4, "dora": True, "rslora": True, "targets": ["q_proj", "down_proj"]},
    "qlora": {"method": "qlora", "rank": 4},
    "prompt": {"method": "prompt", "num_tokens": 4},
}
RATES = {"full": 3e-3, "freeze": 1e-2, "lora": 1e-2, "dora": 1e-2, "qlora": 1e-2, "prompt": 1.0}
REFUSED = [("qlora", 3), ("dora", 3)]
# Beside a method, what else changes a cell: "full+fp16" is full tuning in fp16.
VARIANTS = {
    "fp16": {"precision": "fp16", "loss_scale_power": 32},
    "8bit": {"optimizer": "adamw_8bit"},
    "stopped": {
        "early_stopping": {"patience": 2, "min_delta": 100},
        "validate_every": 1,
        "profile": {"start": 2, "steps": 1},
    },
}
OF_VARIANTS = [("full+fp16", stage) for stage in (1, 2, 3)] + [("full+8bit", stage) for stage in range(4)]
OF_VARIANTS += [("qlora+fp16", 2), ("qlora+8bit", 2)]
ALL = [(method, stage) for method in METHODS for stage in range(4) if (method, stage) not in REFUSED] + OF_VARIANTS
QUICK = [
    *[("full", stage) for stage in range(4)],
    ("freeze", 2),
    ("lora", 1),
    ("lora", 3),
    ("dora", 2),
    ("qlora", 2),
    ("prompt", 3),
    ("full+fp16", 2),
    ("full+8bit", 2),
]
CELLS = [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow) for cell in ALL]
LEAST_FALL = {"full": 0.5, "freeze": 0.5, "lora": 0.03, "dora": 0.01, "qlora": 0.03, "prompt": 0.002}


def values(cell, stage):
    method, _, variant = cell.partition("+")
    training = {
        "num_workers": 2,
        "precision": "bf16" if stage % 2 else "fp32",
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "num_epochs": 100,
        "max_steps": STEPS,
        "lr": RATES[method],
        "lr_schedule": "constant",
        "gradient_checkpointing": stage > 1,
    } | VARIANTS.get(variant, {})
    return {
        "model": {"from_scratch": {"vocab_size": 300}},
        "data": {"path": "rows.json", "sequence_length": 96, "packing": method != "prompt"},
        "tuning": METHODS[method],
        "training": training,
        "deepspeed": {"stage": stage},
        "export": {"vllm_prompts": 0},
    }


def train_all(cells, folder, tiny_base, tiny_tokenizer, offloads=MappingProxyType({})):
    for method, stage in cells:
        run_dir = folder / f"{method}-{stage}"
        for split, num_rows in (("train", 60), ("validation", 8)):
            write_split(run_dir / "data" / split, num_rows, packing=method != "prompt")
        tiny_tokenizer.save_pretrained(run_dir / "data" / "tokenizer")
        (run_dir / "base").symlink_to(tiny_base)
        cell = values(method, stage)
        cell["deepspeed"] |= offloads.get(stage, {})
        (run_dir / "cell.json").write_text(json.dumps(cell))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("matrix_worker.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, script, str(folder)], check=True, timeout=280, env=environment)
    return folder


@pytest.fixture(scope="module")
def quick_cells(tmp_path_factory, tiny_base, tiny_tokenizer):
    return train_all([*QUICK, ("lora+stopped", 2)], tmp_path_factory.mktemp("matrix"), tiny_base, tiny_tokenizer)


@pytest.fixture(scope="module")
def other_cells(tmp_path_factory, tiny_base, tiny_tokenizer):
    others = [cell for cell in ALL if cell not in QUICK]
    return train_all(others, tmp_path_factory.mktemp("matrix"), tiny_base, tiny_tokenizer)


@pytest.fixture
def run_dir_of(request):
    """The run folder of a cell; the cells beyond the quick ones are only trained when a slow test asks."""

    def find(method, stage):
        fixture = "other_cells" if (method, stage) in ALL and (method, stage) not in QUICK else "quick_cells"
        return request.getfixturevalue(fixture) / f"{method}-{stage}"

    return find


def validation_losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "validation"]


@pytest.mark.parametrize(("method", "stage"), CELLS)
def test_the_validation_loss_goes_down(run_dir_of, method, stage):
    first, last = validation_losses(run_dir_of(method, stage))
    assert last < first - LEAST_FALL[method.partition("+")[0]], (first, last)


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("full", (0, 2)),
        ("full", (1, 3)),
        ("lora", (1, 3)),
        *[pytest.param(method, (0, 2), marks=pytest.mark.slow) for method in METHODS if method != "full"],
    ],
)
def test_stages_learn_the_same_in_the_same_precision(run_dir_of, method, stages):
    losses = [validation_losses(run_dir_of(method, stage))[-1] for stage in stages]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if stages == (0, 2) else 2e-2)


@pytest.mark.parametrize(("method", "stage"), [cell for cell in CELLS if "fp16" in cell.values[0]])
def test_in_fp16_a_step_that_overflows_is_taken_again_at_a_lower_scale(run_dir_of, method, stage):
    run_dir = run_dir_of(method, stage)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"train", "validation", "checkpoint"}
    taken = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in taken] == list(range(1, STEPS + 1))
    scales = [row["loss_scale"] for row in taken]
    assert scales == sorted(scales, reverse=True)
    assert [row["num_overflows"] for row in taken] == [32 - math.log2(scale) for scale in scales]
    assert 0 < taken[0]["num_overflows"] <= taken[-1]["num_overflows"] < 32
    assert json.loads((run_dir / "result.json").read_text())["loss_scale_overflows"] == taken[-1]["num_overflows"]


def test_a_loss_that_no_longer_falls_ends_the_run_and_the_asked_step_is_traced_on_every_rank(run_dir_of):
    run_dir = run_dir_of("lora+stopped", 2)
    assert (
        json.loads((run_dir / "result.json").read_text())["steps"] == 2
    )  # the first validation, and two without a fall
    assert (run_dir / "checkpoints" / "step-2").is_dir()
    for rank in (0, 1):
        events = json.loads((run_dir / "profile" / f"rank-{rank}.json").read_text())["traceEvents"]
        assert any("allreduce" in str(event.get("name")).replace("_", "") for event in events)


@pytest.mark.parametrize("variant", ["fp16", "8bit"])
def test_a_variant_learns_like_the_plain_cell(run_dir_of, variant):
    plain, other = (validation_losses(run_dir_of(method, 2))[-1] for method in ("full", f"full+{variant}"))
    assert other == pytest.approx(plain, rel=0.05)


@pytest.mark.slow  # compiles DeepSpeed's CPU optimizer
def test_offloaded_training_is_the_same_training(tmp_path, run_dir_of, tiny_base, tiny_tokenizer):
    offloads = {stage: {"offload_optimizer": "cpu"} for stage in (1, 2, 3)}
    offloads[3] |= {"offload_parameters": "cpu"}
    cells = [("full", stage) for stage in offloads]
    train_all(cells, tmp_path, tiny_base, tiny_tokenizer, offloads)
    for method, stage in cells:
        offloaded = validation_losses(tmp_path / f"{method}-{stage}")
        assert offloaded == pytest.approx(
            validation_losses(run_dir_of(method, stage)), rel=1e-4 if stage == 2 else 2e-2
        )


@pytest.mark.parametrize(("method", "stage"), CELLS)
def test_the_export_loads(run_dir_of, method, stage):
    run_dir = run_dir_of(method, stage)
    export(TrainerConfig.model_validate(values(method, stage)), run_dir)
    whole = method.startswith(("full", "freeze"))
    loader = AutoModelForCausalLM if whole else AutoPeftModelForCausalLM
    model = loader.from_pretrained(run_dir / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) > 30_000


@pytest.mark.parametrize(("method", "stage"), CELLS)
def test_the_record_says_how_much_is_trained(run_dir_of, method, stage):
    result = json.loads((run_dir_of(method, stage) / "result.json").read_text())
    total, trained = result["num_parameters"], result["num_trained_parameters"]
    method = method.partition("+")[0]
    # Counted by hand: 37,792 weights of the base, rank 4 in its 14 linear layers, 4 prompt vectors of width 32.
    adapters = 2 * 4 * sum([32 + 32, 32 + 16, 32 + 16, 32 + 32, 32 + 64, 32 + 64, 64 + 32])
    expected = {"full": 37_792, "lora": adapters, "qlora": adapters, "prompt": 4 * 32}
    expected["dora"] = 2 * 4 * ((32 + 32) + (64 + 32)) + 2 * (32 + 32)
    expected["freeze"] = (37_792 - 2 * 300 * 32 - 32) // 2 + 300 * 32 + 32
    assert trained == expected[method]
    assert total == 37_792 + (0 if method in ("full", "freeze") else trained)


@pytest.mark.parametrize(("method", "stage"), REFUSED)
def test_what_does_not_work_is_refused_with_what_to_use_instead(method, stage):
    with pytest.raises(ValidationError, match="use stage 2"):
        TrainerConfig.model_validate(values(method, stage))


@pytest.mark.parametrize(
    ("training", "deepspeed", "message"),
    [
        ({"precision": "fp16"}, {"stage": 0}, "use stage 1"),
        (
            {"precision": "bf16"},
            {"stage": 0},
            "use stage 1, which sums them in fp32, or deepspeed.grad_accum_dtype: bf16",
        ),
        ({"precision": "fp32"}, {"grad_accum_dtype": "bf16"}, "training.precision is fp32: use fp32"),
        ({"precision": "bf16"}, {"grad_accum_dtype": "fp16"}, "training.precision is bf16: use fp32, or bf16"),
        ({"optimizer": "adamw_8bit"}, {"stage": 2, "offload_optimizer": "cpu"}, "use adamw"),
        ({"optimizer": "adamw_8bit", "min_workers": 1}, {}, "leave min_workers out"),
    ],
)
def test_what_deepspeed_can_not_do_is_refused(training, deepspeed, message):
    content = values("full", 2)
    content["training"] |= training
    content["deepspeed"] = deepspeed
    with pytest.raises(ValidationError, match=message):
        TrainerConfig.model_validate(content)


def test_a_tuned_prompt_needs_one_row_a_sequence():
    content = values("prompt", 2)
    content["data"]["packing"] = True
    with pytest.raises(ValidationError, match=r"set data\.packing to false"):
        TrainerConfig.model_validate(content)
