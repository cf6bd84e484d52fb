"""What is asked of Slurm is what the run needs: derived, compared with what is given, or asked back."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config import RunConfig, load_config
from launcher.errors import ConfigError
from launcher.submit import needs
from launcher.submit.commands import with_site
from launcher.submit.needs import notes, with_needs
from launcher.submit.script import Place, split_run, whole_run, whole_sweep
from tests.launcher.submit.small_runs import launcher

PLACE = Place(Path("/shared/runs/x"), Path("/home/me"), "python")
VLLM = {"type": "vllm", "model": "owner/judge"}


@pytest.fixture(autouse=True)
def _no_site_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def eight(repository: Path, nodes: int | None = None, **settings: Any) -> RunConfig:
    """configs/8b.yaml (8 workers of 8 threads, 8 engines, on GPUs) with other settings, as it is submitted."""
    own = {"judge": {"type": "reference"}} | {name.replace("__", "."): value for name, value in settings.items()}
    texts = [f"{name}={json.dumps(value)}" for name, value in own.items()]
    return with_site(load_config(repository / "configs/8b.yaml", texts), nodes)


def asked(config: RunConfig) -> tuple[int, str | None, int | None, str | None]:
    slurm = whole_run(config, PLACE)[0].slurm
    return slurm.nodes, slurm.gpus_per_node, slurm.cpus_per_node, slurm.mem


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1, "8", 64, None)),
        ({"training__threads_per_worker": 2}, (1, "8", 24, None)),  # the engines' 3 processes each
        ({"nodes": 2, "training__num_workers": 16}, (2, "8", 64, None)),
        ({"nodes": 4, "training__num_workers": 32, "generation__engines": 32}, (4, "8", 64, None)),
        ({"training__num_workers": 1, "generation__engines": 1}, (1, "1", 8, None)),
        # The largest stage decides: an engine over four GPUs, export's check on two, a judge, a jury's member.
        ({"training__num_workers": 1, "generation": {"tensor_parallel_size": 4}}, (1, "4", 8, None)),
        (
            {"training__num_workers": 1, "generation__engines": 1, "export__tensor_parallel_size": 2},
            (1, "2", 8, None),
        ),
        (
            {
                "training__num_workers": 1,
                "generation__engines": 1,
                "judge": VLLM | {"engines": 2, "tensor_parallel_size": 2},
            },
            (1, "4", 8, None),
        ),
        (
            {
                "training__num_workers": 1,
                "generation__engines": 1,
                "judge": {"type": "jury", "judges": [VLLM, VLLM | {"engines": 3}]},
            },
            (1, "3", 9, None),
        ),
        # What is given wins where it is enough; gres takes the place of gpus_per_node.
        ({"cluster__slurm": {"gpus_per_node": 8, "cpus_per_node": 96, "mem": 0}}, (1, "8", 96, "0")),
        ({"cluster__slurm": {"gres": "gpu:h100:8"}}, (1, None, 64, None)),
        ({"cluster__slurm": {"options": ["--gpus-per-task=8"]}}, (1, None, 64, None)),
        ({"cluster__slurm": {"exclusive": True}}, (1, "8", 64, "0")),
        # CPUs: workers times threads, and no GPUs.
        ({"cluster__device": "cpu"}, (1, None, 64, None)),
        ({"cluster__device": "cpu", "nodes": 2}, (2, None, 32, None)),
        ({"cluster__device": "auto", "cluster__slurm": {"gpus_per_node": 8}}, (1, "8", 64, None)),
    ],
)
def test_what_is_asked_of_each_node(
    settings: dict[str, Any], expected: tuple[int, str | None, int | None, str | None], repository: Path
) -> None:
    assert asked(eight(repository, **settings)) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        # The questions: a node of the job would have nothing to do.
        (
            {"nodes": 2},
            r"training.num_workers = 8 keeps 1 of 2 nodes busy .*set training.num_workers = 16 or cluster.slurm.nodes "
            r"= 1 \(--nodes 1\) or cluster.slurm.gpus_per_node = 4",
        ),
        (
            {"nodes": 2, "cluster__slurm": {"gpus_per_node": 8}},
            r"keeps 1 of 2 nodes busy and leaves the rest idle: set training.num_workers = 16 or .*--nodes 1\)$",
        ),
        (
            {"nodes": 3, "cluster__slurm": {"gres": "gpu:8"}},
            r"training.num_workers = 24 with training.global_batch_size a multiple of 24 \(it is 32\)",
        ),
        ({"nodes": 9, "cluster__device": "cpu"}, r"keeps 8 of 9 nodes busy"),
        ({"cluster__device": "auto"}, r"give cluster.slurm.gpus_per_node, or cluster.device: cuda or cpu"),
        # Too small.
        (
            {"cluster__slurm": {"gpus_per_node": 4}},
            r"training.num_workers = 8 \(1 GPU each\) needs 8 GPUs of the node .*gpus_per_node asks for 4",
        ),
        ({"cluster__slurm": {"gpus_per_node": 0}}, r"gpus_per_node asks for 0"),
        ({"cluster__slurm": {"gres": "gpu:a100:4"}}, r"cluster.slurm.gres asks for 4"),
        ({"cluster__slurm": {"cpus_per_node": 32}}, r"\(8 CPUs each\) needs 64 CPUs of the node"),
        # An engine and export's check never span nodes.
        (
            {
                "nodes": 2,
                "training__num_workers": 8,
                "generation": {"engines": 1, "tensor_parallel_size": 8},
                "cluster__slurm": {"gpus_per_node": 4},
            },
            r"generation.engines = 1 \(8 GPUs each\) needs 8 GPUs of each node",
        ),
        (
            {"nodes": 2, "export__tensor_parallel_size": 8, "cluster__slurm": {"gpus_per_node": 4}},
            r"export.tensor_parallel_size = 8 needs 8 GPUs of each node",
        ),
    ],
)
def test_what_is_refused_or_asked_back(settings: dict[str, Any], said: str, repository: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        asked(eight(repository, **settings))


def test_every_need_that_is_not_covered_is_named(repository: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        asked(eight(repository, cluster__slurm={"gpus_per_node": 4, "cpus_per_node": 8}))
    assert [line.partition(" =")[0] for line in str(refused.value).splitlines()] == [
        "training.num_workers",
        "training.num_workers",
        "generation.engines",
    ]


def test_split_jobs_ask_for_their_own_stages(repository: Path) -> None:
    config = eight(
        repository,
        nodes=2,
        training__num_workers=16,
        cluster__slurm={"gpus_per_node": 8},
        cluster__stages={"judge": {"cpus": 2}},
    )
    jobs = {script.name: script.slurm for script in split_run(config, PLACE)}
    got = {name: (slurm.nodes, slurm.gpus_per_node, slurm.cpus_per_node) for name, slurm in jobs.items()}
    assert got == {
        "prepare": (1, None, 1),
        "train": (2, "8", 64),
        "generate": (1, "8", 24),  # eight engines fit on one of the two nodes
        "judge": (1, None, 2),  # the reference judge needs no GPU
        "report": (1, None, 1),
    }
    refused = eight(repository, judge=VLLM, cluster__stages={"judge": {"gpus": 0}})
    with pytest.raises(ConfigError, match=r"judge.engines = 1 \(1 GPU each\) needs 1 GPU"):
        split_run(refused, PLACE)


def test_a_sweeps_tasks_ask_for_the_largest_member(repository: Path) -> None:
    members = {
        f"{workers}": eight(repository, training__num_workers=workers, generation__engines=1) for workers in (2, 8, 4)
    }
    array, compare = whole_sweep(members["2"], PLACE, members)
    assert (array.slurm.gpus_per_node, array.slurm.cpus_per_node) == ("8", 64)
    assert (compare.slurm.gpus_per_node, compare.slurm.cpus_per_node) == (None, 1)


def test_engines_that_leave_most_gpus_idle_are_noted(repository: Path) -> None:
    config = eight(repository, generation__engines=1, judge=VLLM | {"tensor_parallel_size": 2})
    slurm = config.cluster.slurm
    assert slurm is not None
    assert notes(config, with_needs(config, slurm)) == [
        "asks for 1 node with 8 GPUs and 64 CPUs",
        "generation.engines = 1 uses 1 of 8 GPUs; 8 engines would use 8",
        "judge.engines = 1 uses 2 of 8 GPUs; 4 engines would use 8",
    ]


def test_a_run_on_cpus_hands_out_no_gpu(repository: Path) -> None:
    """Engines take GPUs wherever Ray has some, and the batch of a site may come with them."""
    slurm = {"gres": "gpu:8"}
    texts = [
        whole_run(eight(repository, cluster__device=device, cluster__slurm=slurm), PLACE)[0].text
        for device in ("cpu", "cuda")
    ]
    assert ["--no-gpus" in text for text in texts] == [True, False]
    assert ["--gres=gpu:8" in text for text in texts] == [True, True]


def test_gpus_are_counted_in_every_form() -> None:
    assert doctest.testmod(needs).failed == 0


def test_submit_names_every_problem_at_once_and_ends_with_status_2(repository: Path, tmp_path: Path) -> None:
    words = ["--nodes", "2", "--run-dir", tmp_path / "run", "--set", f"data.path={tmp_path}/missing.json"]
    refused = launcher("submit", "slurm", repository / "configs/8b.yaml", *words, cwd=tmp_path)
    assert refused.returncode == 2
    assert "training.num_workers = 8 keeps 1 of 2 nodes busy" in refused.stderr
    assert f"there is no file or folder {tmp_path}/missing.json" in refused.stderr
    assert refused.stderr.splitlines()[-1] == "nothing was submitted"
    assert list(tmp_path.iterdir()) == []
