"""What a run tells of the prepared data, and which models answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.run import answering_models, told_of, told_of_rows


def counts(**more: Any) -> dict[str, Any]:
    train = {"rows": 1200, "packs": 130, "tokens": 64000, "target_tokens": 8000, "utilisation": 0.9615}
    return {"splits": {"train": train}, "dropped": {}, "truncated": {}} | more


def test_nothing_is_left_out_in_silence() -> None:
    told = told_of(
        counts(
            dropped={"overlong": 3},
            truncated={"response": 2},
            leaks={"exact_train_rows": 4, "near_train_rows": 1},
        ),
        "warn",
    )
    assert told[0] == "1,200 rows in 130 packs, 8,000 of 64,000 tokens are targets, 96.2% of the packs is filled"
    assert told[1:3] == ["dropped, overlong: 3 rows", "cut, response: 2 rows"]
    assert told[3].startswith(
        "leaks: 4 train rows equal a test row, 1 are near duplicates of one: they stay in training"
    )


def test_dropped_leaks_are_told_as_dropped() -> None:
    assert "they were left out" in told_of(counts(leaks={"exact_train_rows": 0, "near_train_rows": 2}), "drop")[1]


def test_clean_data_takes_one_line() -> None:
    assert len(told_of(counts(leaks={"exact_train_rows": 0, "near_train_rows": 0}), "warn")) == 1


def test_every_row_asked_for_is_told_in_its_state() -> None:
    judged = {"asked": 12, "scored": 10, "judge_failed": 1, "too_long": 1, "mean": 43.21, "reused": 3}
    nothing = {"asked": 2, "skipped": 2, "mean": None}
    assert told_of_rows({"models": {"base": judged, "tuned": nothing}}) == [
        "base: mean 43.2; 10 scored, 1 judge_failed, 1 too_long of 12 asked",
        "tuned: 2 skipped of 2 asked",
    ]
    generated = {"asked": 3, "generated": 2, "too_long": 0, "generation_failed": 1, "num_prompt_tokens": 7}
    assert told_of_rows({"models": {"base": generated}}) == ["base: 2 generated, 1 generation_failed of 3 asked"]


def test_an_adapter_is_served_on_top_of_the_base(tmp_path: Path) -> None:
    tree = {
        "run": {"name": "small"},
        "model": {"name_or_path": "owner/base", "revision": "abc"},
        "data": {"path": "rows.json"},
        "generation": {"models": {"rival": {"path": "owner/rival"}}},
    }
    config = RunConfig.model_validate(tree)
    models = answering_models(config, tmp_path)
    assert list(models) == ["base", "tuned", "rival"]
    assert models["tuned"].path == str(tmp_path / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    tuned = answering_models(config, tmp_path)["tuned"]
    assert (tuned.path, tuned.revision, tuned.adapter) == ("owner/base", "abc", str(tmp_path / "model"))
