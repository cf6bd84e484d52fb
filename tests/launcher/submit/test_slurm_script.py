"""The sbatch script as text: recorded, quoted, valid bash, without secrets. No Slurm is needed."""

from __future__ import annotations

import doctest
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config import RunConfig, load_config
from launcher.errors import ConfigError, LauncherError
from launcher.submit import config as submit_config
from launcher.submit import sweep
from launcher.submit.commands import with_site
from launcher.submit.script import (
    Place,
    check_job,
    parts_of,
    passed_names,
    resources_of,
    split_run,
    whole_run,
    whole_sweep,
)
from launcher.submit.slurm import parse_job

RECORDED = Path(__file__).parent / "recorded"
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "exclusive": {
        "nodes": 4,
        "account": "project-1",
        "partition": "gpu",
        "qos": "high",
        "constraint": "a100&nvlink",
        "time": "1-12:00:00",
        "gpus_per_node": "a100:8",
        "cpus_per_node": 64,
        "mem": "0",
        "exclusive": True,
        "options": ["--reservation=night", "--mail-type=END"],
        "modules": ["cuda/12.8", "gcc/13"],
        "environment": {"HF_HOME": "/shared/it's here", "NCCL_DEBUG": "WARN"},
        "pass_environment": ["WANDB_API_KEY"],
        "setup": ["ulimit -n 65536"],
        "interface": "ib0",
    },
    "apptainer": {
        "container": {"type": "apptainer", "image": "/images/tune lift.sif", "mounts": ["/data:/data:ro"]},
        "gpus_per_node": "8",
    },
    "pyxis": {"container": {"type": "pyxis", "image": "registry.example.org#team/tunelift:1", "mounts": ["/data"]}},
    "no_requeue": {"max_requeues": 0, "signal_s": 60},
}
WORKERS = {"exclusive": 32, "apptainer": 8}  # on GPUs; the other cases have two workers on CPUs


