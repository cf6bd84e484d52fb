"""The commands about finished runs and about files made elsewhere, as a person types them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from evaluation.errors import EvaluationError
from launcher.cli import app
from launcher.errors import ConfigError

make_run = runpy.run_path(str(Path(__file__).parents[1] / "evaluation" / "report" / "synthetic.py"))["make_run"]


def launcher(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs over one test set; of the second, category reverse scores 10 and the others 70."""
    folder = tmp_path_factory.mktemp("runs")
    old, new = (make_run(folder / name, num_rows=50, seed=1, tuned_mean=60) for name in ("old", "new"))
    path = new / "scores/tuned.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row |= {"state": "scored", "score": 10 if row["category"] == "reverse" else 70}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [old, new]


@pytest.mark.parametrize(
    ("gates", "status"),
    [
        (["--min-score", "50"], 0),
        (["--min-score", "59"], 1),
        (["--min-score", "50", "--min-score", "reverse=50"], 1),
        (["--min-score", "50", "--min-score", "count=70", "--max-drop", "count=5"], 0),
        (["--max-drop", "reverse=20"], 1),
        (["--min-score", "maths=1"], 2),
        (["--significant"], 1),
    ],
)
def test_gates_end_in_their_status(runs: list[Path], gates: list[str], status: int) -> None:
    answer = launcher("compare", *runs, *gates)
    assert answer.exit_code == status, answer.output


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (["--min-score", "much"], "--min-score much: points from 0 to 100"),
        (["--max-drop", "count=-1"], "--max-drop count=-1: points from 0 to 100"),
        (["--min-score", "1", "--min-score", "2"], "--min-score 2: this gate is given twice"),
    ],
)
def test_a_gate_that_says_nothing_is_refused(runs: list[Path], gates: list[str], message: str) -> None:
    error = launcher("compare", *runs, *gates).exception
    assert isinstance(error, ConfigError) and message in str(error)


def test_score_prints_the_four_numbers(tmp_path: Path) -> None:
    rows = [{"preference": value} for value in (2, 2, 1, 0, None)]
    (tmp_path / "annotations.json").write_text(json.dumps(rows), encoding="utf-8")
    found = json.loads(launcher("score", tmp_path / "annotations.json", "--json").output)
    assert found["win_rate"] == 62.5  # two wins, a draw, a loss; the null counts as asked alone
    assert found["standard_error"] == pytest.approx(23.936, abs=1e-3)
    assert (found["num_asked"], found["num_scored"]) == (5, 4)


@pytest.mark.parametrize("content", ["[]", "{", '[{"preference": null}]', '[{"score": 1}]'])
def test_score_ends_with_2_where_there_is_no_measurement(tmp_path: Path, content: str) -> None:
    (tmp_path / "annotations.json").write_text(content, encoding="utf-8")
    answer = launcher("score", tmp_path / "annotations.json", "--json")
    assert answer.exit_code == 2 or (isinstance(answer.exception, ConfigError) and answer.exception.code == 2)


def test_files_without_a_measurement_end_in_status_2(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.json"
    nothing.write_text('[{"preference": null}]', encoding="utf-8")
    assert launcher("score", nothing).exit_code == 2
    for words in (("score", tmp_path / "absent.json"), ("agree", tmp_path / "absent.jsonl", nothing)):
        error = launcher(*words).exception
        assert isinstance(error, ConfigError) and error.code == 2, words


BOOK = [
    {"instruction": "Double it.", "input": "4", "output": "8", "model_response": "8"},
    {"instruction": "Name a fruit.", "input": "", "output": "apple", "model_response": "pear"},
]
OUTPUTS = [
    {"instruction": "Name a fruit.", "output": "apple", "generator": "m", "dataset": "d"},
    {"instruction": "Double it: 4", "output": "9", "generator": "m", "dataset": "d"},
]
REFERENCES = [
    {"instruction": "Double it: 4", "output": "8", "generator": "people"},
    {"instruction": "Name a fruit.", "output": "apple", "generator": "people"},
]


def judge_file(tmp_path: Path, repository: Path, rows: list[dict[str, Any]], *more: str | Path) -> Any:
    (tmp_path / "data.json").write_text("[]", encoding="utf-8")
    (tmp_path / "responses.json").write_text(json.dumps(rows), encoding="utf-8")
    words = ["--set", f"data.path={tmp_path / 'data.json'}", "--run-dir", tmp_path / "run"]
    responses = ["--responses", tmp_path / "responses.json", "--as", "mine"]
    return launcher("judge", repository / "configs/quickstart.yaml", *words, *responses, *more)


def scores(tmp_path: Path) -> dict[str, float]:
    lines = (tmp_path / "run/scores/mine.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row["score"] for row in map(json.loads, lines)}


def test_judge_takes_the_books_file(tmp_path: Path, repository: Path) -> None:
    answer = judge_file(tmp_path, repository, BOOK)
    assert "2 responses (instruction) as mine" in answer.output, answer.exception
    assert sorted(scores(tmp_path).values()) == [0, 100]


def test_judge_takes_alpaca_eval_outputs_with_their_references(tmp_path: Path, repository: Path) -> None:
    refused = judge_file(tmp_path, repository, OUTPUTS).exception
    assert isinstance(refused, EvaluationError) and "give them with --references FILE" in str(refused)
    assert not (tmp_path / "run/data").exists()
    (tmp_path / "references.json").write_text(json.dumps(REFERENCES), encoding="utf-8")
    answer = judge_file(tmp_path, repository, OUTPUTS, "--references", tmp_path / "references.json")
    assert "2 responses (alpaca_eval) as mine" in answer.output, answer.exception
    assert sorted(scores(tmp_path).values()) == [0, 100]


def test_judge_takes_our_own_rows_by_id(tmp_path: Path, repository: Path) -> None:
    judge_file(tmp_path, repository, BOOK)
    first, second = scores(tmp_path)
    rows = [{"id": second, "response": "apple"}, {"id": first, "response": "7"}]
    answer = judge_file(tmp_path, repository, rows)
    assert "2 responses (ours) as mine" in answer.output, answer.exception
    assert scores(tmp_path) == {first: 0, second: 100}
    strangers = judge_file(tmp_path, repository, [{"id": "row-9", "response": "x"}]).exception
    assert isinstance(strangers, EvaluationError) and "do not line up" in str(strangers)
