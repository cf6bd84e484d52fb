import json
from unittest.mock import Mock

import pytest
import torch

from trainer.config import ProfileConfig, TrainerConfig
from trainer.errors import TrainerError
from trainer.flops import Arithmetic, arithmetic_of, measured_flops, peak_flops
from trainer.metrics import StepTrace, append, cut_after, traced, validation_losses
from trainer.model import load_base
from trainer.trackers import log_row, open_trackers
from trainer.tuning import apply_tuning


def config(**training):
    return TrainerConfig.model_validate(
        {"model": {"from_scratch": {"vocab_size": 300}}, "data": {"path": "rows.json"}, "training": training}
    )


def train_row(step):
    return {"kind": "train", "step": step, "loss": 3.0 - step, "max_steps": 9, "mfu": None}


def test_a_restart_cuts_rows_behind_the_checkpoint_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, {"kind": "validation", "step": 0, "loss": 4.0})
    for step in (1, 2, 3):
        append(path, train_row(step))
    append(path, {"kind": "validation", "step": 3, "loss": 2.0})
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    cut_after(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert validation_losses(path) == [4.0]
    cut_after(path, -1)
    assert path.read_text() == ""


def test_no_metrics_yet(tmp_path):
    cut_after(tmp_path / "metrics.jsonl", 3)
    assert validation_losses(tmp_path / "metrics.jsonl") == []


def test_utilisation_of_a_hand_counted_step():
    arithmetic = Arithmetic(flops_per_token=10.0, flops_per_square=2.0, peak_flops=1000.0)
    assert arithmetic.utilisation(30, 100, 0.5) == pytest.approx((300 + 200) / 0.5 / 1000)


@pytest.mark.parametrize(("method", "trained_share"), [("full", 1), ("lora", 0)])
def test_operations_of_the_tiny_base_are_counted_by_hand(tiny_base, method, trained_share):
    base = load_base(config().model, tiny_base.parent, torch.float32, torch.device("cpu"), 96)
    tuned = TrainerConfig.model_validate(
        config().model_dump() | {"tuning": {"method": method} | ({"rank": 4} if method == "lora" else {})}
    )
    model = apply_tuning(base, tuned.tuning, str(tiny_base), str(tiny_base))
    arithmetic = arithmetic_of(model, torch.device("cpu"), torch.float32, 2)
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 300 * 32
    adapters = 0 if method == "full" else 2 * 4 * sum([64, 48, 48, 64, 96, 96, 96])
    assert arithmetic.flops_per_token == (6 if trained_share else 4) * matrices + 6 * adapters
    assert arithmetic.flops_per_square == 6 * 2 * 32


def test_known_devices_have_the_makers_rate_and_others_a_measured_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 PCIe")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == 756e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == 989.4e12
    assert 1e9 < measured_flops(torch.device("cpu"), torch.float32) < 1e14


def test_the_trace_holds_the_steps_that_were_asked_for(tmp_path):
    trace = StepTrace(tmp_path, rank=1)
    for step in range(1, 5):
        with traced(ProfileConfig(start=2, steps=2), step, trace):
            torch.ones(2, step) @ torch.ones(step, 3)
    events = json.loads((tmp_path / "profile" / "rank-1.json").read_text())["traceEvents"]
    shapes = [event["args"]["Input Dims"] for event in events if event.get("name") == "aten::mm"]
    assert shapes == [[[2, 2], [2, 3]], [[2, 3], [3, 3]]]


@pytest.mark.parametrize(
    ("tracker", "module", "written"),
    [
        ("tensorboard", "tensorboardX", "tensorboard/events*"),
        ("wandb", "wandb", "wandb/offline-run-*"),
        ("mlflow", "mlflow", "mlflow.db"),
        ("swanlab", "swanlab", "swanlab/*"),
    ],
)
def test_trackers_write_offline(tmp_path, monkeypatch, tracker, module, written):
    pytest.importorskip(module)
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run_dir.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    trackers = open_trackers(config(trackers=[tracker], trackers_offline=True), run_dir)
    for step in (1, 2):
        log_row(trackers, train_row(step))
    assert len(trackers) == 1, "the tracker failed and was dropped"
    trackers[0].close()
    assert list(run_dir.glob(written))
    assert list(elsewhere.iterdir()) == []


def filed_under(tracker, run_dir):
    words = {"tracker_entity": "the-team", "tracker_group": "the-group", "tracker_tags": ["first-tag", "second-tag"]}
    (opened,) = open_trackers(config(trackers=[tracker], trackers_offline=True, **words), run_dir)
    opened.close()
    return opened


def test_wandb_gets_entity_group_and_tags(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    run = filed_under("wandb", tmp_path)._run
    assert (run.entity, run.group, run.tags) == ("the-team", "the-group", ("first-tag", "second-tag"))


def test_swanlab_gets_workspace_group_and_tags(tmp_path, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.chdir(tmp_path)
    filed_under("swanlab", tmp_path)
    (record,) = (tmp_path / "swanlab").rglob("*.swanlab")  # the configuration has a file of its own beside it
    written = record.read_bytes()
    assert [word for word in (b"the-team", b"the-group", b"first-tag", b"second-tag") if word not in written] == []


def test_mlflow_gets_the_tags(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    words = {"trackers": ["mlflow"], "tracker_tags": ["first-tag"], "tracker_project": "the-project"}
    (opened,) = open_trackers(config(trackers_offline=True, **words), tmp_path)
    (run,) = mlflow.search_runs(experiment_names=["the-project"], output_format="list")
    opened.close()
    assert run.data.tags["first-tag"] == "true"


@pytest.mark.parametrize(
    ("trackers", "key", "value"),
    [
        ([], "tracker_tags", ["a"]),
        (["tensorboard"], "tracker_group", "a"),
        (["mlflow"], "tracker_entity", "a"),
        (["mlflow"], "tracker_group", "a"),
    ],
)
def test_a_word_that_no_tracker_takes_is_refused(trackers, key, value):
    with pytest.raises(ValueError, match=f"{key} is for wandb"):
        config(trackers=trackers, **{key: value})


def test_a_tracker_that_cannot_be_started_is_told_with_the_ways_out(tmp_path, monkeypatch):
    close = Mock()
    monkeypatch.setattr("trainer.trackers.TensorBoard.close", close)
    monkeypatch.setattr("trainer.trackers.WeightsAndBiases", Mock(side_effect=PermissionError("no API key")))
    with pytest.raises(TrainerError, match=r"wandb can't be started \(PermissionError: no API key\).*trackers_offline"):
        open_trackers(config(trackers=["tensorboard", "wandb"]), tmp_path)
    close.assert_called_once_with()


def test_a_tracker_that_fails_is_dropped_and_the_others_go_on():
    class Fails:
        def log(self, numbers, step):
            raise OSError("the network is down")

        def close(self):
            pass

    class Keeps:
        def __init__(self):
            self.seen = []

        def log(self, numbers, step):
            self.seen.append((step, numbers))

        def close(self):
            pass

    keeps = Keeps()
    trackers = [Fails(), keeps]
    log_row(trackers, train_row(1))
    log_row(trackers, train_row(2))
    assert trackers == [keeps]
    assert keeps.seen[1] == (2, {"train/loss": 1.0, "train/max_steps": 9.0})
