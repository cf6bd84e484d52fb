"""The report stage on a made-up run directory: numbers, missing parts, refused files, escaping."""

import json
import re
import runpy
from pathlib import Path

import jsonschema
import pytest

from evaluation.config import ReportConfig
from evaluation.errors import EvaluationError
from evaluation.report import build
from evaluation.report.build import write_report
from evaluation.report.page import difference_chart, markdown_cell, script_json, short_text, visible
from evaluation.report.scores import gather_scores

_synthetic = runpy.run_path(str(Path(__file__).parent / "synthetic.py"))
make_run, write_jsonl, HOSTILE = _synthetic["make_run"], _synthetic["write_jsonl"], _synthetic["HOSTILE"]
CONFIG = ReportConfig(bootstrap_samples=500)


def small_run(folder, base, tuned):
    """A run of hand-written scores: {id: [score or state, one a repeat]}."""
    for model, scores in (("base", base), ("tuned", tuned)):
        write_jsonl(
            folder / f"scores/{model}.jsonl",
            [
                {
                    "id": name,
                    "category": "c",
                    "model": model,
                    "sample": 0,
                    "repeat": repeat,
                    "state": "scored" if isinstance(score, int) else score,
                    "score": score if isinstance(score, int) else None,
                    "cause": None if isinstance(score, int) else "because",
                    "raw": None,
                    "judge": "reference",
                    "key": "k",
                }
                for name, repeats in scores.items()
                for repeat, score in enumerate(repeats)
            ],
        )
    return folder


def report_of(run_dir):
    write_report(CONFIG, run_dir)
    return json.loads((run_dir / "report.json").read_text(encoding="utf-8"))


def test_headline_by_hand(tmp_path):
    small_run(tmp_path, {"a": [0], "b": [10], "c": [50]}, {"a": [100], "b": [10, 30], "c": ["judge_failed"]})
    headline = write_report(CONFIG, tmp_path)
    # c has no score for tuned, so only a and b are compared; b's two repeats make one value, 20
    assert (headline["num_prompts"], headline["num_asked"]) == (2, 3)
    assert headline["base"]["mean"] == 5.0
    assert headline["tuned"]["mean"] == 60.0
    assert headline["difference"]["mean"] == 55.0
    assert headline["judge"] == "reference"
    assert not headline["distinguishable"]
    assert re.fullmatch(
        r"base 5\.0 \[.+\] -> tuned 60\.0 \[.+\]   \+55\.0 \[.+\]  \(reference judge, 2 of 3 prompts\)",
        headline["line"],
    )


def test_every_prompt_is_in_exactly_one_state(tmp_path):
    small_run(tmp_path, {"a": [0], "b": [10]}, {"a": ["judge_failed", 40], "b": ["too_long"]})
    models = report_of(tmp_path)["models"]
    assert models["tuned"]["states"] == {
        "scored": 1,
        "judge_failed": 0,
        "generation_failed": 0,
        "too_long": 1,
        "skipped": 0,
    }
    assert models["tuned"]["causes"] == {"too_long: because": 1}
    assert (models["tuned"]["num_scored_verdicts"], models["tuned"]["num_verdicts"]) == (1, 3)
    assert (models["tuned"]["mean_if_missing_scored_lowest"], models["tuned"]["mean_if_missing_scored_highest"]) == (
        20,
        70,
    )


