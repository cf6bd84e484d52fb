"""Files made elsewhere: win rates from annotations, responses joined to the test set, and what is refused."""

import json
import math
import runpy
import statistics
from pathlib import Path

import pytest

from evaluation.config import ReferenceJudge, ReportConfig
from evaluation.errors import EvaluationError
from evaluation.interchange import import_responses, score_exit_code, score_file, score_text
from evaluation.report.build import write_report

CONFIG = ReportConfig(bootstrap_samples=200)
make_run = runpy.run_path(str(Path(__file__).parent / "report" / "synthetic.py"))["make_run"]


def annotations(path, preferences, **more):
    rows = [
        {
            "instruction": f"q{i}",
            "output_1": "a" * (10 + i % 3),
            "generator_1": "gpt",
            "output_2": "b" * (10 + i % 5),
            "generator_2": "mine",
            "annotator": "judge",
            "preference": preference,
        }
        | more
        for i, preference in enumerate(preferences)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_win_rate_by_hand(tmp_path):
    # two wins, a loss, two ways to write a draw, a share, a missing one, and two that are no preference
    path = annotations(tmp_path / "a.json", [2, 2.0, 1, 0, 1.5, 1.25, None, 3, "2"])
    result = score_file(path, CONFIG)
    shares = [1, 1, 0, 0.5, 0.5, 0.25]
    assert result["win_rate"] == pytest.approx(100 * statistics.fmean(shares))
    assert result["standard_error"] == pytest.approx(100 * statistics.stdev(shares) / math.sqrt(6))
    assert (result["num_asked"], result["num_scored"]) == (9, 6)
    assert (result["num_wins"], result["num_draws"], result["num_losses"]) == (2, 2, 2)
    assert result["unscored"] == {
        "no preference": 1,
        "preference 3 lies outside 1..2": 1,
        "preference is '2', not a number": 1,
    }
    assert (result["model"], result["baseline"]) == ("mine", "gpt")
    assert 0 <= result["low"] <= result["win_rate"] <= result["high"] <= 100
    assert "6 of 9 scored" in score_text(result)
    assert score_exit_code(result) == 0


def test_win_rate_is_alpaca_evals(tmp_path):
    metrics = pytest.importorskip("alpaca_eval.metrics", reason="the alpaca-eval package is not installed")
    preferences = [1, 2, 2, 1.5, 0, 1.9, 1.1, None, 2]
    theirs = metrics.get_winrate([{"preference": p} for p in preferences])
    ours = score_file(annotations(tmp_path / "a.json", preferences), CONFIG)
    assert ours["win_rate"] == pytest.approx(theirs["win_rate"])
    assert ours["standard_error"] == pytest.approx(theirs["standard_error"])
    assert ours["num_scored"] == theirs["n_total"]


@pytest.mark.parametrize(("preference", "ends"), [(2, (75.75, 100.0)), (1, (0.0, 24.25)), (1.5, (37.88, 62.12))])
def test_equal_preferences_have_an_honest_interval(tmp_path, preference, ends):
    result = score_file(annotations(tmp_path / "a.json", [preference] * 12), CONFIG)
    controlled = result["length_controlled_win_rate"]
    for found in (result, controlled):
        assert (found["low"], found["high"]) == pytest.approx(ends, abs=0.01)
    text = score_text(result)
    assert f"[{ends[0]:.2f}, {ends[1]:.2f}], no spread seen: interval by Wilson's bound" in text
    assert "standard error" not in text


def test_json_lines_and_a_byte_order_mark_are_read_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"preference": 2}\n{"preference": 1}\n', encoding="utf-8")
    assert score_file(path, CONFIG)["win_rate"] == 50
    assert score_file(path, CONFIG)["length_controlled_win_rate"] is None  # no outputs, no lengths
    path.write_text('\ufeff[{"preference": 2}]', encoding="utf-8")
    assert score_file(path, CONFIG)["win_rate"] == 100


@pytest.mark.parametrize("preferences", [[None, None], [None], [float("nan")]])
def test_nothing_scored_is_no_number(tmp_path, preferences):
    result = score_file(annotations(tmp_path / "a.json", preferences), CONFIG)
    assert result["win_rate"] is None and result["standard_error"] is None
    assert result["num_scored"] == 0 and result["num_asked"] == len(preferences)
    assert f"0 of {len(preferences)} scored" in score_text(result)
    assert score_exit_code(result) == 2