@pytest.fixture
def base(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return load_config(repository / "configs/quickstart.yaml", ["cluster.device=cpu"])


def asking(
    base: RunConfig, slurm: dict[str, Any], stages: dict[str, Any] | None = None, workers: int | None = None
) -> RunConfig:
    tree = base.model_dump(mode="json")
    tree["cluster"] |= {"slurm": slurm, "stages": stages or {}}
    if workers is not None:  # on GPUs
        tree["training"] |= {"num_workers": workers, "global_batch_size": workers * 3}
        tree["cluster"]["device"] = "cuda"
    return RunConfig.model_validate(tree)


def place(run_dir: str = "/shared/runs/quickstart", working_folder: str = "/home/me/project") -> Place:
    return Place(Path(run_dir), Path(working_folder), "/shared/venv/bin/python")


def rendered(
    config: RunConfig, run_dir: str = "/shared/runs/quickstart", working_folder: str = "/home/me/project"
) -> str:
    return whole_run(config, place(run_dir, working_folder))[0].text


def same_as_recorded(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        recorded = RECORDED / f"{name}.sh"
        assert recorded.is_file(), f"no record of {name}; if this is right, write it to {recorded}:\n{text}"
        assert text == recorded.read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_the_script_is_as_recorded(case: str, base: RunConfig) -> None:
    same_as_recorded({case: rendered(asking(base, CASES[case], workers=WORKERS.get(case)))})


def test_a_sweep_is_an_array_and_a_comparison_after_it(base: RunConfig) -> None:
    asked = CASES["apptainer"] | {"gpus_per_node": "4", "nodes": 2}
    config = asking(base, asked, {"report": {"partition": "cpu"}}, workers=8)
    members = [sweep.member_name(n, [f"training.lr={lr}"]) for n, lr in enumerate(("1e-5", "2e-5", "4e-5"), start=1)]
    array, compare = whole_sweep(config, place(), dict.fromkeys(members, config), at_once=2)
    assert (array.after, compare.after, compare.slurm.nodes, compare.slurm.partition) == ("", "afterany", 1, "cpu")
    same_as_recorded({"sweep_members": array.text, "sweep_compare": compare.text})


def test_split_stages_are_jobs_that_wait_for_each_other(base: RunConfig) -> None:
    slurm = {"nodes": 4, "partition": "gpu", "gpus_per_node": "8", "exclusive": True, "time": "8:00:00"}
    stages = {
        "prepare": {"cpus": 32, "memory": "64G", "partition": "cpu", "time": "30"},
        "generate": {"nodes": 1, "gpus": "a100:2"},
        "judge": {"nodes": 1, "cpus": 2, "gpus": "0", "partition": "cpu", "exclusive": False},
    }
    config = asking(base, slurm, stages, workers=32)
    scripts = split_run(config, place())
    assert [script.stages for script in scripts] == parts_of(config)
    assert parts_of(config) == [("prepare",), ("train", "export"), ("generate",), ("judge",), ("report",)]
    assert [script.after for script in scripts] == ["", *["afterok"] * 4]
    same_as_recorded({f"split_{script.name}": script.text for script in scripts})
    asked = {script.name: script.slurm for script in scripts}
    assert asked["prepare"].gpus_per_node is asked["report"].gpus_per_node is None
    assert asked["judge"].gpus_per_node == "0"
    assert "gpus-per-node" not in next(script.text for script in scripts if script.name == "judge")
    assert (asked["train"].nodes, asked["generate"].nodes, asked["report"].nodes) == (4, 1, 1)
    assert parts_of(base) == [("prepare",), ("train", "export"), ("generate", "judge"), ("report",)]
    # What is done already is not queued again, and the first that is left waits for nothing.
    left = split_run(config, place(), ["generate", "judge", "report"])
    assert [(script.name, script.after) for script in left] == [
        ("generate", ""),
        ("judge", "afterok"),
        ("report", "afterok"),
    ]
    with pytest.raises(ConfigError, match=r"cluster.stages.train, laid over cluster.slurm: time .* leaves nothing"):
        resources_of(asking(base, slurm, {"train": {"time": "5"}}), ("train", "export"))


def test_each_job_is_held_against_its_own_stages(base: RunConfig) -> None:
    config = asking(base, {"cpus_per_node": 2}, {"prepare": {"cpus": 1}, "train": {"cpus": 1}})
    check_job(config, ("prepare",), split=True)
    with pytest.raises(ConfigError, match=r"training.num_workers = 2 \(1 CPU each\) needs 2 CPUs of the node"):
        check_job(config, ("train", "export"), split=True)


@pytest.mark.parametrize("script", sorted(RECORDED.glob("*.sh")), ids=lambda path: path.stem)
def test_the_script_is_valid(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_image_is_built_from_files_that_are_there(repository: Path) -> None:
    sections = re.split(r"^%(\w+)\n", (repository / "slurm/apptainer.def").read_text(), flags=re.MULTILINE)
    named = dict(zip(sections[1::2], sections[2::2], strict=True))
    copied = {line.split()[0] for line in named["files"].strip().splitlines()}
    assert all((repository / name).exists() for name in copied)
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    needed = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    assert copied >= needed | {"pyproject.toml", "requirements-cuda.lock", project["project"]["readme"]}
    for section in ("post", "environment", "runscript", "test"):
        assert subprocess.run(["sh", "-n"], input=named[section], text=True, check=False).returncode == 0


# What a shell would act on: quotes, expansions, separators, comments, spaces, patterns.
awkward = st.text(alphabet="ab '\"$`(){}[];&|<>#!*?~=@-", min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(folder=awkward, value=awkward)
def test_no_path_and_no_value_is_read_by_the_shell(folder: str, value: str) -> None:
    repository = Path(__file__).parents[3]
    base = load_config(repository / "configs/quickstart.yaml", ["cluster.device=cpu"])
    run_dir = f"/runs/{folder}/x"
    text = rendered(asking(base, {"environment": {"GREETING": value}}), run_dir, working_folder="/")
    # Bash itself reads the script up to where Ray would be started, with harmless functions in place of the commands.
    head = text[: text.index('say "starting Ray')]
    show = 'printf "%s\\0" "$folder" "$GREETING"'
    stubs = "mkdir() { :; }; rm() { :; }; od() { :; }; umask() { :; }; exec 3>&1;"
    script = f"{stubs} SLURM_JOB_ID=7; {head.replace(chr(62) + chr(34) + '$folder/token' + chr(34), '')}\n{show}"
    answer = subprocess.run(["bash", "-c", script], capture_output=True, check=False)
    assert answer.stdout.split(b"\0")[:2] == [f"{run_dir}/slurm/7.0".encode(), value.encode()], answer.stderr


@pytest.mark.parametrize("path", ["/runs/100%", "/runs/a\\b", "/runs/a\nb"])
def test_a_path_that_slurm_would_rewrite_is_refused(path: str, base: RunConfig) -> None:
    with pytest.raises(ConfigError, match="choose another folder"):
        rendered(base, run_dir=path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"partition": "gpu --wrap=evil"}, "partition"),
        ({"account": 'a"b'}, "account"),
        ({"options": ["reservation=x"]}, "options"),
        ({"setup": ["a\n#SBATCH --x"]}, "setup"),
        ({"environment": {"OPENAI_API_KEY": "sk-1"}}, "name it in pass_environment"),
        ({"environment": {"A B": "1"}}, "environment"),
        ({"node_folder": "/local/scratch/of/this/very/long/site"}, "Unix socket"),
        ({"time": "5:00", "signal_s": 300}, "leaves nothing to work in"),
        ({"partitions": "gpu"}, "did you mean cluster.slurm.partition?"),
        ({"time": 5400}, "put the time in quotes"),  # what YAML makes of 1:30:00
        ({"gpus_per_node": 8, "gres": "gpu:8"}, "give one of them"),
    ],
)
def test_what_would_break_the_script_is_refused(
    wrong: dict[str, Any], said: str, base: RunConfig, tmp_path: Path
) -> None:
    tree = base.model_dump(mode="json")
    tree["cluster"]["slurm"] = wrong
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        load_config(tmp_path / "run.yaml")


def test_only_names_of_variables_are_passed(base: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "value-of-the-secret")
    tree = asking(base, {"pass_environment": ["WANDB_API_KEY"]}).model_dump(mode="json")
    tree["judge"] = {"type": "api", "model": "m", "base_url": "http://localhost:1/v1", "api_key_env": "MY_KEY"}
    config = RunConfig.model_validate(tree)
    assert {"WANDB_API_KEY", "MY_KEY"} <= set(passed_names(config))
    assert "SWANLAB_API_KEY" not in passed_names(config)
    tree["training"] |= {"trackers": ["swanlab"]}
    assert "SWANLAB_API_KEY" in passed_names(RunConfig.model_validate(tree))
    assert "value-of-the-secret" not in rendered(config)


def test_the_site_file_lies_under_the_configuration(base: RunConfig, tmp_path: Path) -> None:
    site = tmp_path / "config/tunelift/slurm.yaml"
    site.parent.mkdir(parents=True)
    site.write_text("partition: site\naccount: site\nnodes: 3\ngpus_per_node: 8\n", encoding="utf-8")
    slurm = with_site(asking(base, {"partition": "mine"}), nodes=None).cluster.slurm
    assert slurm is not None
    assert (slurm.partition, slurm.account, slurm.nodes, slurm.gpus_per_node) == ("mine", "site", 3, "8")
    other = with_site(asking(base, {"gres": "gpu:a100:4"}), nodes=None).cluster.slurm
    assert other is not None
    assert (other.gpus_per_node, other.gres) == (None, "gpu:a100:4")
    more = with_site(asking(base, {"partition": "mine"}), nodes=5).cluster.slurm
    assert more is not None
    assert more.nodes == 5
    site.write_text("partitoin: site\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"slurm\.yaml.*\n.*partitoin"):
        with_site(base, nodes=None)


@pytest.mark.parametrize(
    ("line", "state", "code", "restarts"),
    [
        ("JobId=7 JobState=RUNNING Reason=None Restarts=0 ExitCode=0:0 DerivedExitCode=0:0", "RUNNING", 0, 0),
        ("JobId=7 JobName=x JobState=FAILED Reason=NonZeroExitCode Restarts=2 ExitCode=75:0", "FAILED", 75, 2),
        ("JobState=CANCELLED Reason=None Restarts=0 ExitCode=0:15", "CANCELLED", 143, 0),
    ],
)
def test_slurms_answer_is_read(line: str, state: str, code: int, restarts: int) -> None:
    found = parse_job(line)
    assert (found.state, found.exit_code, found.restarts) == (state, code, restarts)
    with pytest.raises(LauncherError, match="unknown form"):
        parse_job("slurm_load_jobs error")


def test_the_examples_of_time_limits_hold() -> None:
    assert doctest.testmod(submit_config).failed == doctest.testmod(sweep).failed == 0
