"""Every configuration that is shipped loads, fits the hardware that it names, and becomes a batch script."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launcher.config import RunConfig, load_config
from launcher.plan import problems
from launcher.submit.commands import with_site
from launcher.submit.needs import gpus_asked
from launcher.submit.script import Place, split_run, whole_run

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
# GPUs that the file asks for in all, and the memory of each, in GiB, that its first line names. The others run on CPUs.
HARDWARE = {
    "8b": (8, 80),
    "8b-lora": (1, 80),
    "8b-qlora": (1, 24),
    "70b-qlora": (8, 80),
    "8b-2-nodes-slurm": (16, 80),
}


@pytest.fixture(autouse=True)
def _a_submitting_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("OPENAI_API_KEY", "a stand-in")


def submitted(path: Path, folder: Path, *more: str) -> RunConfig:
    """As it is submitted to Slurm, with data that is here; what the job asks for stands in for the hardware."""
    (folder / "data.json").write_text('[{"instruction": "a", "input": "", "output": "b"}]')
    _, memory = HARDWARE.get(path.stem, (0, 0))
    own = [f"cluster.gpu_memory_gib={memory}"] if memory else ["cluster.device=cpu"]
    return with_site(load_config(path, [f"data.path={folder}/data.json", *own, *more]), None)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_plans_and_renders(path: Path, tmp_path: Path) -> None:
    config = submitted(path, tmp_path)
    assert problems(config) == []
    place = Place(Path("/shared/runs/x"), Path("/home/me"), "python")
    (script,) = whole_run(config, place)
    gpus, _ = HARDWARE.get(path.stem, (0, 0))
    assert script.slurm.nodes * (gpus_asked(script.slurm) or 0) == gpus
    for text in (script.text, *(part.text for part in split_run(config, place))):
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_what_the_first_line_rules_out_is_refused(tmp_path: Path) -> None:
    path = next(path for path in CONFIGS if path.stem == "70b-qlora")
    found = problems(submitted(path, tmp_path, "cluster.gpu_memory_gib=40"))
    assert any("GiB" in line and line.startswith("training") for line in found), found
    alone = problems(submitted(path, tmp_path, "generation.tensor_parallel_size=1", "generation.engines=8"))
    assert any(line.startswith("generation") for line in alone), alone