def test_prompts_without_any_verdict_are_counted_as_skipped(tmp_path):
    make_run(tmp_path, num_rows=10)
    rows = (tmp_path / "scores/tuned.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "scores/tuned.jsonl").write_text("".join(rows[:6]) + rows[6][:20], encoding="utf-8")  # killed in a line
    tuned = report_of(tmp_path)["models"]["tuned"]
    assert tuned["states"]["scored"] == 6
    assert tuned["causes"] == {"skipped: no verdict was written": 4}


def test_the_last_verdict_of_a_key_counts(tmp_path):
    small_run(tmp_path, {"a": [0], "b": [0]}, {"a": [50], "b": [50]})
    path = tmp_path / "scores/tuned.jsonl"
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    path.write_text(path.read_text(encoding="utf-8") + json.dumps(row | {"score": 90}) + "\n", encoding="utf-8")
    assert report_of(tmp_path)["headline"]["tuned"]["mean"] == 70


def test_an_empty_run_directory_gives_a_report_of_what_is_missing(tmp_path):
    headline = write_report(CONFIG, tmp_path)
    assert headline["base"] == headline["difference"] == {"mean": None, "low": None, "high": None}
    assert headline["line"] == "base not measured -> tuned not measured   not measured  (no judge, 0 prompts)"
    missing = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["missing"]
    assert {"data/test.jsonl", "metrics.jsonl", "scores/base.jsonl", "judge.record.json"} <= set(missing)
    assert "scores/tuned.jsonl" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("gone", ["data/test.jsonl", "data/summary.json", "metrics.jsonl", "responses/base.jsonl"])
def test_each_part_may_be_missing(tmp_path, gone):
    make_run(tmp_path, num_rows=20)
    (tmp_path / gone).unlink()
    report = report_of(tmp_path)
    assert report["missing"] == [gone]
    assert report["headline"]["num_prompts"] == 20


def test_one_model_alone_keeps_its_own_mean(tmp_path):
    make_run(tmp_path, num_rows=20)
    (tmp_path / "scores/base.jsonl").unlink()
    report = report_of(tmp_path)
    assert report["headline"]["tuned"]["mean"] is not None
    assert report["headline"]["difference"]["mean"] is None
    assert "no verdicts on base" in report["problems"][0]


def test_different_judges_are_called_no_measurement(tmp_path):
    make_run(tmp_path, num_rows=20)
    path = tmp_path / "scores/base.jsonl"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"judge": "reference"', '"judge": "other"'), encoding="utf-8"
    )
    report = report_of(tmp_path)
    assert "not a measurement" in report["problems"][0]
    assert report["headline"]["difference"]["mean"] is None
    assert report["headline"]["base"]["mean"] is not None
    assert report["models"]["tuned"]["difference_to_base"] is None
    assert {row["difference"]["mean"] for row in report["categories"]} == {None}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "stranger", "state": "scored", "score": 1}, "'stranger' is not in data/test.jsonl"),
        ({"id": 7, "state": "scored", "score": 1}, "'id' must be text, this is 7"),
        ({"id": "row-00001", "state": "scored", "score": None}, "score is None, not within 0..100"),
        ({"id": "row-00001", "state": "scored", "score": True}, "score is True"),
        ({"id": "row-00001", "state": "scored", "score": 101}, "score is 101"),
        ({"id": "row-00001", "state": "done", "score": 1}, "state is 'done', not one of scored"),
    ],
)
def test_broken_verdicts_are_refused_by_line(tmp_path, line, message):
    make_run(tmp_path, num_rows=5)
    with (tmp_path / "scores/tuned.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(EvaluationError, match=r"tuned\.jsonl, row 6") as error:
        write_report(CONFIG, tmp_path)
    assert message in str(error.value)


def test_not_json_in_the_middle_is_refused(tmp_path):
    make_run(tmp_path, num_rows=5)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "tr\n' + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"metrics.jsonl, line 1: not a JSON object"):
        write_report(CONFIG, tmp_path)


def test_the_same_files_give_the_same_bytes(tmp_path):
    make_run(tmp_path, num_rows=30)
    names = ("report.json", "report.md", "report.html")
    write_report(CONFIG, tmp_path)
    first = [(tmp_path / name).read_bytes() for name in names]
    write_report(CONFIG, tmp_path)
    assert first == [(tmp_path / name).read_bytes() for name in names]


def test_the_page_holds_no_markup_of_the_data(tmp_path):
    make_run(tmp_path, num_rows=60)
    write_report(CONFIG, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2  # the data and the page's own
    assert page.count("</script>") == 2
    assert "<img" not in page and "<b>bold" not in page
    assert "\u202e" not in page and "[U+202E]" in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)


def test_samples_in_the_page_are_the_runs_own(tmp_path):
    make_run(tmp_path, num_rows=30, repeats=2)
    write_report(CONFIG, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data-samples">(.*?)</script>', page, re.DOTALL)[1])
    assert data["models"] == ["base", "tuned"]
    assert len(data["rows"]) == 30
    row = data["rows"][9]
    assert row["i"] == "row-00009" and row["r"] == "the word is 63"
    assert row["p"].startswith("Question 9: say the word number 63.")  # the user's words, not the template's
    assert [v[1] for v in row["m"][1]["v"]] == [0, 1]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_survives_as_text(text):
    encoded = str(script_json([visible(text)]))
    assert "<" not in encoded and ">" not in encoded
    assert json.loads(encoded) == [visible(text)]
    assert markdown_cell(text).count("\n") == 0
    visible(text).encode("utf-8")


def test_visible_names_what_it_replaces():
    assert visible("a\u202eb\u200bc\x00\r\nd\te") == "a[U+202E]b[U+200B]c[U+0000]\nd\te"


def test_markdown_cell_cannot_leave_its_cell():
    assert markdown_cell("a|b\n<i>[x](y)`") == r"a\|b &lt;i&gt;\[x\]\(y\)\`"


SCHEMA = json.loads((Path(build.__file__).parent / "report.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("what", ["whole", "empty", "by hand"])
def test_report_json_is_what_its_schema_says(tmp_path, what):
    if what == "whole":
        make_run(tmp_path, num_rows=60, repeats=2, models=("base", "tuned", "third"))
    elif what == "by hand":
        small_run(tmp_path, {"a": [0], "b": [10]}, {"a": ["judge_failed", 40], "b": ["too_long"]})
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    report = report_of(tmp_path)
    assert list(validator.iter_errors(report)) == []
    assert list(validator.iter_errors(report | {"surprise": 1})) != []


def test_further_models_are_compared_with_base_and_corrected(tmp_path):
    make_run(tmp_path, num_rows=60, models=("base", "tuned", "a third"))
    models = report_of(tmp_path)["models"]
    assert list(models) == ["base", "tuned", "a third"]
    assert models["base"]["p_holm"] is None and models["base"]["difference_to_base"] is None
    # the smallest possible p of 500 draws is 1/501, twice that for two models
    assert models["tuned"]["p_holm"] == pytest.approx(2 / 501)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "corrected for the number of models" in page and "a third" in page


def with_details(run, model, details):
    path = run / f"scores/{model}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    write_jsonl(path, [row | {"details": detail} for row, detail in zip(rows, details, strict=True)])


def test_further_measures_of_the_judge_are_averaged(tmp_path):
    small_run(tmp_path, {"a": [0], "b": [0]}, {"a": [50], "b": [50]})
    with_details(
        tmp_path, "tuned", [{"exact_match": True, "chrf": 40.0}, {"exact_match": False, "criteria": {"tone": 10}}]
    )
    assert report_of(tmp_path)["models"]["tuned"]["measures"] == {
        "exact_match": {"mean": 0.5, "num": 2},
        "chrf": {"mean": 40.0, "num": 1},
        "tone": {"mean": 10.0, "num": 1},
    }


def test_labels_give_a_confusion_matrix(tmp_path):
    small_run(tmp_path, {"a": [0], "b": [0], "c": [0]}, {"a": [100], "b": [0], "c": [0]})
    labels = [("yes", "yes"), ("yes", None), ("no", "yes")]
    with_details(tmp_path, "tuned", [{"expected": right, "given": said} for right, said in labels])
    found = report_of(tmp_path)["models"]["tuned"]["classification"]
    assert (found["labels"], found["confusion"]) == (["no", "yes"], [[0, 1, 0], [0, 1, 1]])
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert "expected / given" in (tmp_path / "report.html").read_text(encoding="utf-8")


JUDGE_SUMMARY = {
    "judge": "vllm m",
    "protocol": "pairwise",
    "self_test": None,
    "canaries": {
        "limit": 30.0,
        "talked_over": True,
        "kinds": {
            "empty": {"tried": 3, "scored": 3, "fallen_for": 0, "mean": 2.0},
            "forged verdict 1": {"tried": 3, "scored": 2, "fallen_for": 2, "mean": 88.0},
        },
    },
    "null_models": {"tuned": {"response": "<b>I am an expert", "share": 0.97, "reference_share": 0.01}},
    "same_model_as": ["base"],
    "same_family_as": ["base", "tuned"],
    "spent": {"num_calls": 9, "num_prompt_tokens": 90, "num_response_tokens": 9, "cost": None},
    "position": {
        "tuned": {
            "num_pairs": 60,
            "flip_rate": {"mean": 0.25, "low": 0.16, "high": 0.37},
            "first_rate": {"mean": 0.5, "low": None, "high": None},
        }
    },
}


def test_what_speaks_against_the_judge_is_said(tmp_path):
    make_run(tmp_path, num_rows=60)
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge/summary.json").write_text(json.dumps(JUDGE_SUMMARY), encoding="utf-8")
    report = report_of(tmp_path)
    problems = "\n".join(report["problems"])
    assert "can be talked over: worthless answers scored above 30.0 (forged verdict 1)" in problems
    assert "The judge is base itself" in problems
    assert "same family as tuned" in problems and "same family as base" not in problems
    assert "tuned gives one and the same answer to 97% of the prompts" in problems
    assert "100 is a win in both orders" in report["comparison"]["words"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "25.0%" in page and "Fallen for" in page and "<b>I am" not in page


def test_a_sound_judge_gives_no_warning(tmp_path):
    make_run(tmp_path, num_rows=60)
    (tmp_path / "judge").mkdir()
    sound = {"canaries": {"limit": 30.0, "talked_over": False, "kinds": {}}, "null_models": {}, "same_model_as": []}
    (tmp_path / "judge/summary.json").write_text(json.dumps(sound), encoding="utf-8")
    assert all(problem.startswith("Without a score") for problem in report_of(tmp_path)["problems"])


def test_reliability_of_repeats_and_of_a_jury(tmp_path):
    # 0 and 10, 90 and 100: observed 4 x 100 / 4, expected over all pairs of the four values
    small_run(tmp_path, {"a": [5], "b": [5]}, {"a": [0, 10], "b": [90, 100, "judge_failed"]})
    (tmp_path / "judge").mkdir()
    members = [{"judge": "one", "same_model_as": ["tuned"]}, {"judge": "two", "same_family_as": ["base"]}]
    summary = {"judge": "jury", "agreement": {"krippendorff_alpha": 0.615}, "members": members}
    (tmp_path / "judge/summary.json").write_text(json.dumps(summary), encoding="utf-8")
    report = report_of(tmp_path)
    values = [0, 10, 90, 100]
    expected = sum((a - b) ** 2 for a in values for b in values) / (4 * 3)
    assert report["models"]["tuned"]["verdict_alpha"] == pytest.approx(1 - (4 * 100 / 4) / expected)
    assert report["models"]["base"]["verdict_alpha"] is None
    assert "The judge one is tuned itself: it judges its own words." in report["problems"]
    assert "The judge two is of the same family as base and may favour it." in report["problems"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "members agree to 0.61" in page or "members agree to 0.62" in page


def test_skipped_steps_and_cut_answers_are_told(tmp_path):
    make_run(tmp_path, num_rows=60)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(
            json.dumps({"kind": "skipped", "step": 701, "epoch": 5.1, "cause": "the loss was not finite"}) + "\n"
        )
    report = report_of(tmp_path)
    assert "Training steps skipped: 1 (the loss was not finite)." in report["problems"]
    assert report["models"]["tuned"]["num_cut"] == 1


def test_samples_count_alike_however_often_each_was_judged():
    verdicts = {
        ("a", sample, repeat): {"id": "a", "sample": sample, "state": "scored", "score": score, "judge": "j"}
        for sample, repeat, score in ((0, 0, 0), (0, 1, 100), (1, 0, 100))
    }
    assert gather_scores(verdicts, ["a"]).scores == {"a": 75.0}  # 50 and 100; not 66.7, the mean of all three


@pytest.mark.parametrize(("policy", "is_told"), [("warn", True), ("drop", False)])
def test_training_on_the_test_set_is_told(tmp_path, policy, is_told):
    make_run(tmp_path, num_rows=60)
    path = tmp_path / "data/summary.json"
    leaks = {"exact_train_rows": 3, "near_train_rows": 1, "test_rows": 2, "examples": []}
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"leaks": leaks}), encoding="utf-8")
    (tmp_path / "config.yaml").write_text(f"data:\n  leaks: {policy}\n", encoding="utf-8")
    told = [
        problem for problem in report_of(tmp_path)["problems"] if "2 test rows stand in the training data" in problem
    ]
    assert bool(told) == is_told


def test_what_the_test_set_can_find_is_said_plainly(tmp_path):
    make_run(tmp_path, num_rows=60)
    comparison = report_of(tmp_path)["comparison"]
    points = comparison["minimal_detectable_difference"]
    assert (
        f"With 60 prompts a true difference of {points:.1f} points is found four times out of five; a smaller one is "
        "easily missed."
    ) in comparison["words"]


def test_markdown_counts_cut_answers_and_shows_a_few(tmp_path):
    make_run(tmp_path, num_rows=60)
    report = report_of(tmp_path)
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    tuned = next(line for line in lines if line.startswith("| tuned |"))
    assert tuned.endswith(f"| {report['models']['tuned']['num_cut']} |") and report["models"]["tuned"]["num_cut"] == 1
    shown = [line for line in lines if line.startswith("| Question ")]
    assert len(shown) == 6  # three most changed, three worst
    first = int(report["samples"]["most_changed"][0][-5:])
    assert shown[0].startswith(f"| Question {first}: ")


def test_short_text_is_one_line_without_the_templates_heading():
    assert short_text("Sort the words.\n\n### Input:\npear\napple") == "Sort the words. \u00b7 pear apple"
    assert short_text("x" * 161) == "x" * 160 + "\u2026"


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        ({"mean": 3.0, "low": -1.0, "high": 7.0}, {"end": 10, "mean": 65, "low": 45, "high": 85}),
        ({"mean": -60.0, "low": None, "high": None}, {"end": 100, "mean": 20, "low": 20, "high": 20}),
        ({"mean": None, "low": None, "high": None}, None),
    ],
)
def test_a_difference_is_drawn_around_zero(estimate, expected):
    assert difference_chart(estimate) == expected


def harness_file(run, model, value, standard_error=0.05):
    measure = {
        "task": "capitals_<b>",
        "version": 1.0,
        "num_fewshot": 0,
        "num": 40,
        "metric": "acc",
        "filter": "none",
        "value": value,
        "standard_error": standard_error,
        "higher_is_better": True,
    }
    (run / "lm_eval").mkdir(exist_ok=True)
    result = {"model": model, "harness_version": "0.4.13", "settings": {}, "measures": [measure], "key": "k"}
    (run / f"lm_eval/{model}.json").write_text(json.dumps(result), encoding="utf-8")


def test_benchmarks_stand_side_by_side(tmp_path):
    make_run(tmp_path, num_rows=20)
    harness_file(tmp_path, "tuned", 0.875)
    harness_file(tmp_path, "base", 0.5)
    harness_file(tmp_path, "third", None)
    report = report_of(tmp_path)
    assert list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(report)) == []
    (row,) = report["benchmarks"]
    assert list(row["models"]) == ["base", "tuned", "third"]
    assert row["models"]["tuned"] == {
        "value": 0.875,
        "standard_error": 0.05,
        "num": 40,
        "num_fewshot": 0,
        "version": 1.0,
        "harness_version": "0.4.13",
    }
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "+0.375" in page and "capitals_&lt;b&gt;" in page and "lm-evaluation-harness 0.4.13" in page
    assert "| capitals\\_&lt;b&gt; | acc | 40 | tuned | 0.875 | 0.05 |" in (tmp_path / "report.md").read_text(
        encoding="utf-8"
    )


