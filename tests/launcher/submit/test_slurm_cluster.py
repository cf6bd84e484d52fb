"""Runs on a real Slurm of two nodes: to the report, through a preemption, and when something is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launcher.submit.small_runs import configure, launcher, log_of, train_rows, until

SECRET = "value-of-the-secret"
STEPS = 200


RAY = (sys.executable, "-m", "ray.scripts.scripts")


def start_ray_on_a_host(slurm: Any, host: int, folder: str) -> subprocess.Popen[bytes]:
    """A Ray cluster of this user that is no business of any job."""
    address = f"{os.environ['SLURM_TEST_NET']}.{host}"
    log = slurm.folder / "bystander.log"
    words = ["start", "--head", "--port=6379", f"--node-ip-address={address}", "--num-cpus=1", "--block"]
    words += ["--include-dashboard=false", f"--temp-dir={folder}"]
    with log.open("wb") as output:
        started = subprocess.Popen([*slurm.inside(host), *RAY, *words], stdout=output, stderr=output)
    until(lambda: "Ray runtime started." in log.read_text(), 60, log.read_text)
    return started


def jobs_of(run: Path) -> list[str]:
    return [job["job"] for job in json.loads((run / "submitted.json").read_text())["jobs"]]


@pytest.mark.timeout(560)
def test_two_nodes_to_the_report_through_a_preemption(slurm: Any, submitting: Path, repository: Path) -> None:
    config = configure(
        submitting,
        repository,
        training={"max_steps": STEPS},
        pass_environment=["MY_TOKEN"],
        setup=[f'test "${{#MY_TOKEN}}" = {len(SECRET)}'],
    )
    run = submitting / "small"
    submitted = launcher("submit", "slurm", config, "--detach", cwd=submitting, MY_TOKEN=SECRET)
    assert submitted.returncode == 0, submitted.stderr
    (job,) = jobs_of(run)

    # Submitting it again goes along with the same job.
    again = launcher("submit", "slurm", config, "--detach", cwd=submitting, MY_TOKEN=SECRET)
    assert f"this run is job {job} already" in again.stderr

    until(lambda: len(train_rows(run)) > 5, 120, lambda: log_of(run))
    shown = slurm.command("scontrol", "show", "job", job) + "\n".join(slurm.processes())
    slurm.command("scancel", "--signal=USR1", job)

    followed = launcher("logs", run, "--follow", cwd=submitting, timeout=400)
    assert followed.returncode == 0, log_of(run)
    assert "it goes back to the queue" in followed.stdout
    assert "Restarts=1" in slurm.command("scontrol", "show", "job", job)
    assert (run / "report.html").is_file()
    assert {path.name for path in (run / "slurm").iterdir()} >= {f"{job}.0", f"{job}.1", f"{job}.log"}
    assert "exit code 0" in launcher("status", run, cwd=submitting).stdout

    # Nothing that it was given in confidence is to be seen, nothing in its names was executed, nothing is left.
    written = "".join(path.read_text(errors="replace") for path in (run / "slurm").rglob("*") if path.is_file())
    assert SECRET not in shown + written + (run / "config.yaml").read_text()
    assert not list(submitting.rglob("pwned"))
    assert not list((run / "slurm").rglob("token"))
    until(lambda: not any("ray" in command for command in slurm.processes()), 20, lambda: str(slurm.processes()))

    # The preempted run took the very steps of an undisturbed one, without Ray and on one machine.
    assert [(row["step"], row["loss"]) for row in train_rows(run)] == undisturbed(
        run, config, repository, num_workers=2
    )
    assert len(train_rows(run)) == STEPS


def undisturbed(run: Path, config: Path, repository: Path, *, num_workers: int = 1) -> list[tuple[int, float]]:
    """Steps and losses of the same training in one go, without Slurm and Ray, from what the run has prepared."""
    folder = config.parent / "undisturbed"
    for made in ("data", "base"):
        shutil.copytree(run / made, folder / made)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_workers)]
    program += ["-m", "trainer.worker", config.name, "--run-dir", folder.name]
    place = os.environ | {"PYTHONPATH": str(repository)}
    subprocess.run(program, cwd=config.parent, env=place, check=True, capture_output=True, timeout=200)
    return [(row["step"], row["loss"]) for row in train_rows(folder)]


def test_a_node_where_ray_fails_ends_the_job_at_once_with_the_cause(
    slurm: Any, submitting: Path, repository: Path
) -> None:
    config = configure(submitting, repository, interface="nosuch0")
    started = time.monotonic()
    answer = launcher("submit", "slurm", config, cwd=submitting)
    assert answer.returncode == 1
    assert "cluster.slurm.interface = nosuch0: no address there" in answer.stdout
    assert time.monotonic() - started < 30


def test_a_wrong_partition_is_sbatchs_own_error(slurm: Any, submitting: Path, repository: Path) -> None:
    answer = launcher("submit", "slurm", configure(submitting, repository, partition="nosuch"), cwd=submitting)
    assert answer.returncode == 1
    assert "invalid partition specified: nosuch" in answer.stderr
    assert not (submitting / "small/submitted.json").exists()


def test_without_slurm_the_missing_program_is_named(submitting: Path, repository: Path) -> None:
    answer = launcher("submit", "slurm", configure(submitting, repository), cwd=submitting, PATH="/nowhere")
    assert answer.returncode == 2
    assert "sbatch: no such program" in answer.stderr


def test_print_shows_the_script_and_writes_nothing(submitting: Path, repository: Path) -> None:
    config = configure(submitting, repository)
    own = ["--set", "training={num_workers: 3, global_batch_size: 3}"]
    answer = launcher("submit", "slurm", config, *own, "--nodes", "3", "--print", cwd=submitting)
    assert answer.returncode == 0, answer.stderr
    assert re.search(r"^#SBATCH --nodes=3$", answer.stdout, re.MULTILINE)
    assert sorted(path.name for path in submitting.iterdir()) == ["data.json", "run.yaml"]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_cancel_lets_the_run_save_and_leaves_nothing_but_others_clusters(
    slurm: Any, submitting: Path, repository: Path
) -> None:
    config = configure(submitting, repository, training={"max_steps": 100_000})
    run = submitting / "small"
    folder = tempfile.mkdtemp(prefix="tl-bystander", dir="/tmp")
    bystander = start_ray_on_a_host(slurm, 1, folder)

    # It is no child of the hosts' own processes, so slurm.processes() does not tell of it.
    daemons = [
        p for p in psutil.Process(bystander.pid).children(recursive=True) if p.name() in ("raylet", "gcs_server")
    ]
    assert len(daemons) == 2
    assert launcher("submit", "slurm", config, "--detach", cwd=submitting).returncode == 0
    until(lambda: len(train_rows(run)) > 5, 120, lambda: log_of(run))
    cancelled = launcher("cancel", run, cwd=submitting, timeout=120)
    assert cancelled.returncode == 0, cancelled.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{len(train_rows(run))}"]
    assert "exit code 75" in launcher("status", run, cwd=submitting).stdout

    def left() -> list[str]:
        return [command for command in slurm.processes() if "ray" in command]

    until(lambda: not left(), 20, lambda: str(left()))
    # A Ray cluster of the same user on the same host has not noticed.
    try:
        assert bystander.poll() is None
        assert all(daemon.is_running() and daemon.status() != psutil.STATUS_ZOMBIE for daemon in daemons)
    finally:
        psutil.Process(bystander.pid).children()[0].terminate()  # nsenter keeps a signal to itself
        bystander.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
    assert not psutil.wait_procs(daemons, timeout=20)[1]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_host_that_dies_sends_the_run_back_to_the_queue(slurm: Any, submitting: Path, repository: Path) -> None:
    config = configure(submitting, repository, training={"max_steps": 1500, "checkpoint_every": 50})
    run = submitting / "small"
    assert launcher("submit", "slurm", config, "--detach", cwd=submitting).returncode == 0
    until(lambda: len(train_rows(run)) > 100, 120, lambda: log_of(run))
    assert slurm.act("kill", "2").returncode == 0
    time.sleep(20)
    assert slurm.act("start", "2").returncode == 0
    followed = launcher("logs", run, "--follow", cwd=submitting, timeout=300)
    assert followed.returncode == 0, log_of(run)
    assert [row["step"] for row in train_rows(run)] == list(range(1, 1501))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_is_run_and_compared_and_a_preempted_member_goes_on(
    slurm: Any, submitting: Path, repository: Path
) -> None:
    config = configure(submitting, repository, training={"max_steps": STEPS, "num_workers": 1}, nodes=1)
    words = ["--sweep", "training.lr=1e-3,2e-3", "data.train_on=assistant"]
    wrong = launcher("submit", "slurm", config, "--sweep", "training.lr=1e-3,-1", cwd=submitting)
    assert wrong.returncode == 2
    assert "training.lr = -1" in wrong.stderr
    assert sorted(path.name for path in submitting.iterdir()) == ["data.json", "run.yaml"]

    submitted = launcher("submit", "slurm", config, *words, "--detach", cwd=submitting)
    assert submitted.returncode == 0, submitted.stderr
    sweep = submitting / "small"
    members = [f"{n}-lr-{lr}-train_on-assistant" for n, lr in ((1, "1e-3"), (2, "2e-3"))]
    assert f"{members[1]}  training.lr=2e-3 data.train_on=assistant" in submitted.stderr
    jobs = jobs_of(sweep)
    assert "PENDING, Dependency" in launcher("status", sweep, cwd=submitting).stdout
    again = launcher("submit", "slurm", config, *words, "--detach", cwd=submitting)
    assert f"this run is job {jobs[0]} ({members[0]}), {jobs[1]} ({members[1]}), {jobs[2]} (compare) already" in (
        again.stderr
    )

    second = sweep / members[1]
    until(lambda: len(train_rows(second)) > 5, 150, lambda: log_of(sweep))
    slurm.command("scancel", "--signal=USR1", jobs[1])
    followed = launcher("logs", sweep, "--follow", cwd=submitting, timeout=500)
    assert followed.returncode == 0, log_of(sweep) + log_of(second) + followed.stdout + followed.stderr
    assert "differences to 1-lr-1e-3" in followed.stdout
    assert "it goes back to the queue" in launcher("logs", second, cwd=submitting).stdout
    assert {path.name for path in (second / "slurm").iterdir()} >= {f"{jobs[1]}.0", f"{jobs[1]}.1"}
    for member, lr in zip(members, (1e-3, 2e-3), strict=True):
        rows = train_rows(sweep / member)
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert max(row["lr"] for row in rows) == pytest.approx(lr)
        assert (sweep / member / "report.html").is_file()
    until(lambda: not any("ray" in command for command in slurm.processes()), 20, lambda: str(slurm.processes()))


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_sweep_that_is_cancelled_saves_what_runs_and_never_starts_what_waits(
    slurm: Any, submitting: Path, repository: Path
) -> None:
    config = configure(submitting, repository, training={"max_steps": 100_000, "num_workers": 1}, nodes=1)
    words = ["--sweep", "training.lr=1e-3,2e-3,3e-3", "--side-by-side", "2"]
    assert launcher("submit", "slurm", config, *words, "--detach", cwd=submitting).returncode == 0
    sweep = submitting / "small"
    members = [sweep / f"{n}-lr-{n}e-3" for n in (1, 2, 3)]
    until(lambda: all(len(train_rows(member)) > 5 for member in members[:2]), 150, lambda: log_of(sweep))
    *tasks, comparing = jobs_of(sweep)
    assert "JobArrayTaskLimit" in slurm.command("scontrol", "show", "job", tasks[2])
    cancelled = launcher("cancel", sweep, cwd=submitting, timeout=120)
    assert cancelled.returncode == 0, cancelled.stderr

    for member in members[:2]:
        assert [path.name for path in (member / "checkpoints").iterdir()] == [f"step-{len(train_rows(member))}"]
        assert "exit code 75" in launcher("status", member, cwd=submitting).stdout
    assert not (members[2] / "config.yaml").exists()
    assert not (members[2] / "data").exists()
    for job in (tasks[2], comparing):
        assert "JobState=CANCELLED" in slurm.command("scontrol", "show", "job", job)
    until(lambda: not any("ray" in command for command in slurm.processes()), 20, lambda: str(slurm.processes()))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_split_stages_run_one_after_the_other_and_end_at_the_first_failure(
    slurm: Any, submitting: Path, repository: Path
) -> None:
    config = configure(submitting, repository, training={"num_workers": 1}, nodes=1)
    own = ["--set", "cluster.stages={prepare: {cpus: 2}, judge: {cpus: 1, memory: 500M}}"]
    run = submitting / "small"
    # A broken row is found by the job that prepares; those behind it never start.
    (submitting / "data.json").rename(submitting / "kept.json")
    (submitting / "data.json").write_text(json.dumps([{"instruction": 1}]))
    failed = launcher("submit", "slurm", config, *own, "--split-stages", cwd=submitting, timeout=200)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert failed.stderr.count("CANCELLED") == 4
    (submitting / "kept.json").rename(submitting / "data.json")

    followed = launcher("submit", "slurm", config, *own, "--split-stages", cwd=submitting, timeout=500)
    assert followed.returncode == 0, followed.stdout + followed.stderr + log_of(run)
    jobs = jobs_of(run)
    asked = [slurm.command("scontrol", "show", "job", "--oneliner", job) for job in jobs]
    assert [re.search(r"JobName=(\S+)", text)[1] for text in asked] == [
        f"small-{stage}" for stage in ("prepare", "train", "generate", "judge", "report")
    ]
    assert [re.search(r"NumCPUs=(\d+)", text)[1] for text in asked] == ["2", "1", "1", "1", "1"]
    ended = [re.search(r"EndTime=(\S+)", text)[1] for text in asked]
    started = [re.search(r"StartTime=(\S+)", text)[1] for text in asked]
    assert all(before <= after for before, after in zip(ended[:-1], started[1:], strict=True))
    assert (run / "report.html").is_file()

    # What is finished is not queued again.
    (run / "report.record.json").unlink()
    again = launcher("submit", "slurm", config, *own, "--split-stages", cwd=submitting, timeout=100)
    assert again.returncode == 0, again.stderr
    assert len(jobs_of(run)) == 1


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_slurmd_that_is_killed_leaves_an_attempt_that_writes_nothing_beside_its_successor_and_ends(
    slurm: Any, submitting: Path, repository: Path
) -> None:
    training = {"max_steps": 600, "checkpoint_every": 50, "num_workers": 1}
    config = configure(submitting, repository, training=training, nodes=1)
    run = submitting / "small"
    assert launcher("submit", "slurm", config, "--detach", cwd=submitting).returncode == 0
    (job,) = jobs_of(run)
    until(lambda: len(train_rows(run)) > 100, 120, lambda: log_of(run))
    host = re.search(r"BatchHost=n(\d)", slurm.command("scontrol", "show", "job", job))[1]
    asleep = processes_of_the_run(slurm, host)
    for process in asleep:
        process.send_signal(signal.SIGSTOP)
    try:
        # The host is lost to Slurm, which starts the job on the other one. Here only the run's own processes sleep;
        # Slurm's have ended or are deaf, so nobody reads what the attempt says, and nobody ends it.
        assert slurm.act("kill-slurmd", host).returncode == 0
        until((run / "slurm" / f"{job}.1" / "address").exists, 120, lambda: log_of(run))
        held = len(train_rows(run))
        until(lambda: len(train_rows(run)) > held + 20, 120, lambda: log_of(run))
        assert all(process.status() == psutil.STATUS_STOPPED for process in asleep)
        owner = [(run / name).read_text() for name in (".lock", "attempt")]
        # Ray and the workers wake first: nothing but their own look at the run's folder keeps them from going on.
        last = [process for process in asleep if any(w in process.cmdline() for w in ("run", "launcher.submit.node"))]
        assert len(last) == 2
        for process in asleep:
            if process not in last:
                process.send_signal(signal.SIGCONT)
        time.sleep(5)
        for process in last:
            process.send_signal(signal.SIGCONT)
        until(lambda: not processes_of_the_run(slurm, host), 30, lambda: str(processes_of_the_run(slurm, host)))
        assert [(run / name).read_text() for name in (".lock", "attempt")] == owner
        followed = launcher("logs", run, "--follow", cwd=submitting, timeout=300)
    finally:
        slurm.act("kill", host)
        slurm.act("start", host)
    assert followed.returncode == 0, log_of(run)
    assert (run / "report.html").is_file()
    assert train_rows(run) == sorted(train_rows(run), key=lambda row: row["step"])
    assert [(row["step"], row["loss"]) for row in train_rows(run)] == undisturbed(run, config, repository)
    assert len(train_rows(run)) == 600
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert "step-600" in names
    assert all(name.removeprefix("step-").isdecimal() for name in names)
    assert not (run / "stop").exists()
    assert not list(run.glob("attempt-*"))
    assert not list((run / "slurm").rglob("token"))


def processes_of_the_run(slurm: Any, host: str) -> list[psutil.Process]:
    """The launcher, Ray with its workers, and what started Ray, on a host; none of Slurm's own."""
    found = []
    for process in psutil.Process(int((slurm.folder / f"n{host}/pid").read_text())).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            words = " ".join(process.cmdline())
            if process.name() not in ("srun", "slurmstepd", "bash") and any(w in words for w in ("launcher", "ray")):
                found.append(process)
    return found


