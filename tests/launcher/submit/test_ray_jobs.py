"""Runs as jobs of a Ray cluster of three nodes on this machine, one of which is killed."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.job_submission import JobDetails
from typer.testing import CliRunner

from launcher import cli
from launcher.config import RunConfig, load_config
from launcher.errors import LauncherError
from launcher.submit import ray_jobs
from launcher.submit.node import Node, ray_command
from launcher.submit.sweep import members_of
from tests.launcher.submit.small_runs import configure, launcher, train_rows, until


def test_only_this_packages_files_and_the_configuration_are_sent(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "checkout"
    for name, content in {
        "launcher/__init__.py": "",
        "launcher/.env": "SECRET=1",
        "launcher/id_rsa": "key",
        "launcher/.git/config.py": "",
        "launcher/server.pem": "key",
        "trainer/a.py": "",
        "slurm/run.sh": "",
        "runs/data.json": "{}",
    }.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(content)
    monkeypatch.setattr(ray_jobs.launcher, "__file__", str(top / "launcher/__init__.py"))
    config = load_config(repository / "configs/quickstart.yaml")
    (tmp_path / "packed").mkdir()
    files = ray_jobs.package(config, tmp_path / "packed")
    assert [name for name, _ in files] == ["config.yaml", "launcher/__init__.py", "slurm/run.sh", "trainer/a.py"]
    (top / "trainer/large.py").write_bytes(b"#" * (ray_jobs.LIMIT_BYTES + 1))
    (tmp_path / "second").mkdir()
    with pytest.raises(LauncherError, match=r"the limit is 10,485,760; largest: trainer/large\.py"):
        ray_jobs.package(config, tmp_path / "second")


def test_paths_mean_the_same_on_the_cluster(repository: Path, tmp_path: Path) -> None:
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    given = "model={name_or_path: base, adapter: adapter}"
    config = load_config(repository / "configs/quickstart.yaml", ["run.storage=runs", given])
    moved = ray_jobs.made_absolute(config, tmp_path)
    assert str(moved.run.storage) == f"{tmp_path}/runs"
    assert str(moved.data.path) == f"{tmp_path}/runs/quickstart-data.json"
    assert moved.model.name_or_path == f"{tmp_path}/base"
    assert moved.model.adapter == f"{tmp_path}/adapter"
    tree = config.model_dump(mode="json") | {"model": {"name_or_path": "owner/name"}}
    assert ray_jobs.made_absolute(RunConfig.model_validate(tree), tmp_path).model.name_or_path == "owner/name"


def test_every_local_model_and_folder_is_found_on_the_cluster(repository: Path, tmp_path: Path) -> None:
    for name in ("rival", "adapter", "judge", "tasks"):
        (tmp_path / name).mkdir()
    generation = "generation={models: {rival: {path: rival, adapter: adapter}, far: owner/name}"
    generation += ", lm_eval: {tasks: [mine], include_path: tasks}}"
    judge = "judge={type: jury, judges: [{type: vllm, model: judge}, {type: vllm, model: owner/judge}]}"
    config = load_config(repository / "configs/quickstart.yaml", [generation, judge])
    moved = ray_jobs.made_absolute(config, tmp_path)
    rival, far = moved.generation.models["rival"], moved.generation.models["far"]
    assert (rival.path, rival.adapter, far.path) == (f"{tmp_path}/rival", f"{tmp_path}/adapter", "owner/name")
    assert moved.generation.lm_eval.include_path == f"{tmp_path}/tasks"
    assert [member.model for member in moved.judge.judges] == [f"{tmp_path}/judge", "owner/judge"]


def test_paths_of_a_sweep_mean_the_same_on_the_cluster(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    config = configure(tmp_path, repository)
    words = ["data.path=a.json,sets/b.json, c.json", "model={name_or_path: base},{name_or_path: owner/name}"]
    words += ["training.lr=1e-3,2e-3"]
    moved = ray_jobs.absolute_words(words, members_of(config, [], words), tmp_path)
    assert moved[0] == f'data.path="{tmp_path}/a.json","{tmp_path}/sets/b.json","{tmp_path}/c.json"'
    assert moved[2] == words[2]
    members = members_of(config, [], moved)
    assert len(members) == 12
    assert str(members[0].config.data.path) == f"{tmp_path}/a.json"
    assert members[0].config.model.name_or_path == f"{tmp_path}/base"
    assert members[2].config.model.name_or_path == "owner/name"
    assert members[0].name.startswith("1-path-a.json-model-")


def test_no_secret_goes_with_a_job(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "value-of-the-secret")
    judge = "judge={type: api, model: m, base_url: 'http://localhost:1/v1', api_key_env: MY_KEY}"
    config = load_config(repository / "configs/quickstart.yaml", [judge])
    (tmp_path / "packed").mkdir()
    files = ray_jobs.package(config, tmp_path / "packed")

    class Client:
        sent: dict[str, Any]

        def list_jobs(self) -> list[JobDetails]:
            return []

        def submit_job(self, **sent: Any) -> str:
            self.sent = sent
            return str(sent["submission_id"])

    client = Client()
    words = ["--sweep", "training.lr=1e-5,2e-5"]
    job = ray_jobs.submit(client, config, Path("/runs/it's a"), tmp_path / "packed", "python", words)  # type: ignore
    assert job.startswith("quickstart-")
    packed = "".join((tmp_path / "packed" / name).read_text(errors="replace") for name, _ in files)
    assert "value-of-the-secret" not in packed + str(client.sent)
    assert client.sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
    assert shlex.split(client.sent["entrypoint"])[1:] == [
        *("python", "-m", "launcher", "run", "config.yaml", "--run-dir", "/runs/it's a"),
        *("--set", "cluster.address=auto", *words),
    ]


def test_the_job_runs_the_whole_sweep(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    class Client:
        def list_jobs(self) -> list[JobDetails]:
            return []

        def submit_job(self, **job: Any) -> str:
            sent.update(job)
            return "job"

    monkeypatch.setattr(ray_jobs, "connected", lambda _: nullcontext(Client()))
    monkeypatch.chdir(tmp_path)
    typed = [str(configure(tmp_path, repository)), "--sweep", "training.lr=1e-3,2e-3", "data.path=a.json"]
    submitted = CliRunner().invoke(cli.app, ["submit", "ray", *typed, "--address", "http://head:1", "--detach"])
    assert submitted.exit_code == 0, submitted.output
    told: list[list[str]] = []
    monkeypatch.setattr(cli, "_sweep", lambda config, set_, run_dir, words, **_: told.append(words))
    words = shlex.split(sent["entrypoint"])
    taken = CliRunner().invoke(cli.app, words[words.index("launcher") + 1 :])
    assert taken.exit_code == 0, taken.output
    assert told == [["training.lr=1e-3,2e-3", f'data.path="{tmp_path}/a.json"']]


@dataclass
class RayCluster:
    """A head without CPUs for others, and three more nodes of one CPU each."""

    folder: Path
    environment: dict[str, str]
    gcs: str
    dashboard: str
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_node(self, *further: str) -> subprocess.Popen[bytes]:
        number = len(self.nodes)
        node = Node("127.0.0.1", "lo", num_cpus=min(1, number), num_gpus=0)
        command = ray_command(node, self.gcs, is_head=number == 0, folder=self.folder / f"n{number}")
        command = [word for word in command if not (further and word.startswith("--include-dashboard"))]
        with (self.folder / f"n{number}.log").open("wb") as log:
            started = subprocess.Popen([*command, *further], env=self.environment, stdout=log, stderr=log)
        self.nodes.append(started)
        until(lambda: "Ray runtime started." in self.log(number), 60, lambda: self.log(number))
        return started

    def heal(self) -> None:
        """Start nodes until three are alive beside the head."""
        while sum(node.poll() is None for node in self.nodes[1:]) < 3:
            self.start_node()

    def kill_raylet(self, of: str) -> bool:
        """Kill the raylet of a node where such a process runs, if there is one."""
        for node in self.nodes[1:]:
            for process in _family(node.pid) if _runs(node.pid, of) else []:
                with suppress(psutil.NoSuchProcess):
                    if process.name() == "raylet":
                        process.kill()
                        return True
        return False

    def busy(self, of: str) -> bool:
        """Whether such a process runs on any node but the head."""
        return any(_runs(node.pid, of) for node in self.nodes[1:])

    def log(self, number: int) -> str:
        return (self.folder / f"n{number}.log").read_text(errors="replace")

    def stop(self) -> None:
        family = [process for node in self.nodes if psutil.pid_exists(node.pid) for process in _family(node.pid)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[RayCluster]:
    with tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "GLOO_SOCKET_IFNAME": "lo",
            "VLLM_HOST_IP": "127.0.0.1",
        }
        dashboard = _free_port()
        cluster = RayCluster(Path(folder), environment, f"127.0.0.1:{_free_port()}", f"http://127.0.0.1:{dashboard}")
        try:
            cluster.start_node("--include-dashboard=true", f"--dashboard-port={dashboard}")
            cluster.heal()
            yield cluster
        finally:
            cluster.stop()


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_job_outlives_a_node_and_ends_with_its_report(
    ray_nodes: RayCluster, submitting: Path, repository: Path
) -> None:
    config = configure(submitting, repository, training={"max_steps": 300, "checkpoint_every": 20})
    run = submitting / "small"
    place = ["--address", ray_nodes.dashboard]
    known = {key: value for key, value in ray_nodes.environment.items() if key.startswith("RAY_")}
    submitted = launcher(
        "submit", "ray", config, *place, "--python", sys.executable, "--detach", cwd=submitting, **known
    )
    assert submitted.returncode == 0, submitted.stderr
    again = launcher("submit", "ray", config, *place, "--detach", cwd=submitting, **known)
    assert "this run is job small-" in again.stderr
    assert "already" in again.stderr

    def output() -> str:
        return launcher("logs", run, *place, cwd=submitting, **known).stdout

    until(lambda: len(train_rows(run)) > 40, 120, output)
    assert ray_nodes.kill_raylet("RayTrainWorker")
    followed = launcher("logs", run, *place, "--follow", cwd=submitting, timeout=450, **known)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "the workers failed and are started again" in followed.stdout
    assert "exit code 0" in launcher("status", run, *place, cwd=submitting, **known).stdout
    assert [row["step"] for row in train_rows(run)] == list(range(1, 301))
    assert json.loads((run / "report.json").read_text())["headline"]["num_prompts"] > 0


def _runs(pid: int, what: str) -> bool:
    for process in _family(pid):
        with suppress(psutil.NoSuchProcess):  # it may end while it is looked at
            if what in " ".join(process.cmdline()):
                return True
    return False


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_runs_of_a_sweep_side_by_side_do_not_disturb_each_other_and_outlive_a_node_while_generating(
    ray_nodes: RayCluster, submitting: Path, repository: Path
) -> None:
    ray_nodes.heal()
    config = configure(submitting, repository, training={"max_steps": 60, "num_workers": 1})
    sweep = submitting / "small"
    place = ["--address", ray_nodes.dashboard]
    known = {key: value for key, value in ray_nodes.environment.items() if key.startswith("RAY_")}
    # How often checkpoints are written changes nothing of what is learned: the two must come to the same.
    # The path starts from where it is submitted, which the job does not know.
    words = ["--sweep", "training.checkpoint_every=1000,2000", "data.path=data.json", "--side-by-side", "2"]
    submitted = launcher(
        "submit", "ray", config, *place, *words, "--python", sys.executable, "--detach", cwd=submitting, **known
    )
    assert submitted.returncode == 0, submitted.stderr
    assert "2 runs in" in submitted.stderr

    def output() -> str:
        members = [path.read_text(errors="replace") for path in sweep.glob("*/output.log")]
        return "\n".join([launcher("logs", sweep, *place, cwd=submitting, **known).stdout, *members])

    members = [sweep / f"{n}-checkpoint_every-{n}000-path-data.json" for n in (1, 2)]
    until(lambda: all(train_rows(member) for member in members), 200, output)
    until(lambda: ray_nodes.kill_raylet("vLLM"), 200, output)

    followed = launcher("logs", sweep, *place, "--follow", cwd=submitting, timeout=500, **known)
    assert followed.returncode == 0, output()
    assert "differences to 1-checkpoint_every-1000" in followed.stdout
    steps = [[(row["step"], row["loss"]) for row in train_rows(member)] for member in members]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 60
    for member in members:
        counts = json.loads((member / "generate.record.json").read_text())["counts"]["models"]["tuned"]
        assert counts["asked"] == counts["generated"] == 8
        assert json.loads((member / "report.json").read_text())["headline"]["num_prompts"] == 8


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_training_goes_on_with_the_workers_that_are_left(
    ray_nodes: RayCluster, submitting: Path, repository: Path
) -> None:
    ray_nodes.heal()
    training = {"num_workers": 3, "min_workers": 1, "global_batch_size": 6, "micro_batch_size": 1, "max_steps": 200}
    config = configure(submitting, repository, training=training | {"checkpoint_every": 20})
    known = {key: value for key, value in ray_nodes.environment.items() if key.startswith("RAY_")}
    log = submitting / "output.log"
    program = [sys.executable, "-m", "launcher", "run", str(config), "--to", "train"]
    program += ["--set", f"cluster.address={ray_nodes.gcs}"]
    with log.open("wb") as output:
        run = subprocess.Popen(
            program,
            cwd=submitting,
            env=os.environ | known | {"PYTHONPATH": str(repository)},
            stdout=output,
            stderr=output,
        )
    until(lambda: len(train_rows(submitting / "small")) > 30, 120, log.read_text)
    assert ray_nodes.kill_raylet("RayTrainWorker")
    assert run.wait(200) == 0, log.read_text()
    assert "the cluster has room for 2 workers: training goes on with 2 (training.min_workers)" in log.read_text()
    assert [row["step"] for row in train_rows(submitting / "small")] == list(range(1, 201))


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_cancel_lets_the_job_save_and_leaves_the_cluster(
    ray_nodes: RayCluster, submitting: Path, repository: Path
) -> None:
    ray_nodes.heal()
    config = configure(submitting, repository, training={"max_steps": 100_000})
    run = submitting / "small"
    place = ["--address", ray_nodes.dashboard]
    known = {key: value for key, value in ray_nodes.environment.items() if key.startswith("RAY_")}
    program = ["--python", sys.executable, "--detach"]
    assert launcher("submit", "ray", config, *place, *program, cwd=submitting, **known).returncode == 0
    until(lambda: len(train_rows(run)) > 5, 120, lambda: launcher("logs", run, *place, cwd=submitting, **known).stdout)

    # Meanwhile another asks for what is held, and another for nodes that are not there.
    beside: list[str | Path] = ["run", config, "--from", "train", "--set", "cluster.wait_s=1"]
    beside += ["--set", f"cluster.address={ray_nodes.gcs}"]
    # data.path is relative here, and absolute in what the job was given: the same settings.
    left_out = shutil.ignore_patterns("checkpoints", "metrics.jsonl", "attempt-*")
    for setting, said in {
        "training.num_workers=2": r"needs 2 CPUs; there are 1; .*\n.*waited 1 s.*\n.*CPU 3 \(1 free\).*groups: .*CPU",
        "cluster.num_nodes=9": r"cluster.num_nodes: 9 nodes are asked, 4 have joined",
    }.items():
        other = ["--run-dir", submitting / "other", "--set", setting]
        made = shutil.copytree(run, submitting / "other", ignore=left_out)
        answer = launcher(*beside, *other, cwd=submitting, timeout=100, **known)
        assert answer.returncode == 2, answer.stdout + answer.stderr
        assert re.search(said, answer.stderr), answer.stderr
        shutil.rmtree(made)
    cancelled = launcher("cancel", run, *place, cwd=submitting, timeout=150, **known)
    assert "ended" in cancelled.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{len(train_rows(run))}"]
    until(lambda: not ray_nodes.busy("RayTrainWorker"), 30, lambda: "workers are left")
    assert ray_nodes.nodes[0].poll() is None


def test_no_cluster_at_the_address(submitting: Path, repository: Path) -> None:
    place = ["--address", f"http://127.0.0.1:{_free_port()}"]
    answer = launcher("submit", "ray", configure(submitting, repository), *place, cwd=submitting)
    assert answer.returncode == 2
    assert "no Ray dashboard answers there" in answer.stderr
    assert "Traceback" not in answer.stderr
