"""What a run tells of the prepared data, and which models answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.run import answering_models, told_of, told_of_rows


def counts(**more: Any) -> dict[str, Any]:
    train = {"rows": 1200, "packs": 130, "tokens": 64000, "target_tokens": 8000, "utilisation": 0.9615}
    splits = {"train": train, "validation": {"rows": 60}, "test": {"rows": 140}}
    of_rows = {"splits": splits, "format": "alpaca", "longest_row_tokens": 500, "sequence_length": 512}
    return of_rows | {"dropped": {}, "truncated": {}} | more


def test_nothing_is_left_out_in_silence() -> None:
    told = told_of(
        counts(
            dropped={"overlong": 3, "bad row": 2},
            truncated={"response": 2},
            noticed={"odd": 1},
            unknown_fields={"mood": {"rows": 3, "first": "a.json, row 7"}},
            longest_row_tokens=3000,
            leaks={"exact_train_rows": 4, "near_train_rows": 1},
        ),
        "warn",
    )
    assert told[:8] == [
        "1,200 train, 60 validation, 140 test rows, read as alpaca",
        "train: 8,000 of 64,000 tokens are targets, 96.2% of 130 packs is filled",
        "dropped, overlong: 3 rows",
        "dropped, bad row: 2 rows (data/rejected.jsonl)",
        "the longest row has 3,000 tokens, data.sequence_length is 512",
        "cut, response: 2 rows",
        "kept, odd: 1 rows",
        "the field mood is not read: 3 rows, the first a.json, row 7",
    ]
    assert told[8].startswith(
        "leaks: train rows that ask a test row's question: 4, near duplicates of a test row: 1; they stay in training"
    )


def test_dropped_leaks_are_told_as_dropped() -> None:
    assert "they were left out" in told_of(counts(leaks={"exact_train_rows": 0, "near_train_rows": 2}), "drop")[2]


def test_clean_data_takes_two_lines() -> None:
    assert len(told_of(counts(leaks={"exact_train_rows": 0, "near_train_rows": 0}), "warn")) == 2


def test_rows_that_are_not_packed_are_told_too() -> None:
    assert told_of(
        counts(splits=counts()["splits"] | {"train": counts()["splits"]["train"] | {"utilisation": None}}), "warn"
    )[1].endswith("are targets, not packed")


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