def test_a_benchmark_without_a_spread_has_no_error_of_0(tmp_path):
    make_run(tmp_path, num_rows=5)
    harness_file(tmp_path, "tuned", 1.0, standard_error=0.0)
    write_report(CONFIG, tmp_path)
    assert "± 0<" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "| tuned | 1 | no spread seen |" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_export_check_is_shown_with_its_limits(tmp_path):
    make_run(tmp_path, num_rows=20)
    check = report_of(tmp_path)["export_check"]
    assert check["vllm"]["largest_difference"] == 0.576
    page, summary = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    block = page[page.index('id="export-check"') :]
    for text in (block[: block.index("</section>")], summary):
        assert all(
            number in text for number in ("1,280", "0.0583", "0.0795", "0.053", "0.576", "0.424", "0.5%", "2.0%")
        )
    assert "on_disagreement" not in page


def test_a_disagreement_of_the_export_is_a_problem(tmp_path):
    make_run(tmp_path, num_rows=20)
    path = tmp_path / "export.record.json"
    record = json.loads(path.read_text())
    record["counts"]["vllm"] |= {"mean_difference": None, "disagreements": ["the setting <rope_theta> differs"]}
    path.write_text(json.dumps(record))
    report = report_of(tmp_path)
    assert list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(report)) == []
    assert any("export.on_disagreement is warn: the setting <rope_theta>" in words for words in report["problems"])
    assert "the setting &lt;rope_theta&gt; differs" in (tmp_path / "report.html").read_text()