def test_one_preference_has_no_error(tmp_path):
    result = score_file(annotations(tmp_path / "a.json", [2]), CONFIG)
    assert (result["win_rate"], result["standard_error"]) == (100, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "none of 0 rows has a 'preference'"),
        ('[{"score": 1}]', "none of 1 rows has a 'preference'"),
        ("[1]", "row 1: an object is needed, this is int"),
        ("[{", "not JSON"),
        ('[{"preference": 1, "generator_2": "a"}, {"preference": 1, "generator_2": "b"}]', "2 values of generator_2"),
        ('[{"preference": 1, "annotator": "a"}, {"preference": 1, "annotator": "b"}]', "2 values of annotator"),
    ],
)
def test_what_is_no_annotation_file_is_refused(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(EvaluationError) as error:
        score_file(path, CONFIG)
    assert message in str(error.value)
    with pytest.raises(EvaluationError, match="is not a file"):
        score_file(tmp_path / "nowhere.json", CONFIG)


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


BOOK = [
    {"instruction": "Double it.", "input": "4", "output": "8", "model_response": "8"},
    {"instruction": "Name a fruit.", "input": "", "output": "apple", "model_response": "pear"},
    {"instruction": "Name a fruit.", "input": "", "output": "apple", "model_response": None},
]


def test_instruction_files_become_a_run_that_the_judge_scores(tmp_path):
    from evaluation.judge import judge

    found = import_responses(write(tmp_path / "book.json", BOOK), tmp_path / "run", "tuned")
    assert found == {"format": "instruction", "num_responses": 3, "num_missing": 1}
    judge(ReferenceJudge(min_scored=0.5), ["tuned"], tmp_path / "run")
    write_report(CONFIG, tmp_path / "run")
    report = json.loads((tmp_path / "run/report.json").read_text(encoding="utf-8"))
    states = report["models"]["tuned"]["states"]
    assert (states["scored"], states["generation_failed"]) == (2, 1)
    assert report["headline"]["tuned"]["mean"] == 50


def test_two_files_of_the_same_prompts_line_up_in_any_order(tmp_path):
    import_responses(write(tmp_path / "one.json", BOOK[:2]), tmp_path / "run", "base")
    import_responses(write(tmp_path / "two.json", BOOK[1::-1]), tmp_path / "run", "tuned")
    by_model = {
        model: {row["id"]: row for row in map(json.loads, (tmp_path / f"run/responses/{model}.jsonl").open())}
        for model in ("base", "tuned")
    }
    assert by_model["base"].keys() == by_model["tuned"].keys()
    for name, row in by_model["base"].items():
        assert row["response"] == by_model["tuned"][name]["response"]


def test_alpaca_eval_outputs_with_references(tmp_path):
    outputs = write(tmp_path / "o.json", [{"instruction": "a", "output": "x", "generator": "m", "dataset": "d"}])
    references = write(tmp_path / "r.json", [{"instruction": "a", "output": "y"}, {"instruction": "b", "output": "z"}])
    assert import_responses(outputs, tmp_path / "run", "m", references)["format"] == "alpaca_eval"
    row = json.loads((tmp_path / "run/responses/m.jsonl").read_text(encoding="utf-8"))
    assert (row["prompt"], row["reference"], row["response"], row["category"]) == ("a", "y", "x", "d")
    short = write(tmp_path / "s.json", [{"instruction": "b", "output": "z"}])
    with pytest.raises(EvaluationError, match="has no reference for 'a'"):
        import_responses(outputs, tmp_path / "other", "m", short)


def test_our_own_rows_are_joined_by_id(tmp_path):
    run = make_run(tmp_path / "run", num_rows=5)
    rows = [{"id": f"row-0000{i}", "response": f"r{i}"} for i in (4, 2, 0, 1, 3)]
    import_responses(write(tmp_path / "r.json", rows), run, "third")
    written = [json.loads(line) for line in (run / "responses/third.jsonl").open(encoding="utf-8")]
    assert {row["id"]: row["response"] for row in written} == {f"row-0000{i}": f"r{i}" for i in range(5)}
    assert all(row["reference"] == f"the word is {int(row['id'][-1]) * 7}" for row in written)


QUESTIONS = [
    {"id": "a", "messages": [{"role": "system", "content": "Be brief."},
                             {"role": "user", "content": "Double it.\n\n4"}],
     "prompt": "<|user|>Double it.\n\n4<|assistant|>", "question": "Double it.\n\n4", "input_separator": "\n\n"},
    {"id": "b", "messages": [{"role": "user", "content": "Name a fruit."}], "prompt": "Name a fruit.->"},
    {"id": "c", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
                             {"role": "user", "content": "And now?"}], "prompt": "x"},
]  # fmt: skip


