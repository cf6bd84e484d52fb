from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.progress import MetricsFollower, describe


def row(step: int, **more: Any) -> dict[str, Any]:
    numbers = {"loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s_per_device": 1234.5, "mfu": 0.421}
    sizes = {"memory_bytes": 3 * 2**29, "padding_share": 0.031}
    return {"kind": "train", "step": step, "max_steps": 10} | numbers | sizes | more


def test_a_line_tells_step_loss_rate_speed_and_time_left() -> None:
    line = describe(row(4), steps_per_s=0.001)
    assert line == (
        "step 4/10  loss 2.5000  lr 1.00e-03  grad norm 0.5  1,234 tokens/s a device  MFU 42.1%  1.5 GiB  padding 3.1%"
        "  ETA 1:40:00"
    )
    assert "grad norm" not in describe(row(4, grad_norm=None), None)
    assert describe(row(4, loss_scale=4096.0), None).endswith("loss scale 4096")
    assert describe({"kind": "validation", "step": 4, "loss": 1.25}, None) == "step 4  validation loss 1.2500"
    saved = {"kind": "checkpoint", "step": 4, "num_bytes": 2_500_000, "write_s": 1.25, "stalled_s": 0.31}
    assert describe(saved, None) == "step 4  checkpoint: 2.5 MB written in 1.2 s, training waited 0.3 s"


def test_only_complete_new_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1)) + "\n")
    shown: list[str] = []
    follower = MetricsFollower(path, shown.append, every_s=0)
    follower.tick()
    assert shown == []  # it stood there before
    with path.open("a") as file:
        file.write(json.dumps(row(2)) + "\n" + json.dumps(row(3))[:9])
    follower.tick()
    assert [line.split()[1] for line in shown] == ["2/10"]
    with path.open("a") as file:
        file.write(json.dumps(row(3))[9:] + "\n")
    follower.tick()
    assert [line.split()[1] for line in shown] == ["2/10", "3/10"]


def test_a_file_cut_back_by_a_resume_is_followed_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in (1, 2, 3)))
    shown: list[str] = []
    follower = MetricsFollower(path, shown.append, every_s=0)
    path.write_text(json.dumps(row(1)) + "\n")
    follower.tick()
    with path.open("a") as file:
        file.write(json.dumps(row(2)) + "\n")
    follower.tick()
    assert [line.split()[1] for line in shown] == ["2/10"]


def test_validation_and_the_last_step_are_always_shown(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    shown: list[str] = []
    follower = MetricsFollower(path, shown.append, every_s=3600)
    rows = [row(1), row(2), {"kind": "validation", "step": 2, "loss": 1.0}, row(10)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    follower.tick()
    assert [line.split()[1] for line in shown] == ["1/10", "2", "10/10"]


def test_a_file_replaced_by_a_resume_is_followed_on_however_long_it_has_become(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in (1, 2, 3)))
    shown: list[str] = []
    follower = MetricsFollower(path, shown.append, every_s=0)
    fresh = tmp_path / "fresh"
    rows = [{**row(step), "loss": 2.25 + step} for step in range(1, 8)]
    fresh.write_text("".join(json.dumps(r) + "\n" for r in rows))
    fresh.replace(path)
    follower.tick()
    with path.open("a") as file:
        file.write(json.dumps({"kind": "skipped", "step": 8, "cause": "the loss is nan"}) + "\n")
    follower.tick()
    assert [line.split()[1] for line in shown] == ["7/10", "8"]
    assert shown[-1] == "step 8  skipped: the loss is nan"
