"""Every family that transformers and vLLM share: prepared, trained for 5 steps on two ranks, exported, compared."""

import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.trainer.families import FAMILIES, MIXTURES, build, five_steps
from trainer.base_problems import base_problems
from trainer.config import TrainerConfig
from trainer.export import check
from trainer.export.stage import export
from trainer.prepare import prepare

pytestmark = pytest.mark.slow
WITHOUT_ADAPTERS = ("gpt2", *MIXTURES)  # on a CPU
CELLS = [
    (family, method) for family in FAMILIES for method in ("full", "merged" if family in WITHOUT_ADAPTERS else "lora")
]


def values(base: Path, method: str) -> dict:
    return {
        "model": {"name_or_path": str(base)},
        "data": {"path": str(base.parent / "rows.json"), "sequence_length": 250},
        "tuning": {"method": "full"} if method == "full" else {"method": "lora", "rank": 4},
        "training": five_steps(1e-3 if method == "full" else 1e-2),
        "deepspeed": {"stage": 2},
        "export": {"vllm_prompts": 8, "merge": method == "merged"},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_tokenizer):
    """A folder with a run for each cell, all trained by one pair of processes."""
    folder = tmp_path_factory.mktemp("families")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"instruction": f"Say {n} and {word}.", "input": "", "output": f"{word} {n}"}
        for n in range(12)
        for word in words
    ]
    (folder / "bases").mkdir()
    (folder / "bases" / "rows.json").write_text(json.dumps(rows))
    for family, method in CELLS:
        base = folder / "bases" / family
        if not base.exists():
            build(family, tiny_tokenizer, base)
        run_dir = folder / "runs" / f"{family}-{method}"
        prepare(TrainerConfig.model_validate(values(base, method)), run_dir)
        (run_dir / "cell.json").write_text(json.dumps(values(base, method)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("matrix_worker.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, script, str(folder / "runs")], check=True, timeout=560, env=environment)
    return folder


@pytest.fixture(scope="module")
def two_engines():
    """vLLM in two processes that stay: loading it takes longer than a tiny model; experts need groups of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
        }.items():
            patch.setenv(name, value)
        spawn = get_context("spawn")
        pools = {mixture: ProcessPoolExecutor(1, mp_context=spawn) for mixture in (False, True)}

        def run_in_child(_name, asked, **_options):
            from trainer.export.ask_vllm import answer

            mixture = any(name in asked["model"] for name in MIXTURES)
            return pools[mixture].submit(answer, asked).result(timeout=300)

        patch.setattr(check, "run_in_child", run_in_child)
        yield
        for pool in pools.values():
            pool.shutdown()


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_it_learns_and_vllm_answers_as_trained(trained, two_engines, family, method):
    run_dir = trained / "runs" / f"{family}-{method}"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    first, last = [row["loss"] for row in rows if row["kind"] == "validation"]
    counts = export(TrainerConfig.model_validate(values(trained / "bases" / family, method)), run_dir)
    print(json.dumps({"cell": f"{family} {method}", "losses": [first, last], **counts}))
    assert last < first - 0.1
    assert counts["kind"] == ("adapter" if method == "lora" else "weights")
    assert counts["exported_loss"] == pytest.approx(last, abs=1e-4)
    assert counts["vllm"]["num_prompts"] == 8
    assert counts["vllm"]["disagreements"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_refused_where_vllm_does_not_serve_it(trained, family):
    base = trained / "bases" / family
    config = TrainerConfig.model_validate(values(base, "lora"))
    found = base_problems(base, config.tuning, config.export, served=True, on_gpu=False)
    assert bool(found) == (family in WITHOUT_ADAPTERS)