def question_set(folder, rows=QUESTIONS, **more):
    rows = [{"prompt_token_ids": [], "reference": "8"} | row | more for row in rows]
    (folder / "data").mkdir(parents=True)
    (folder / "data/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def imported(folder, rows):
    import_responses(write(folder / "answers.json", rows), folder, "other")
    return {row["id"]: row for row in map(json.loads, (folder / "responses/other.jsonl").open(encoding="utf-8"))}


@pytest.mark.parametrize("column", [{}, {"system": "Be  brief.\n"}, {"system_prompt": "Be brief."}])
@pytest.mark.parametrize("last", ["And now?", "Hi\n\nAnd now?"])
def test_questions_join_whatever_the_template_and_system(tmp_path, column, last):
    rows = [
        {"instruction": last, "output": "well"},
        {"instruction": "Double it.", "input": "4", "output": "8"} | column,
        {"instruction": "Name a fruit. ", "output": "pear"},
    ]
    found = imported(question_set(tmp_path), rows)
    assert {name: row["response"] for name, row in found.items()} == {"a": "8", "b": "pear", "c": "well"}
    assert found["a"]["prompt"] == QUESTIONS[0]["prompt"]


def test_ids_join_before_questions(tmp_path):
    rows = [{"id": name, "instruction": "anything", "output": name} for name in "cab"]
    found = imported(question_set(tmp_path), rows)
    assert {name: row["response"] for name, row in found.items()} == {"a": "a", "b": "b", "c": "c"}


def asked(name, system=None):
    said = [{"role": "system", "content": system}] if system else []
    return {"id": name, "messages": [*said, {"role": "user", "content": "What?"}], "prompt": "What?"}


@pytest.mark.parametrize(
    ("rows", "systems", "found"),
    [
        ([asked("a"), asked("b")], [None, None], "ab"),  # the same prompt twice: either answer is its answer
        ([asked("a", "Be brief."), asked("b")], [None, "Be brief."], "ba"),
        ([asked("a", "Be brief."), asked("b", "Be long.")], ["Be long.", "Be brief."], "ba"),
        ([asked("a", "Be brief.")], [None], "a"),
        ([asked("a", "Be brief."), asked("b")], [None, None], "2 different rows of data/test.jsonl ask 'What.'"),
        ([asked("a", "Be brief.")], ["Be long."], "'Be long.', and data/test.jsonl asks it with another"),
        ([asked("a")], [None, None], "answered more often than data/test.jsonl asks it"),
    ],
)
def test_equal_questions_are_told_apart_by_system(tmp_path, rows, systems, found):
    answers = [
        {"instruction": "What?", "output": str(number)} | ({"system": system} if system else {})
        for number, system in enumerate(systems)
    ]
    run = question_set(tmp_path, rows)
    if found.isalpha():
        assert [row["id"] for row in sorted(imported(run, answers).values(), key=lambda r: r["response"])] == [*found]
    else:
        with pytest.raises(EvaluationError, match=found):
            imported(run, answers)


THINK = {"open": "<think>\n", "close": "\n</think>\n\n", "opened": True}


@pytest.mark.parametrize(
    ("said", "thought", "response"),
    [
        ({"response": "8"}, None, "8"),
        ({"response": "<think>\ntwice\n</think>\n\n8"}, "twice", "8"),
        ({"response": "8", "thought": "twice"}, "twice", "8"),
        ({"response": "8", "reasoning_content": " twice\n"}, "twice", "8"),
        ({"response": "8", "reasoning_content": ""}, None, "8"),
        ({"response": "<think>twice"}, "twice", None),
    ],
)
@pytest.mark.parametrize("thinking", [None, THINK])
def test_thoughts_in_files_are_kept_apart(tmp_path, said, thought, response, thinking):
    run = question_set(tmp_path, QUESTIONS[:1], **({"thinking": thinking} if thinking else {}))
    row = imported(run, [{"id": "a"} | said])["a"]
    assert (row.get("thought"), row["response"]) == (thought, response)
    assert row["state"] == ("generated" if response else "generation_failed")
    assert ("thought" in row) == (thought is not None)
    if response is None:
        assert row["cause"] == "the thought in the imported file was not closed"


def test_results_of_a_batch_are_joined_by_custom_id(tmp_path):
    message = {"role": "assistant", "content": "8", "reasoning_content": "twice"}
    good = {"status_code": 200, "body": {"choices": [{"message": message, "finish_reason": "stop"}]}}
    bad = {"status_code": 500, "body": {"error": {"code": "overloaded"}}}
    rows = [{"custom_id": name, "response": said} for name, said in zip("cba", (None, bad, good), strict=True)]
    found = imported(question_set(tmp_path), rows)
    assert (found["a"]["response"], found["a"]["thought"], found["a"]["finish_reason"]) == ("8", "twice", "stop")
    assert "code overloaded" in found["b"]["cause"] and found["c"]["state"] == "generation_failed"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "row-00000", "response": "x"}], "4 test rows have no response ('row-00001' first), 0 responses"),
        (
            [{"id": f"row-0000{i}", "response": ""} for i in range(6)],
            "1 responses have no test row ('row-00005' first)",
        ),
        ([{"id": "row-00000", "response": "x"}] * 2, "id 'row-00000' is there twice"),
        ([{"id": 1, "response": "x"}], "row 1: id must be text, this is 1"),
        ([{"instruction": "new", "output": "x"}], "no row of data/test.jsonl asks 'new'"),
        ([{"question": "new", "answer": "x"}], "the first of 1 has question, answer"),
        ([], "the first of 0 has none"),
    ],
)
def test_responses_that_do_not_line_up_are_refused(tmp_path, rows, message):
    run = make_run(tmp_path / "run", num_rows=5)
    with pytest.raises(EvaluationError) as error:
        import_responses(write(tmp_path / "r.json", rows), run, "third")
    assert message in str(error.value)
    assert not (run / "responses/third.jsonl").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b"])
def test_a_model_name_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(EvaluationError, match="cannot be a file's name"):
        import_responses(write(tmp_path / "book.json", BOOK), tmp_path / "run", name)
