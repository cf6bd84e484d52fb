from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config import RunConfig
from launcher.stages import STAGES, Differs, Finished, Unfinished, begin, fingerprint, finish, state_of


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    data = tmp_path / "rows.json"
    data.write_text("[]")
    return RunConfig.model_validate(
        {"run": {"name": "small"}, "model": {"from_scratch": {}}, "data": {"path": str(data)}}
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def changed(config: RunConfig, section: str, **values: object) -> RunConfig:
    tree = config.model_dump(mode="json")
    tree[section] |= values
    return RunConfig.model_validate(tree)


def do_prepare(config: RunConfig, run_dir: Path) -> None:
    begin("prepare", config, run_dir, again=False)
    (run_dir / "data").mkdir(exist_ok=True)
    (run_dir / "data" / "summary.json").write_text("{}")
    finish("prepare", run_dir, {"rows": 3}, 1.5)


def test_a_stage_is_finished_when_its_record_is_written(config: RunConfig, run_dir: Path) -> None:
    assert state_of("prepare", config, run_dir) == Unfinished()
    begin("prepare", config, run_dir, again=False)
    (run_dir / "data").mkdir()
    assert state_of("prepare", config, run_dir) == Unfinished()
    finish("prepare", run_dir, {"rows": 3}, 1.5)
    state = state_of("prepare", config, run_dir)
    assert isinstance(state, Finished)
    assert state.record["counts"] == {"rows": 3}
    assert state.record["versions"]["torch"]
    assert not (run_dir / "prepare.started.json").exists()


def test_a_record_without_its_files_is_not_finished(config: RunConfig, run_dir: Path) -> None:
    do_prepare(config, run_dir)
    (run_dir / "data").rename(run_dir / "gone")
    assert state_of("prepare", config, run_dir) == Unfinished()


def test_a_changed_setting_is_named(config: RunConfig, run_dir: Path) -> None:
    do_prepare(config, run_dir)
    state = state_of("prepare", changed(config, "data", sequence_length=77), run_dir)
    assert state == Differs(("data.sequence_length: was 1024, is now 77",))


def test_a_path_is_compared_by_where_it_leads(
    config: RunConfig, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do_prepare(config, run_dir)
    monkeypatch.chdir(tmp_path)
    assert isinstance(state_of("prepare", changed(config, "data", path="rows.json"), run_dir), Finished)
    sources = [{"path": str(tmp_path / "rows.json"), "weight": 2.0}]
    do_prepare(changed(config, "data", path=None, sources=sources), run_dir)
    relative = [sources[0] | {"path": "run/../rows.json"}]
    assert isinstance(state_of("prepare", changed(config, "data", path=None, sources=relative), run_dir), Finished)
    (tmp_path / "other.json").write_text("[]")
    other = state_of(
        "prepare", changed(config, "data", path=None, sources=[sources[0] | {"path": "other.json"}]), run_dir
    )
    assert isinstance(other, Differs)
    assert [line.partition(":")[0] for line in other.differences] == ["data.sources"]


def test_changed_data_is_noticed(config: RunConfig, run_dir: Path) -> None:
    do_prepare(config, run_dir)
    config.data.path.write_text("[1]")
    state = state_of("prepare", config, run_dir)
    assert isinstance(state, Differs)
    assert state.differences[0].startswith("data (content): was")


def test_a_part_begun_with_other_settings_differs(config: RunConfig, run_dir: Path) -> None:
    do_prepare(config, run_dir)
    begin("train", config, run_dir, again=False)
    (run_dir / "checkpoints").mkdir()
    assert state_of("train", config, run_dir) == Unfinished()
    assert state_of("train", changed(config, "training", lr=0.5), run_dir) == Differs(
        ("training.lr: was 2e-05, is now 0.5",)
    )


def test_the_layout_of_the_work_may_change(config: RunConfig, run_dir: Path) -> None:
    do_prepare(config, run_dir)
    begin("train", config, run_dir, again=False)
    (run_dir / "checkpoints").mkdir()
    assert state_of("train", changed(config, "training", num_workers=4, max_failures=9), run_dir) == Unfinished()


def test_how_gradients_are_summed_is_part_of_the_result(config: RunConfig, run_dir: Path) -> None:
    asked = fingerprint("train", config, run_dir)
    assert asked["deepspeed.grad_accum_dtype"] == "fp32"
    assert fingerprint("train", changed(config, "deepspeed", grad_accum_dtype="bf16"), run_dir) != asked


def test_how_hard_a_jury_or_a_further_model_is_asked_may_change(run_dir: Path, tmp_path: Path) -> None:
    endpoint = {"type": "api", "base_url": "http://127.0.0.1:1/v1", "model": "m"}

    def config(**more: object) -> RunConfig:
        asked = endpoint | more
        tree = {
            "run": {"name": "small"},
            "model": {"from_scratch": {}},
            "data": {"path": str(tmp_path / "rows.json")},
            "generation": {"models": {"rival": asked}},
            "judge": {"type": "jury", "judges": [asked, endpoint]},
        }
        return RunConfig.model_validate(tree)

    for stage, output in (("generate", "responses"), ("judge", "scores")):
        begin(stage, config(), run_dir, again=False)
        (run_dir / output).mkdir()
        assert state_of(stage, config(concurrency=2, timeout_s=3.0), run_dir) == Unfinished()
        assert isinstance(state_of(stage, config(model="other"), run_dir), Differs)


def test_another_result_before_makes_what_follows_differ(config: RunConfig, run_dir: Path) -> None:
    do_prepare(config, run_dir)
    begin("train", config, run_dir, again=False)
    for name in ("checkpoints", "metrics.jsonl"):
        (run_dir / name).mkdir()
    finish("train", run_dir, {}, 1.0)
    other = changed(config, "data", train_on="all")
    begin("prepare", other, run_dir, again=True)
    (run_dir / "data").mkdir()
    finish("prepare", run_dir, {}, 1.0)
    state = state_of("train", other, run_dir)
    assert isinstance(state, Differs)
    assert state.differences[0].startswith("result of prepare")


def test_doing_it_again_loses_nothing(config: RunConfig, run_dir: Path) -> None:
    do_prepare(config, run_dir)
    begin("prepare", config, run_dir, again=True)
    assert not (run_dir / "data").exists()
    assert [path.parent.name for path in run_dir.glob("superseded/*/data/summary.json")] == ["data"]


def test_stages_that_know_their_rows_keep_them_in_place(config: RunConfig, run_dir: Path) -> None:
    (run_dir / "scores").mkdir()
    (run_dir / "scores" / "base.jsonl").write_text("{}\n")
    begin("judge", config, run_dir, again=True)
    assert (run_dir / "scores" / "base.jsonl").read_text() == "{}\n"
    assert len(list(run_dir.glob("superseded/*/scores/base.jsonl"))) == 1


def test_the_stages_are_the_six_in_order() -> None:
    assert STAGES == ("prepare", "train", "export", "generate", "judge", "report")
