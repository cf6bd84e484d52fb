from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from launcher import plan
from launcher.config import RunConfig
from launcher.errors import ConfigError
from launcher.gpus import Gpu
from launcher.ray_cluster import Resources, check_fits

UNSEEN = plan.FirstLook()  # of a check that is not about rows


def make(tmp_path: Path, **sections: Any) -> RunConfig:
    data = tmp_path / "rows.json"
    data.write_text("[]")
    tree = {"run": {"name": "small"}, "model": {"from_scratch": {}}, "data": {"path": str(data)}}
    return RunConfig.model_validate(tree | sections)


def problem(config: RunConfig, look: plan.FirstLook | None = UNSEEN) -> str:
    with pytest.raises(ConfigError) as caught:
        plan.check(config, look=look)
    return str(caught.value)


def test_a_sound_configuration_passes(tmp_path: Path) -> None:
    plan.check(make(tmp_path), look=UNSEEN)


def test_empty_data(tmp_path: Path) -> None:
    config = make(tmp_path)
    config.data.path.write_text("")
    assert "is empty" in problem(config)


def test_a_model_folder_must_hold_safe_weights(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    config = make(tmp_path, model={"name_or_path": str(folder)})
    assert "no such folder" in problem(config)
    folder.mkdir()
    assert "no config.json" in problem(config)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "no weights" in problem(config)
    (folder / "pytorch_model.bin").write_text("")
    assert "can run code" in problem(config)
    (folder / "model.safetensors").write_text("")
    assert "model.safetensors is cut short or no safetensors file (0 bytes)" in problem(config)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    plan.check(config, look=UNSEEN)


def test_a_head_size_that_vllm_cannot_serve(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 4}
    config = make(tmp_path, model={"from_scratch": sizes}, cluster={"device": "cpu"})
    assert "hidden_size / num_heads (64 / 4 = 16) must be one of 32, 64, 80" in problem(config)


def test_what_vllm_cannot_serve_is_refused_where_it_would_be_served(tmp_path: Path) -> None:
    prompt = make(tmp_path, tuning={"method": "prompt"}, data={"path": str(tmp_path / "rows.json"), "packing": False})
    assert "vLLM serves no tuned prompts" in problem(prompt)
    plan.check(prompt, ["prepare", "train", "export"], look=UNSEEN)
    dora = {"method": "lora", "dora": True}
    assert "set export.merge: true" in problem(make(tmp_path, tuning=dora))
    plan.check(make(tmp_path, tuning=dora, export={"merge": True}), look=UNSEEN)


def test_a_judge_without_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    judge = {"type": "api", "base_url": "http://localhost:1/v1", "model": "m", "api_key_env": "MY_KEY"}
    assert "MY_KEY: that environment variable is not set" in problem(make(tmp_path, judge=judge))
    monkeypatch.setenv("MY_KEY", "x")
    plan.check(make(tmp_path, judge=judge), look=UNSEEN)


def test_a_further_model_that_is_not_there_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    endpoint = {"type": "api", "base_url": "http://localhost:1/v1", "model": "m", "api_key_env": "MY_KEY"}
    models = {
        "one": str(tmp_path / "one"),
        "two": {"path": "owner/two", "adapter": str(tmp_path / "two")},
        "three": endpoint,
    }
    found = problem(make(tmp_path, generation={"models": models}))
    assert f"generation.models.one.path = {tmp_path}/one: no such folder" in found
    assert f"generation.models.two.adapter = {tmp_path}/two: has no adapter_config.json" in found
    assert "generation.models.three.api_key_env = MY_KEY: that environment variable is not set" in found


def test_more_workers_than_processors(tmp_path: Path) -> None:
    config = make(tmp_path, training={"num_workers": 8, "threads_per_worker": 2}, cluster={"device": "cpu"})
    with pytest.raises(ConfigError, match=r"training.num_workers = 8 needs 16 CPUs; there are 4"):
        check_fits(config, Resources(num_cpus=4, num_gpus=0))
    check_fits(config, Resources(num_cpus=16, num_gpus=0))


def test_more_workers_than_gpus(tmp_path: Path) -> None:
    config = make(tmp_path, training={"num_workers": 8}, generation={"engines": 4, "tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match="needs 8 GPUs; there are 2") as caught:
        check_fits(config, Resources(num_cpus=4, num_gpus=2))
    assert "generation.engines = 4 needs 8 GPUs; there are 2" in str(caught.value)


def test_benchmarks_are_refused_where_the_harness_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(tmp_path, generation={"lm_eval": ["arc_easy"]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert "pip install 'lm-eval[api]>=0.4.9'`, or take generation.lm_eval out" in problem(config)
    plan.check(config, ["prepare", "train", "export"], look=UNSEEN)


def test_bf16_on_cards_that_lack_it_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (
        Gpu("card", uuid, 16 * 2**30, capability) for uuid, capability in (("GPU-a", (7, 0)), ("GPU-b", (8, 0)))
    )
    for gpus, refused in (((old,), True), ((old, new), False), ((new,), False)):
        monkeypatch.setattr("launcher.ray_cluster.visible_gpus", lambda gpus=gpus: gpus)
        found = plan.problems(make(tmp_path), ["train"])
        assert any("training.precision: bf16 needs GPUs of compute capability 8.0" in line for line in found) is refused
    monkeypatch.setattr("launcher.ray_cluster.visible_gpus", lambda: (old,))
    assert plan.problems(make(tmp_path, training={"precision": "fp16"}), ["train"]) == []


@pytest.mark.parametrize(("card", "refused"), [("v100", True), ("h100", False), ("gpu-large", False)])
def test_bf16_on_cards_that_slurm_is_asked_for(tmp_path: Path, card: str, refused: bool) -> None:
    config = make(tmp_path, cluster={"address": "auto", "device": "cuda", "slurm": {"gpus_per_node": f"{card}:1"}})
    found = plan.problems(config, ["train"])
    assert any(line.endswith("these have 7.0: set training.precision to fp16") for line in found) is refused


def with_rows(tmp_path: Path, rows: list[dict[str, str]]) -> RunConfig:
    config = make(tmp_path)
    config.data.path.write_text(json.dumps(rows))
    return config


ROWS = [{"instruction": f"What is {i} + {i}?", "output": f"It is {2 * i}."} for i in range(40)]


def test_a_bad_row_is_refused_before_anything_starts(tmp_path: Path) -> None:
    found = problem(with_rows(tmp_path, [ROWS[0] | {"output": ""}, *ROWS[1:]]), look=None)
    assert "rows.json, row 1: output: is empty\nnothing was started" in found
    plan.check(with_rows(tmp_path, [{}]), ["train", "export"])


def test_plan_reports_what_the_first_rows_show(tmp_path: Path) -> None:
    config = with_rows(tmp_path, ROWS)
    look = plan.first_look(config)
    assert look == plan.FirstLook(notes=("all 40 rows were looked at: alpaca",))
    assert "\nrows       all 40 rows were looked at: alpaca\n" in plan.describe(config, tmp_path / "run", look)


def test_a_path_that_is_nowhere_is_named_with_what_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base-8b").mkdir(parents=True)
    sources = [{"path": "row.json"}, {"path": "nothing/at/all"}, {"path": "owner/rows"}]
    found = problem(make(tmp_path, data={"sources": sources}, model={"name_or_path": "./runs/base-7b"})).splitlines()
    assert f"data: there is no file or folder row.json in {tmp_path}; near it: rows.json" in found
    assert f"data: there is no file or folder nothing/at/all in {tmp_path}" in found
    folder = "no such folder, and not a hub id (owner/name); near it: runs/base-8b"
    assert f"model.name_or_path = ./runs/base-7b: {folder}" in found
    assert not any("owner/rows" in line for line in found)


def test_rows_that_are_not_there_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ask_apart", lambda *_, **__: pytest.fail("a process was started"))
    config = make(tmp_path)
    config.data.path.unlink()
    assert plan.first_look(config) == plan.FirstLook()
    assert plan.first_look(make(tmp_path, model={"name_or_path": str(tmp_path / "nothing")})) == plan.FirstLook()


def test_a_look_that_does_not_end_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_FIRST_LOOK_S", 0.01)
    (note,) = plan.first_look(make(tmp_path)).notes
    assert "did not end within 0.01 s" in note


def test_runs_of_the_same_rows_share_one_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[RunConfig] = []

    def look(config: RunConfig) -> plan.FirstLook:
        looked.append(config)
        return plan.FirstLook(notes=(config.data.template,))

    monkeypatch.setattr(plan, "first_look", look)
    data = {"path": str(tmp_path / "rows.json"), "template": "chatml"}
    configs = [make(tmp_path), make(tmp_path, data=data), make(tmp_path, training={"lr": 1e-4})]
    assert [look.notes for look in plan.first_looks(configs)] == [("alpaca",), ("chatml",), ("alpaca",)]
    assert looked == configs[:2]