def test_an_export_that_did_not_ask_vllm_says_so(tmp_path):
    make_run(tmp_path, num_rows=20)
    path = tmp_path / "export.record.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"counts": record["counts"] | {"vllm": None}}))
    assert report_of(tmp_path)["export_check"]["vllm"] is None
    assert "vLLM was not asked" in (tmp_path / "report.html").read_text()
    path.unlink()
    assert report_of(tmp_path)["export_check"] is None


def thinking_run(folder):
    """A run whose tuned model thinks: some thoughts are hostile, one is not closed."""
    make_run(folder, num_rows=12)
    path = folder / "responses/tuned.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows[:9]):
        row |= {"thought": f"{HOSTILE[number]} so {number}", "thought_closed": True}
    cause = "the thought was not closed within generation.max_tokens=256: raise it"
    rows[9] |= {"thought": "on and on", "thought_closed": False, "response": None, "state": "generation_failed",
                "cause": cause, "finish_reason": "length"}  # fmt: skip
    rows[10] |= {"thought": None, "thought_closed": None, "finish_reason": "odd"}
    write_jsonl(path, rows)
    path = folder / "scores/tuned.jsonl"
    scores = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    scores[9] |= {"state": "generation_failed", "score": None, "cause": cause}
    write_jsonl(path, scores)
    path = folder / "data/test.jsonl"
    test = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    write_jsonl(path, [test[0] | {"reference_thought": "<b>seven</b> times"}, *test[1:]])
    return rows


