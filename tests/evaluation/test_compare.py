"""The leaderboard and its gates: over the same prompts, with the same judge, or not at all."""

import json
import runpy
from pathlib import Path

import pytest

from evaluation.compare import Gates, compare, exit_code
from evaluation.config import ReportConfig
from evaluation.errors import EvaluationError

make_run = runpy.run_path(str(Path(__file__).parent / "report" / "synthetic.py"))["make_run"]
CONFIG = ReportConfig(bootstrap_samples=500)


@pytest.fixture
def runs(tmp_path):
    """Three runs over one test set, with tuned models around 60, 61 and 85 points."""
    return [
        make_run(tmp_path / name, num_rows=100, seed=seed, tuned_mean=mean)
        for seed, (name, mean) in enumerate((("old", 60), ("alike", 61), ("better", 85)))
    ]


def rewrite(path, change):
    rows = [change(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None), encoding="utf-8")


def set_score(path, score):
    rewrite(path, lambda row: row | {"score": score, "state": "scored"})


def test_leaderboard_is_sorted_and_paired_with_the_first(runs):
    board = compare(runs, CONFIG, Gates())
    means = [entry.mean.mean for entry in board.entries]
    assert means == sorted(means, reverse=True)
    assert board.entries[0].name == "better"
    by_name = {entry.name: entry for entry in board.entries}
    assert by_name["old"].difference is None
    assert by_name["better"].is_significant and not by_name["alike"].is_significant
    better = by_name["better"]
    assert better.difference.estimate.mean == pytest.approx(better.mean.mean - by_name["old"].mean.mean)
    assert "not distinguishable" in board.text
    assert board.exit_code == 0
    json.dumps(board.to_json())


def test_one_run_is_compared_with_its_own_base(runs):
    board = compare(runs[:1], CONFIG, Gates(significant=True))
    assert board.baseline == "base"
    assert [entry.name for entry in board.entries] == ["tuned", "base"]
    assert board.exit_code == 0


def test_p_values_are_corrected_for_the_number_of_candidates(runs):
    alone = compare([runs[0], runs[1]], CONFIG, Gates())
    together = compare(runs, CONFIG, Gates())
    p = next(entry.difference.p_sign_flip for entry in alone.entries if entry.name == "alike")
    # better has the smaller p of the two and takes the factor 2; the larger one keeps its own
    assert next(e.p_holm for e in together.entries if e.name == "alike") == pytest.approx(p)
    better = next(e for e in together.entries if e.name == "better")
    assert better.p_holm == pytest.approx(2 * better.difference.p_sign_flip)


@pytest.mark.parametrize(
    ("gates", "code"),
    [
        (Gates(min_score=50), 0),
        (Gates(min_score=70), 1),
        (Gates(max_drop=1), 1),
        (Gates(max_drop=30), 0),
        (Gates(significant=True), 1),
    ],
)
def test_gates(runs, gates, code):
    candidate = runs[1]
    set_score(candidate / "scores/tuned.jsonl", 55)  # about 5 below the baseline
    assert compare([runs[0], candidate], CONFIG, gates).exit_code == code


@pytest.mark.parametrize(
    ("gates", "code", "failed"),
    [
        (Gates(category_min_score={"count": 50}), 0, []),
        (Gates(category_min_score={"count": 50, "reverse": 50}), 1, ["reverse"]),
        (Gates(min_score=40, category_max_drop={"count": 30}), 0, []),
        (Gates(min_score=40, category_max_drop={"count": 30, "reverse": 30}), 1, ["reverse"]),
        (Gates(category_max_drop={"maths": 100}), 2, ["maths"]),
        (Gates(category_min_score={"maths": 0}), 2, ["maths"]),
    ],
)
def test_gates_of_one_category(runs, gates, code, failed):
    """One category has fallen to 10 points; the mean over all hides it."""
    path = runs[1] / "scores/tuned.jsonl"
    rewrite(path, lambda row: row | {"score": 10 if row["category"] == "reverse" else 70, "state": "scored"})
    board = compare(runs[:2], CONFIG, gates)
    assert board.exit_code == code
    assert [gate.category for gate in board.gates if not gate.passed] == failed
    candidate = next(entry for entry in board.entries if entry.name == "alike")
    if "reverse" in gates.categories:
        assert candidate.categories["reverse"].mean.mean == 10
        assert candidate.categories["reverse"].num_prompts == 20
    if code == 2:
        assert "No prompt is of category 'maths', which has a gate; there are <b>bold</b>, count" in board.text
        assert compare(runs[:2], CONFIG, gates, force=True).exit_code == 2