# In place of Python on the nodes: says what Slurm gave each step and what Ray would hand out of it, and starts neither
# Ray nor the run.
PROBE = """#!/bin/bash
given() {{ "{python}" -c '
import os
from launcher.submit.node import resources
print(os.environ["SLURMD_NODENAME"], os.environ.get("CUDA_VISIBLE_DEVICES"), *resources(os.environ))'; }}
if [ "$2" = launcher ]; then given >"{folder}/run"; exit 0; fi
given >"{folder}/$SLURMD_NODENAME"
trap 'exit 0' USR2
[ "$4/$SLURMD_NODENAME" != "$4/$6" ] || echo 10.0.0.1:7000 >"$4/address"
while :; do sleep 0.1 & wait $!; done
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("asked", "tres"), [({"gpus_per_node": 2}, "gres:gpu:2"), ({"gres": "gpu:fake:2"}, "gres:gpu:fake:2")]
)
def test_slurm_grants_the_gpus_and_cpus_of_a_run(
    asked: dict[str, Any], tres: str, slurm: Any, submitting: Path, repository: Path
) -> None:
    probe, given = submitting / "probe", submitting / "given"
    given.mkdir()
    probe.write_text(PROBE.format(python=sys.executable, folder=str(given).replace("$", "\\$")))
    probe.chmod(0o755)
    training = {"num_workers": 4, "global_batch_size": 8, "precision": "bf16"}
    config = configure(submitting, repository, training=training, python=str(probe), **asked)
    own = ["--set", "cluster.device=cuda", "--set", "cluster.slurm.cpus_per_node=null"]
    submitted = launcher("submit", "slurm", config, *own, cwd=submitting, timeout=150)
    run = submitting / "small"
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr + log_of(run)
    # Four workers on two nodes: two GPUs of each, and CPUs for an engine's three processes.
    assert "job: asks for 2 nodes with 2 GPUs and 3 CPUs each" in submitted.stderr
    (job,) = jobs_of(run)
    shown = slurm.command("scontrol", "show", "job", job)
    assert f"TresPerNode={tres}\n" in shown
    assert "NumNodes=2 NumCPUs=6 NumTasks=2 CPUs/Task=3" in shown
    # Both steps on the first node see what the job was given, and Ray would hand out all of it.
    found = {path.name: path.read_text().split()[1:] for path in given.iterdir()}
    assert found == {step: ["0,1", "3", "2"] for step in ("n1", "n2", "run")}


def gpus_of_ray(slurm: Any, host: int) -> tuple[str | None, str | None]:
    """CUDA_VISIBLE_DEVICES of Ray on a host, and the GPUs that it hands out there."""
    for process in psutil.Process(int((slurm.folder / f"n{host}/pid").read_text())).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() == "raylet":
                found = re.search(r"\bGPU,(\d+)", " ".join(process.cmdline()))
                return process.environ().get("CUDA_VISIBLE_DEVICES"), found and found[1]
    return None, None


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_slurm_grants_what_two_nodes_were_asked_for(slurm: Any, submitting: Path, repository: Path) -> None:
    training = {"num_workers": 4, "global_batch_size": 8, "precision": "bf16", "max_failures": 0}
    config = configure(submitting, repository, training=training)
    on_gpus = ["--set", "cluster.device=cuda", "--set", "cluster.slurm.cpus_per_node=null"]
    run = submitting / "small"
    idle = launcher("submit", "slurm", config, *on_gpus, "--set", "training.num_workers=2", cwd=submitting)
    assert idle.returncode == 2
    assert "training.num_workers = 2 keeps 1 of 2 nodes busy" in idle.stderr
    assert not run.exists()

    # Four workers over two nodes: two GPUs of each, and CPUs for two workers or for an engine's three processes.
    own = [*on_gpus, "--set", "cluster.slurm.gpus_per_node=2"]
    submitted = launcher("submit", "slurm", config, *own, "--detach", cwd=submitting)
    assert submitted.returncode == 0, submitted.stderr
    assert "job: asks for 2 nodes with 2 GPUs and 3 CPUs each" in submitted.stderr
    (job,) = jobs_of(run)
    until(lambda: all(gpus_of_ray(slurm, host)[1] for host in (1, 2)), 120, lambda: log_of(run))
    shown = slurm.command("scontrol", "show", "job", "--details", job)
    assert "TresPerNode=gres:gpu:2" in shown
    assert re.findall(r" GRES=(\S+)", shown) == ["gpu:fake:2(IDX:0-1)"], shown  # of both nodes: they are alike
    assert "Nodes=n[1-2]" in shown
    assert "NumCPUs=6" in shown
    assert [gpus_of_ray(slurm, host) for host in (1, 2)] == [("0,1", "2"), ("0,1", "2")]

    assert launcher("cancel", run, cwd=submitting, timeout=150).returncode == 0  # what follows needs real GPUs


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_run_on_cpus_leaves_granted_gpus_alone(slurm: Any, submitting: Path, repository: Path) -> None:
    config = configure(submitting, repository, gres="gpu:fake:1")
    run = submitting / "small"
    assert launcher("submit", "slurm", config, "--detach", cwd=submitting).returncode == 0
    (job,) = jobs_of(run)
    followed = launcher("logs", run, "--follow", cwd=submitting, timeout=600)
    assert followed.returncode == 0, log_of(run)
    assert "TresPerNode=gres:gpu:fake:1" in slurm.command("scontrol", "show", "job", job)
    assert (run / "report.html").is_file()