def test_thoughts_are_measured_per_model(tmp_path):
    rows = thinking_run(tmp_path)
    report = report_of(tmp_path)
    assert list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(report)) == []
    lengths = sorted(len(row["thought"]) for row in rows[:9])
    found = report["models"]["tuned"]["thoughts"]
    assert (found["num_responses"], found["num_thoughts"], found["num_unclosed"]) == (12, 10, 1)
    assert found["unclosed_share"]["mean"] == 0.1 and 0 < found["unclosed_share"]["low"] < 0.1
    assert found["mean_characters"] == pytest.approx(sum(lengths) / 9)
    assert (found["median_characters"], found["longest_characters"]) == (lengths[4], lengths[-1])
    assert report["models"]["base"]["thoughts"] is None
    problems = "\n".join(report["problems"])
    assert "tuned did not come to an answer in 1 of 12 responses" in problems and "max_tokens=256: raise it" in problems
    assert "ended for a reason that is not known, so they may be cut: 1 with 'odd'" in problems
    assert "| tuned | 10 of 12 | 1 (10.0%) |" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_thoughts_are_shown_collapsed_and_escaped(tmp_path):
    rows = thinking_run(tmp_path)
    write_report(CONFIG, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2 and "<img" not in page and "<b>seven" not in page
    first = "&lt;script&gt;window.pwned = 1&lt;/script&gt; so 0"
    length = len(rows[0]["thought"])
    shown = f'<details class="thought"><summary>Thought, {length} characters</summary><pre dir="auto">{first}</pre>'
    assert shown in page and "<details open" not in page
    assert "&lt;b&gt;seven&lt;/b&gt; times" in page and "Share not closed" in page
    data = json.loads(re.search(r'id="data-samples">(.*?)</script>', page, re.DOTALL)[1])["rows"]
    assert [row["m"][1].get("h") for row in data[:9]] == [[visible(row["thought"])] for row in rows[:9]]
    assert data[9]["m"][1]["t"][0].startswith("[no response: the thought was not closed within")
    assert data[0]["h"] == "<b>seven</b> times" and "h" not in data[10]["m"][1]


def test_a_run_without_thoughts_has_no_section_for_them(tmp_path):
    make_run(tmp_path, num_rows=12)
    assert report_of(tmp_path)["models"]["tuned"]["thoughts"] is None
    assert "Share not closed" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_thoughts_of_samples_stay_with_their_answers(tmp_path):
    make_run(tmp_path, num_rows=2)
    path = tmp_path / "responses/tuned.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    second = rows[0] | {"sample": 1, "thought": "second thought", "thought_closed": True}
    write_jsonl(path, [*rows, second])
    write_report(CONFIG, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data-samples">(.*?)</script>', page, re.DOTALL)[1])["rows"]
    assert data[0]["m"][1]["h"] == ["", "second thought"]


def test_equal_scores_are_called_no_spread(tmp_path):
    base, tuned = ({f"r{number}": [score] for number in range(12)} for score in (0, 100))
    small_run(tmp_path, base, tuned)
    report = report_of(tmp_path)
    assert list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(report)) == []
    tuned = report["headline"]["tuned"]
    assert (tuned["low"], tuned["high"]) == (pytest.approx(75.75, abs=0.01), 100.0)
    assert "no spread seen" in tuned["method"]
    assert "tuned 100.0 [75.8, 100.0]" in report["headline"]["line"]
    assert any(problem.startswith("All 12 values of tuned are 100.0; no spread seen") for problem in report["problems"])
    assert report["comparison"]["minimal_detectable_difference"] is None
    assert "0.0 points is found" not in report["comparison"]["words"]
