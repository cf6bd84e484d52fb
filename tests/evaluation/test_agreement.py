"""The judge against people: joins, counts, measures and the corrected mean."""

import json
import re

import numpy as np
import pytest

from evaluation.agreement import agree, as_text
from evaluation.config import ReportConfig
from evaluation.errors import EvaluationError
from evaluation.statistics import correlations

CONFIG = ReportConfig(bootstrap_samples=300)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def verdict(name, score, *, repeat=0, sample=0):
    state = "judge_failed" if score is None else "scored"
    return {"id": name, "sample": sample, "repeat": repeat, "state": state, "score": score, "judge": "j"}


@pytest.fixture
def lenient_judge(tmp_path):
    """400 answers whose true mean is 50; the judge adds 20 points and noise; people rated the first 100."""
    rng = np.random.default_rng(8)
    truth = rng.uniform(10, 90, 400)
    judged = np.clip(truth + 20 + rng.normal(0, 8, 400), 0, 100)
    scores = write(tmp_path / "scores.jsonl", [verdict(f"r{i}", float(score)) for i, score in enumerate(judged)])
    human = write(tmp_path / "human.jsonl", [{"id": f"r{i}", "score": float(truth[i])} for i in range(100)])
    return scores, human, truth, judged


def test_measures_are_those_of_the_joined_rows(lenient_judge):
    scores, human, truth, judged = lenient_judge
    result = agree(scores, human, CONFIG)
    assert (result["num_judged"], result["num_rated"], result["num_compared"]) == (400, 100, 100)
    for name, value in correlations(judged[:100], truth[:100]).items():
        measure = result["measures"][name]
        assert measure["mean"] == pytest.approx(value)
        assert measure["low"] < value < measure["high"]
    assert result["measures"]["kappa_quadratic"]["mean"] < result["measures"]["pearson"]["mean"]  # the bias counts


def test_the_corrected_mean_takes_the_bias_out(lenient_judge):
    scores, human, truth, judged = lenient_judge
    mean = agree(scores, human, CONFIG)["mean"]
    assert mean["naive"]["mean"] == pytest.approx(judged.mean())
    assert mean["naive"]["low"] > truth.mean() + 10
    assert mean["corrected"]["low"] < truth.mean() < mean["corrected"]["high"]
    assert mean["corrected"]["high"] - mean["corrected"]["low"] < mean["human"]["high"] - mean["human"]["low"]


def test_the_corrected_share_takes_the_bias_out(lenient_judge):
    scores, human, truth, _ = lenient_judge
    share = agree(scores, human, CONFIG)["good_share"]
    assert share["naive"] > (truth >= 50).mean() + 0.1
    assert share["corrected"]["low"] < (truth >= 50).mean() < share["corrected"]["high"]


def test_rows_are_joined_by_id_and_not_by_order(lenient_judge, tmp_path):
    scores, human, _, _ = lenient_judge
    lines = human.read_text(encoding="utf-8").splitlines()
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(reversed(lines)) + "\n", encoding="utf-8")
    expected = agree(scores, human, CONFIG)["measures"]["pearson"]["mean"]
    assert agree(scores, shuffled, CONFIG)["measures"]["pearson"]["mean"] == pytest.approx(expected)


def test_repeats_are_averaged_and_failed_verdicts_counted(tmp_path):
    scores = write(
        tmp_path / "s.jsonl",
        [verdict("a", 10), verdict("a", 30, repeat=1), verdict("b", 80), verdict("c", None), verdict("d", 60)],
    )
    human = write(tmp_path / "h.jsonl", [{"id": name, "score": s} for name, s in (("a", 20), ("b", 80), ("c", 5))])
    result = agree(scores, human, CONFIG)
    assert (result["num_compared"], result["num_unscored"]) == (2, 1)
    assert result["measures"]["kappa_quadratic"]["mean"] == 1.0  # a is 20 by both
    assert result["good_share"] is not None


def test_several_raters(tmp_path):
    scores = write(tmp_path / "s.jsonl", [verdict(f"r{i}", 10 * i) for i in range(6)])
    human = write(
        tmp_path / "h.jsonl",
        [
            {"id": f"r{i}", "score": 10 * i + shift, "rater": who}
            for i in range(6)
            for who, shift in (("x", 0), ("y", 2))
        ],
    )
    result = agree(scores, human, CONFIG)
    assert result["num_raters"] == 2
    assert 0.99 < result["human_alpha"] < 1
    assert result["mean"]["corrected"]["mean"] is None  # people rated everything: their own mean is the answer
    assert result["good_share"] is None


@pytest.mark.parametrize(
    ("human", "message"),
    [
        ([{"id": "stranger", "score": 1}], "row 1: id 'stranger', sample 0 has no row in the verdicts"),
        ([{"id": "a", "sample": 3, "score": 1}], "id 'a', sample 3 has no row"),
        ([{"id": "a", "score": 1}, {"id": "a", "score": 2}], "row 2: 'a' is rated twice"),
        ([{"id": "a", "score": 101}], "'a' has score 101"),
        ([{"id": "a", "score": "80"}], "'a' has score '80'"),
        ([{"id": "a", "score": True}], "'a' has score True"),
        ([{"id": 5, "score": 1}], "id must be text"),
        ([{"id": "a", "score": 5}], "1 rows of"),
        ([], "0 rows of"),
    ],
)
def test_files_that_do_not_line_up_are_refused(tmp_path, human, message):
    scores = write(tmp_path / "s.jsonl", [verdict("a", 10), verdict("b", 20)])
    with pytest.raises(EvaluationError) as error:
        agree(scores, write(tmp_path / "h.jsonl", human), CONFIG)
    assert message in str(error.value)


def test_a_judge_that_never_varies_has_no_correlation(tmp_path):
    scores = write(tmp_path / "s.jsonl", [verdict(f"r{i}", 50) for i in range(5)])
    human = write(tmp_path / "h.jsonl", [{"id": f"r{i}", "score": 20 * i} for i in range(5)])
    result = agree(scores, human, CONFIG)
    assert result["measures"]["pearson"] == {"mean": None, "low": None, "high": None}
    assert "Pearson's r                             not measured" in as_text(result)


def test_full_agreement_has_no_interval_of_no_width(tmp_path):
    scores = write(tmp_path / "s.jsonl", [verdict(f"r{i}", 20 * i) for i in range(5)])
    human = write(tmp_path / "h.jsonl", [{"id": f"r{i}", "score": 20 * i} for i in range(5)])
    result = agree(scores, human, CONFIG)
    pearson = result["measures"]["pearson"]
    assert (pearson["mean"], pearson["low"], pearson["high"]) == (pytest.approx(1), None, None)
    assert "1.000 (no spread seen" in as_text(result)


def test_the_text_says_what_was_found(lenient_judge):
    scores, human, _, _ = lenient_judge
    text = as_text(agree(scores, human, CONFIG))
    assert "100 answers have a verdict and a rating, of 400 judged" in text
    assert re.search(r"Mean corrected for the judge's error +\d\d\.\d \[\d\d\.\d, \d\d\.\d\]\n", text)
