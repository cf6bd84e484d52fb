"""Real trainings on two gloo workers, killed and stopped by real signals, against ones that were left alone."""

import shutil

import pytest
import torch

from tests.trainer import resumed_runs
from tests.trainer.resumed_runs import STEPS, losses, rows, set_options, starts, tensors, train, write_run
from trainer import sealed, stored

LORA = {"method": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1}
KINDS = {"zero0": ({}, 0), "zero2": ({}, 2), "zero3": ({}, 3), "lora": (LORA, 2)}
OFFLOADED = {"zero2-offloaded": 2, "zero3-offloaded": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_base):
    """Runs that nothing happened to, by kind; trained when first asked for."""
    folder = tmp_path_factory.mktemp("whole")

    def of(kind):
        run_dir = folder / kind
        if not run_dir.exists():
            tuning, stage = KINDS.get(kind) or ({}, OFFLOADED[kind])
            write_run(run_dir, tiny_base, tuning=tuning, stage=stage)
            if kind in OFFLOADED:
                set_options(run_dir, "deepspeed", offload_optimizer="cpu")
            done = train(run_dir)
            assert done.returncode == 0, done.stderr[-3000:]
        return run_dir

    return of


def fresh_copy(run_dir, folder):
    """The same run, not trained yet."""
    return shutil.copytree(run_dir, folder, ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl", "starts.txt"))


def assert_same_run(one, other):
    """The same losses in the same order, and the same last checkpoint to the bit, moments and generators included."""
    assert rows(one, "checkpoint")[-1]["step"] == STEPS
    assert losses(one) == losses(other)
    first, second = tensors(one, STEPS), tensors(other, STEPS)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize(
    ("kind", "step", "delay_s"),
    [
        pytest.param("zero2", 5, 0.01, marks=pytest.mark.slow),
        ("zero3", 5, 0.02),
        pytest.param("lora", 6, 0.005, marks=pytest.mark.slow),
        pytest.param("zero2", 1, 0.0, marks=pytest.mark.slow),
        pytest.param("zero0", 3, 0.0, marks=pytest.mark.slow),
        pytest.param("zero2-offloaded", 4, 0.01, marks=pytest.mark.slow),
        pytest.param("zero3-offloaded", 5, 0.01, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(whole, tmp_path, kind, step, delay_s):
    run_dir = fresh_copy(whole(kind), tmp_path / "run")
    killed = train(run_dir, kind="SIGKILL", rank=step % 2, step=step, delay_s=delay_s)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    again = train(run_dir)
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same_run(run_dir, whole(kind))
    first, second = starts(run_dir)
    assert first == 0
    assert second >= 3 or step < 5  # not from the beginning, which would give the same numbers


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_any_step_goes_on_as_if_it_had_not_been(whole, tmp_path, kind):
    """Killed at every step in turn, seven times; what a step told stays, so each of the starts shows in the end."""
    run_dir = fresh_copy(whole(kind), tmp_path / "run")
    set_options(run_dir, "training", checkpoint_every=1)
    for step in range(1, STEPS):
        killed = train(run_dir, kind="SIGKILL", rank=step % 2, step=step, delay_s=0.002 * step)
        assert "SIGKILL" in killed.stderr
    again = train(run_dir)
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same_run(run_dir, whole(kind))
    begun_at = starts(run_dir)
    assert len(begun_at) == STEPS
    assert all(begun >= step - 2 for step, begun in enumerate(begun_at))  # the last two may not be on disk yet


@pytest.mark.parametrize(("name", "rank"), [("SIGTERM", 1), pytest.param("SIGUSR1", 0, marks=pytest.mark.slow)])
def test_a_preempted_run_saves_at_the_step_s_edge_and_says_resume_me(whole, tmp_path, name, rank):
    run_dir = fresh_copy(whole("zero2"), tmp_path / "run")
    set_options(run_dir, "training", checkpoint_every=1000)
    stopped = train(run_dir, kind=name, rank=rank, step=2)
    assert "exitcode  : 75" in stopped.stderr
    assert (run_dir / "preempted-0").exists()  # every rank saved and stopped, not only the one that was asked
    assert (run_dir / "preempted-1").exists()
    saved = stored.newest(run_dir)
    assert saved is not None
    assert int(saved.name.removeprefix("step-")) == rows(run_dir, "train")[-1]["step"] < STEPS
    again = train(run_dir)
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same_run(run_dir, whole("zero2"))


@pytest.mark.slow
def test_a_rank_under_sigstop_is_seen_and_all_stacks_are_saved(whole, tmp_path):
    run_dir = fresh_copy(whole("zero2"), tmp_path / "run")
    set_options(run_dir, "training", hang_timeout_s=4.0)
    hung = train(run_dir, kind="SIGSTOP", rank=1, step=5)
    assert "exitcode  : 76" in hung.stderr
    waiting, stopped = (next((run_dir / "incidents").glob(f"*-rank-{rank}.txt")).read_text() for rank in (0, 1))
    assert "is stopped by a signal" in waiting
    assert "no progress for" in stopped
    assert all("trainer/loop.py" in stacks for stacks in (waiting, stopped))
    again = train(run_dir)
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same_run(run_dir, whole("zero2"))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_that_holds_the_interpreter_s_lock_is_seen_and_its_stack_is_saved(whole, tmp_path, num_ranks):
    run_dir = fresh_copy(whole("zero2"), tmp_path / "run")
    set_options(run_dir, "training", hang_timeout_s=4.0)
    hung = train(run_dir, num_ranks, kind="lock", rank=num_ranks - 1, step=5)
    assert hung.returncode != 0
    stacks = {path.name.split("-process")[0]: path.read_text() for path in (run_dir / "incidents").iterdir()}
    assert "dying_worker.py" in stacks[f"interpreter-locked-rank-{num_ranks - 1}"]
    if num_ranks == 2:
        assert "trainer/loop.py" in stacks["hang-after-step-5-rank-0.txt"]
    again = train(run_dir)
    assert again.returncode == 0, again.stderr[-3000:]
    assert rows(run_dir, "train")[-1]["step"] == STEPS


@pytest.mark.slow
def test_a_base_that_was_changed_since_is_refused(whole, tmp_path):
    run_dir = shutil.copytree(whole("lora"), tmp_path / "run")
    path = run_dir / "base" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused = train(run_dir)
    assert refused.returncode != 0
    assert "rank 0: the base model is not the one that this run is trained on: model.safetensors" in refused.stderr


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory, tiny_base):
    """A whole run on two ranks, ZeRO 2, without dropout, whose units depend on the rank."""
    run_dir = write_run(tmp_path_factory.mktemp("without") / "dropout", tiny_base, attention_dropout=0.0)
    assert train(run_dir).returncode == 0
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "stage"),
    [(1, 3), (2, 0), (4, 2)],
)
def test_another_world_size_or_stage_goes_on_with_the_same_steps(without_dropout, tmp_path, num_ranks, stage):
    run_dir = fresh_copy(without_dropout, tmp_path / "run")
    assert "exitcode  : 75" in train(run_dir, kind="SIGUSR1", step=3).stderr
    set_options(run_dir, "training", num_workers=num_ranks)
    set_options(run_dir, "deepspeed", stage=stage)
    again = train(run_dir, num_ranks)
    assert again.returncode == 0, again.stderr[-3000:]
    assert sealed.read_seal(run_dir / "checkpoints" / f"step-{STEPS}")[0]["world_size"] == num_ranks
    for (kind, step, loss), reference in zip(losses(run_dir), losses(without_dropout), strict=True):
        assert (kind, step) == reference[:2]
        assert loss == pytest.approx(reference[2], abs=1e-4)
    tokens = [[row["num_tokens"] for row in rows(run, "train")] for run in (run_dir, without_dropout)]
    assert tokens[0] == tokens[1]


def test_a_world_size_that_does_not_divide_the_batch_is_refused_before_anything_starts(whole, tmp_path):
    run_dir = fresh_copy(whole("zero2"), tmp_path / "run")
    refused = train(run_dir, 3)
    assert "global_batch_size (4) must be a multiple of ranks x training.micro_batch_size (3 x 1 = 3)" in refused.stderr
    assert not (run_dir / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan_loss", "nan_gradient"])
def test_a_step_that_is_not_finite_stops_the_run_and_names_the_rows(whole, tmp_path, kind):
    run_dir = fresh_copy(whole("zero2"), tmp_path / "run")
    shutil.rmtree(run_dir / "data" / "train")
    resumed_runs.write_poisoned_split(run_dir / "data" / "train")
    stopped = train(run_dir, kind=kind)
    assert stopped.returncode != 0
    message = next(line for line in stopped.stderr.splitlines() if "was not taken" in line)
    assert "row-17" in message
    assert "'stop'" in message
    named = message.split("rows: ")[1].split(". Look")[0].split(", ")
    assert len(named) <= (2 if kind == "nan_loss" else 8)  # one pack of two rows; else all rows of four packs
    assert not rows(run_dir, "skipped")


def test_skipped_steps_are_counted_and_nothing_non_finite_is_saved(whole, tmp_path):
    run_dir = fresh_copy(whole("zero2"), tmp_path / "run")
    shutil.rmtree(run_dir / "data" / "train")
    resumed_runs.write_poisoned_split(run_dir / "data" / "train")
    set_options(run_dir, "training", on_nonfinite="skip 2", precision="bf16", max_steps=10, checkpoint_every=1)
    done = train(run_dir, kind="nan_gradient")
    assert done.returncode == 0, done.stderr[-3000:]
    skipped = rows(run_dir, "skipped")
    assert len(skipped) == 2  # 5 steps an epoch, one of them with the row
    assert all("row-17" in row["row_ids"] for row in skipped)
    assert sorted(row["step"] for row in skipped + rows(run_dir, "train")) == list(range(1, 11))
    content, _ = sealed.read_seal(run_dir / "checkpoints" / "step-10")
    assert content["progress"]["num_skipped"] == 2
    assert content["num_optimizer_steps"] == 8
    finite = [tensor.isfinite().all() for (_, key), tensor in tensors(run_dir, 10).items() if "generator" not in key]
    assert finite
    assert all(finite)
