"""Checkpoints of real DeepSpeed engines on one and two gloo ranks: exact, portable, and whole after any crash."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LAYOUTS = ["zero0-fp32", "zero0-bf16", "zero1-bf16", "zero2-fp32", "zero2-bf16", "zero3-fp32", "zero3-bf16"]
LAYOUTS += ["zero1-bf16-sums-in-bf16", "zero2-bf16-sums-in-bf16"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the three runs of engine_scenarios.py found."""
    folder = tmp_path_factory.mktemp("engines")
    for name, num_ranks in (("from_one", 1), ("two", 2), ("to_one", 1)):
        script = Path(__file__).with_name("engine_scenarios.py")
        command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", num_ranks, script]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            [str(part) for part in [*command, folder, name]],
            env=environment, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("from_one", "two", "to_one")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_restored_engine_goes_on_bit_for_bit(found, layout):
    of_layout = found["two"][layout]
    uninterrupted, resumed = of_layout["losses"]
    assert resumed == uninterrupted
    assert len(set(resumed)) == 3
    assert of_layout["restored"]  # weights, moments and forward weights, as DeepSpeed itself assembles them
    assert of_layout["after"]  # and again three steps later
    assert of_layout["progress"]


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(
    ("name", "run", "reference"),
    [
        ("one rank on two", "two", ("from_one", "losses")),
        ("two ranks on one", "to_one", ("two", "two losses")),
    ],
)
def test_another_world_size_and_stage_get_the_same_state(found, name, run, reference, stage):
    elsewhere = found[run][f"{name}, zero{stage}"]
    assert elsewhere["restored"]
    assert elsewhere["losses"] == pytest.approx(found[reference[0]][reference[1]], abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_refused_step_leaves_no_trace(found, layout):
    """NaN in one rank's gradient: the step is refused on both, and the steps after it are as if it had not been."""
    guarded = found["two"][f"guard {layout}"]
    assert guarded["causes"] == [["the gradient is not finite", "the loss is nan", None]] * 2
    assert guarded["untouched"]
    assert guarded["as without"]


def test_damage_that_one_rank_sees_is_passed_over_by_all(found):
    damage = found["two"]["damage"]
    assert damage["left"] == ["step-1", "step-2.damaged", "step-3.damaged"]
    assert damage["ranks"][0] == damage["ranks"][1]
    step, first, second = damage["ranks"][0]
    assert step == 1
    for words in (first, second):  # the second start finds no fresh beginning either
        assert re.search(r"every checkpoint in .* is damaged.*step-1/seal\.json.*step-2\.damaged was set aside", words)


def test_a_number_that_is_not_finite_is_never_saved(found):
    everywhere, left = found["two"]["not finite"]
    assert everywhere[0] == everywhere[1]
    assert "rank 1: exp_avg of out.bias is not finite" in everywhere[0]
    assert left is False  # not even the folder


def test_an_attempt_that_sleeps_beside_its_successor_leaves_it_alone(found):
    attempts = found["two"]["two attempts"]
    assert attempts["before"] == ["step-8.partial-A1"]
    assert attempts["with a successor"] == ["step-9.partial-A2"]
    for words in (attempts["sealing"], attempts["saving"]):
        assert "attempt 1 of this run ends: attempt 2 has taken it over" in words
    assert "step-9.partial-A2" in attempts["tidied by the first"]
    assert attempts["in the end"] == ["step-11", "step-9"]


def test_the_newest_and_the_best_stay(found):
    assert found["to_one"]["kept"] == [
        ["step-1"],
        ["step-2"],
        ["step-2", "step-3"],
        ["step-2", "step-4"],
        ["step-5"],
        ["step-6"],
    ]


def test_a_rank_that_cannot_write_stops_all_ranks(found):
    everywhere, left = found["two"]["one rank cannot write"]
    assert everywhere[0] == everywhere[1]
    assert re.search(r"needs [\d,]+ bytes in .* failed: rank 1: OSError: .*File too large", everywhere[0])
    assert left == ["step-9"]  # saved when it could, and the failed attempt's leftovers are gone


def test_a_save_killed_before_any_file_operation_leaves_a_whole_checkpoint(found):
    trials = found["to_one"]["crashes"]["trials"]
    assert len(trials) > 20
    assert [status for status, *_ in trials] == [-9] * (len(trials) - 1) + [0]
    for _, newest, resumed, repaired, left in trials:
        assert newest in ("step-1", "step-2")
        assert resumed == 0
        assert repaired == 0  # the next save works, and clears away what the dead one left
        assert left == ["step-3"]
    assert {newest for _, newest, *_ in trials} == {"step-1", "step-2"}


def test_every_file_is_on_disk_before_the_folder_gets_its_name(found):
    order = found["to_one"]["order"]
    rename = order.index("rename step-2.partial step-2")
    for name in ("rank-0.safetensors", "seal.json"):
        writes = [number for number, operation in enumerate(order) if operation == f"write {name}"]
        assert writes
        assert max(writes) < order.index(f"fsync {name}") < rename
    assert order.index("fsync rank-0.safetensors") < order.index("open seal.json")
    assert order.index("fsync step-2.partial") < rename
    assert order[rename + 1] == "fsync checkpoints"
    removal = order.index("rename step-1 step-1.removed")
    assert rename + 1 < removal < min(number for number, o in enumerate(order) if o.startswith("remove "))


def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_is_needed(found):
    *limited, full, (num_bytes, _) = found["to_one"]["disk full"]
    assert len(limited) == 4
    for words, newest in limited:
        assert re.search(rf"needs {num_bytes} bytes in .* failed: .*File too large", words)
        assert newest == "step-1"
    words, newest = full
    assert f"has 1,000 bytes free, the checkpoint needs {num_bytes}" in words
    assert newest == "step-1"