def test_a_significant_loss_does_not_pass_the_gate_for_a_gain(runs):
    set_score(runs[1] / "scores/tuned.jsonl", 1)
    board = compare(runs[:2], CONFIG, Gates(significant=True))
    assert next(entry for entry in board.entries if entry.name == "alike").is_significant
    assert board.exit_code == 1


def test_the_limits_themselves_pass(runs):
    for run in runs[:2]:
        set_score(run / "scores/tuned.jsonl", 50)
    assert compare(runs[:2], CONFIG, Gates(min_score=50, max_drop=0)).exit_code == 0


def test_different_judges_are_refused_unless_forced(runs):
    rewrite(runs[1] / "scores/tuned.jsonl", lambda row: row | {"judge": "other"})
    board = compare(runs[:2], CONFIG, Gates())
    assert board.exit_code == 2
    assert "judged by other" in board.problems[0]
    assert compare(runs[:2], CONFIG, Gates(), force=True).exit_code == 0
    assert compare(runs[:2], CONFIG, Gates(min_score=99), force=True).exit_code == 1


def test_other_settings_of_the_same_judge_are_refused(runs):
    for run, repeats in zip(runs[:2], (1, 3), strict=True):
        record = {"fingerprint": {"judge.repeats": repeats, "judge.concurrency": repeats}}
        (run / "judge.record.json").write_text(json.dumps(record), encoding="utf-8")
    board = compare(runs[:2], CONFIG, Gates())
    assert (board.exit_code, board.problems) == (
        2,
        ("alike was judged with other settings than old: judge.repeats differ.",),
    )


def test_different_data_is_refused_and_forced_over_the_common_rows(runs):
    rewrite(runs[1] / "data/test.jsonl", lambda row: row | ({"reference": "x"} if row["id"] == "row-00007" else {}))
    board = compare(runs[:2], CONFIG, Gates())
    assert board.exit_code == 2
    assert "99 of 100 rows are the same" in board.problems[0]
    assert compare(runs[:2], CONFIG, Gates(), force=True).num_asked == 99


def test_too_few_scores_are_no_measurement(runs):
    rewrite(runs[1] / "scores/tuned.jsonl", lambda row: row if row["id"] < "row-00090" else None)
    board = compare(runs[:2], CONFIG, Gates())
    assert board.exit_code == 2
    assert "alike has a score for 90 of 100 prompts" in board.problems[0]


def test_a_missing_metric_fails_even_when_forced(runs):
    (runs[1] / "scores/tuned.jsonl").unlink()
    board = compare(runs[:2], CONFIG, Gates(min_score=0), force=True)
    assert board.exit_code == 2
    assert not board.gates[0].passed
    assert "nothing measured" in board.text


def test_what_cannot_be_compared_at_all(runs, tmp_path):
    with pytest.raises(EvaluationError, match="given twice"):
        compare([runs[0], runs[0]], CONFIG, Gates())
    with pytest.raises(EvaluationError, match="nothing to compare"):
        compare([], CONFIG, Gates())
    with pytest.raises(EvaluationError, match="is not a folder"):
        compare([tmp_path / "nowhere"], CONFIG, Gates())


def test_exit_code_policy():
    assert exit_code([], [], forced=False, means=[1.0]) == 0
    assert exit_code(["x"], [], forced=False, means=[1.0]) == 2
    assert exit_code(["x"], [], forced=True, means=[1.0]) == 0
    assert exit_code([], [], forced=True, means=[None]) == 2
