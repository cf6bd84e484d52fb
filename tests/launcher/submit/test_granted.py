"""On a login node: what Slurm is asked for counts, and not the machine that submits."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import plan
from launcher.config import RunConfig, load_config
from launcher.errors import ConfigError
from launcher.gpus import MIB
from launcher.submit import granted
from launcher.submit.commands import with_site
from launcher.submit.config import StagesConfig
from launcher.submit.granted import slurm_resources
from tests.launcher.stand_in_gpus import driver, h100s

UNSEEN = plan.FirstLook()  # of a check that is not about rows


@pytest.fixture(autouse=True)
def _no_site_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def eight(repository: Path, **slurm: Any) -> RunConfig:
    """configs/8b.yaml as it is submitted, with these keys of cluster.slurm."""
    own = [f"cluster.slurm={json.dumps(slurm)}", f"data.path={repository / 'README.md'}", "cluster.device=auto"]
    return with_site(load_config(repository / "configs/8b.yaml", own), None)


@pytest.mark.parametrize(
    ("slurm", "kind", "mib"),
    [
        ({"gpus_per_node": "h100:8"}, "h100", 81_559),
        ({"gres": "gpu:h200:8,nvme:1"}, "h200", 143_771),
        ({"gpus_per_node": 8, "constraint": "a100&ib"}, "a100", 40_960),
        ({"gpus_per_node": 8, "constraint": "a100-80|h100"}, "a100-80, h100", 81_559),
        ({"gpus_per_node": "gpu-large:8"}, "gpu-large", None),
        ({"gpus_per_node": 8}, "", None),
    ],
)
def test_memory_is_known_by_type(repository: Path, slurm: dict[str, Any], kind: str, mib: int | None) -> None:
    found = slurm_resources(eight(repository, cpus_per_node=96, **slurm))
    assert (found.num_gpus, found.num_cpus, found.gpu_kind) == (8, 96, kind)
    assert found.gpu_memory == (None if mib is None else mib * MIB)


def test_plan_reckons_with_the_jobs_nodes(repository: Path, tmp_path: Path) -> None:
    config = eight(repository, nodes=1, gpus_per_node="h100:8", cpus_per_node=96)
    plan.check(config, look=UNSEEN)
    lines = plan.describe(config, tmp_path).splitlines()
    assert "resources  cluster.slurm: a node has 8 GPUs and 96 CPUs; GPU h100, 79.6 GiB" in lines
    assert any(line.startswith("training   full, 8 GPU workers") for line in lines)
    assert any("4 engines on 8 GPUs" in line and "has 69.5 GiB" in line for line in lines)


def test_what_the_jobs_gpus_cannot_hold_is_refused(repository: Path) -> None:
    config = eight(repository, nodes=2, gpus_per_node="l4:4", cpus_per_node=48)
    with pytest.raises(ConfigError) as caught:
        plan.check(config, look=UNSEEN)
    found = str(caught.value)
    assert "judge: an engine for Qwen/Qwen3-32B needs" in found
    assert "of 22.5 GiB; what fits: judge.tensor_parallel_size=4 judge.engines=2" in found
    named = config.model_copy(update={"cluster": config.cluster.model_copy(update={"gpu_memory_gib": 80})})
    plan.check(named, look=UNSEEN)


def test_an_unknown_type_is_said(repository: Path, tmp_path: Path) -> None:
    lines = plan.describe(eight(repository, gpus_per_node="fastgpu:8"), tmp_path)
    assert "; GPU fastgpu, whose memory is not known (cluster.gpu_memory_gib names it)" in lines
    assert "what a GPU has is not known: cluster.gpu_memory_gib names it" in lines


def test_stages_with_gpus_of_their_own_leave_it_open(repository: Path) -> None:
    config = eight(repository, gpus_per_node="l4:8", cpus_per_node=64)
    other = StagesConfig.model_validate({"judge": {"gpus": "h100:8"}})
    split = config.model_copy(update={"cluster": config.cluster.model_copy(update={"stages": other})})
    assert slurm_resources(split).gpu_memory is None
    plan.check(split, look=UNSEEN)


def test_what_a_card_cannot_do_is_refused_where_it_is_submitted(repository: Path) -> None:
    with pytest.raises(ConfigError, match=r"bf16 needs GPUs of compute capability 8\.0 or more .* these have 7\.0"):
        plan.check(eight(repository, gpus_per_node="v100-32:8", cpus_per_node=64), ["train"])


def planned(config: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`launcher plan` in a process of its own, and the heavy modules that it loaded as the last line."""
    program = (
        "import sys; from launcher.cli import app; app(['plan', sys.argv[1]], standalone_mode=False); "
        "print('loaded', sorted({'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(config)]
    return subprocess.run(command, env=os.environ | variables, cwd=folder, capture_output=True, text=True, check=False)


def test_plan_loads_nothing_heavy_and_needs_no_hub(repository: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((repository / "configs/8b.yaml").read_text())
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 150))
    tree["data"]["path"] = str(tmp_path / "rows.json")
    tree["cluster"] |= {"slurm": {"gpus_per_node": "h100:8", "cpus_per_node": 64}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    # The login node has a GPU of its own, which does not count.
    other = driver(tmp_path, f"NVIDIA T4;GPU-1;{15_360 * MIB};7;5")
    answer = planned(tmp_path / "run.yaml", tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"), **other)
    assert answer.returncode == 0, answer.stderr
    assert "weights    8,030,261,248" in answer.stdout
    assert "resources  cluster.slurm: a node has 8 GPUs and 64 CPUs; GPU h100, 79.6 GiB" in answer.stdout
    assert "#SBATCH --gpus-per-node=h100:8" in answer.stdout
    assert answer.stdout.splitlines()[-1] == "loaded []"


def test_plan_of_a_workstation_counts_its_own_gpus(repository: Path, tmp_path: Path) -> None:
    answer = planned(repository / "configs/8b.yaml", tmp_path, **driver(tmp_path, *h100s(8)))
    assert "this machine has 8 GPUs and " in answer.stdout
    assert "GPU NVIDIA H100 80GB HBM3, 79.6 GiB" in answer.stdout


def test_the_examples_hold() -> None:
    assert doctest.testmod(granted).failed == 0
