"""A run in other tools' formats: read back by the tool where it is installed, else by its documented shape."""

import csv
import io
import json
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from evaluation.config import ReportConfig
from evaluation.errors import EvaluationError
from evaluation.interchange import import_responses, score_file
from evaluation.report.build import write_report
from evaluation.report.exports import FORMATS, alpaca_eval_annotations, export_run, junit_xml, table_csv
from evaluation.report.run_files import read_run
from evaluation.rows import read_rows

_synthetic = runpy.run_path(str(Path(__file__).parent / "synthetic.py"))
make_run = _synthetic["make_run"]
CONFIG = ReportConfig(bootstrap_samples=200)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), num_rows=120, repeats=2)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_written_as_utf8(run, tmp_path, kind):
    assert export_run(run, kind, tmp_path / "deep" / kind).read_text(encoding="utf-8")


def test_annotations_come_back_as_our_own_wins(run, tmp_path):
    path = export_run(run, "alpaca-eval-annotations", tmp_path / "annotations.json")
    result = score_file(path, CONFIG)
    write_report(CONFIG, run)
    comparison = json.loads((run / "report.json").read_text(encoding="utf-8"))["comparison"]
    assert result["num_asked"] == 120
    assert (result["num_wins"], result["num_draws"], result["num_losses"], result["num_scored"]) == (
        comparison["wins"],
        comparison["ties"],
        comparison["losses"],
        comparison["num_pairs"],
    )
    assert result["unscored"] == {"no preference": 120 - comparison["num_pairs"]}


def test_annotations_are_read_by_alpaca_eval(run, tmp_path):
    metrics = pytest.importorskip("alpaca_eval.metrics", reason="the alpaca-eval package is not installed")
    path = export_run(run, "alpaca-eval-annotations", tmp_path / "annotations.json")
    theirs = metrics.get_winrate(json.loads(path.read_text(encoding="utf-8")))
    ours = score_file(path, CONFIG)
    assert theirs["win_rate"] == pytest.approx(ours["win_rate"])
    assert theirs["standard_error"] == pytest.approx(ours["standard_error"])
    assert theirs["n_total"] == ours["num_scored"] == 118


def test_outputs_are_read_by_alpaca_eval(run, tmp_path):
    utils = pytest.importorskip("alpaca_eval.utils", reason="the alpaca-eval package is not installed")
    theirs = utils.load_or_convert_to_dataframe(export_run(run, "alpaca-eval-outputs", tmp_path / "outputs.json"))
    assert len(theirs) == 119 and set(theirs["generator"]) == {"tuned"}
    assert utils.get_generator_name(None, theirs) == "tuned"


def test_outputs_come_back_by_prompt(run, tmp_path):
    path = export_run(run, "alpaca-eval-outputs", tmp_path / "outputs.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert set(rows[0]) == {"instruction", "output", "generator", "dataset"}
    assert len(rows) == 119  # one generation failed
    again = tmp_path / "again"
    import_responses(path, again, "tuned")
    assert len(read_rows(again / "responses/tuned.jsonl")) == 119


def test_samples_have_the_harness_keys(run, tmp_path):
    lines = export_run(run, "lm-eval-samples", tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert set(rows[0]) == {
        *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"),
        *("doc_hash", "prompt_hash", "target_hash", "score"),
    }
    assert [row["doc_id"] for row in rows] == list(range(120))
    assert rows[100]["score"] is None
    assert isinstance(rows[0]["score"], float) and rows[0]["metrics"] == ["score"]


def test_samples_are_what_the_harness_declares(run, tmp_path):
    schema = pytest.importorskip("lm_eval.result_schema", reason="the lm-eval package is not installed")
    from lm_eval.utils import hash_string

    lines = export_run(run, "lm-eval-samples", tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    declared = TypeAdapter(schema.SampleResult)
    for line in lines:
        row = json.loads(line)
        scored = {key: value for key, value in row.items() if value is not None}  # a row without a score has null there
        read = declared.validate_python(scored, strict=True)
        assert read["resps"] == row["resps"] and read["metrics"] == ["score"]
        assert row["prompt_hash"] == hash_string(row["arguments"]["gen_args_0"]["arg_0"])
        assert row["target_hash"] == hash_string(row["target"])
    with pytest.raises(ValidationError):
        declared.validate_python(row | {"resps": "text"})


def test_batch_requests_are_what_openai_declares(run, tmp_path):
    from openai.types.chat import ChatCompletionUserMessageParam
    from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

    text = export_run(run, "openai-batch", tmp_path / "batch.jsonl", model="gpt-x").read_text(encoding="utf-8")
    bodies = [json.loads(line)["body"] for line in text.splitlines()]
    request, message = TypeAdapter(CompletionCreateParamsNonStreaming), TypeAdapter(ChatCompletionUserMessageParam)
    for body in bodies:
        assert set(body) <= set(CompletionCreateParamsNonStreaming.__annotations__) | {"messages", "model"}
        assert request.validate_python(body)["model"] == "gpt-x"
        assert [message.validate_python(one) for one in body["messages"]] == body["messages"]
    with pytest.raises(ValidationError):
        message.validate_python({"role": "tuned", "content": "x"})


def test_batch_requests_have_unique_ids_and_messages(run, tmp_path):
    text = export_run(run, "openai-batch", tmp_path / "batch.jsonl", model="gpt-x").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len({row["custom_id"] for row in rows}) == 120
    assert all((row["method"], row["url"]) == ("POST", "/v1/chat/completions") for row in rows)
    assert all(row["body"]["model"] == "gpt-x" and row["body"]["messages"][0]["role"] == "user" for row in rows)


def test_model_index_is_read_by_the_hub_library(run, tmp_path):
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    text = export_run(run, "model-index", tmp_path / "README.md").read_text(encoding="utf-8")
    result = ModelCard(text).data.eval_results[0]
    assert result.metric_type == "judge_score"
    assert 70 < result.metric_value < 100
    (entry,) = yaml.safe_load(text.strip("-\n"))["model-index"]
    name, (read,) = model_index_to_eval_results([entry])
    assert name == entry["name"] and read.dataset_split == "test"
    assert eval_results_to_model_index(name, [read]) == [entry]  # nothing of ours was lost on the way
    assert yaml.safe_load(text.strip("-\n"))["model-index"][0]["name"].endswith("-tuned")


def test_a_model_that_is_not_there_is_named(run, tmp_path):
    for kind in ("alpaca-eval-outputs", "alpaca-eval-annotations", "lm-eval-samples", "model-index"):
        with pytest.raises(EvaluationError, match="stranger"):
            export_run(run, kind, tmp_path / "x", model="stranger")


def test_csv_is_whole_and_runs_no_formula(run, tmp_path):
    path = run / "responses/tuned.jsonl"
    files = read_run(run)
    files.responses["tuned"]["row-00001", 0]["response"] = '=HYPERLINK("http://x","y"), "two"\nlines'
    rows = list(csv.DictReader(io.StringIO(table_csv(files))))
    assert len(rows) == 240 and path.exists()
    tuned = {row["id"]: row for row in rows if row["model"] == "tuned"}
    assert tuned["row-00001"]["response"] == '\'=HYPERLINK("http://x","y"), "two"\nlines'
    assert tuned["row-00001"]["num_verdicts"] == "2"
    assert (tuned["row-00100"]["state"], tuned["row-00100"]["score"]) == ("generation_failed", "")


def test_junit_tells_failures_from_outages(run):
    root = ElementTree.fromstring(junit_xml(read_run(run), 80))  # noqa: S314 - our own text
    suite = root.find("testsuite")
    cases = suite.findall("testcase")
    scores = {
        row["id"]: row for row in csv.DictReader(io.StringIO(table_csv(read_run(run)))) if row["model"] == "tuned"
    }
    low = {name for name, row in scores.items() if row["score"] and float(row["score"]) < 80}
    assert {case.get("name") for case in cases if case.find("failure") is not None} == low
    assert {case.get("name") for case in cases if case.find("error") is not None} == {"row-00096", "row-00100"}
    assert (int(suite.get("tests")), int(suite.get("failures")), int(suite.get("errors"))) == (120, len(low), 2)
    by_name = {case.get("name"): case for case in cases}
    assert by_name["row-00096"].find("error").get("type") == "judge_failed"
    assert by_name["row-00100"].find("error").get("message") == "the engine died"


def test_junit_counts_rows_without_verdicts_as_skipped(tmp_path):
    run = make_run(tmp_path, num_rows=3, models=("base",))
    root = ElementTree.fromstring(junit_xml(read_run(run), 50))  # noqa: S314 - our own text
    assert root.get("skipped") == "3"
    assert len(root.findall(".//skipped")) == 3


def test_equal_scores_are_a_draw_in_annotations(run):
    files = read_run(run)
    for repeat in (0, 1):
        for model in ("base", "tuned"):
            files.verdicts[model]["row-00003", 0, repeat]["score"] = 40
    rows = json.loads(alpaca_eval_annotations(files, "tuned"))
    assert rows[3]["preference"] == 1.5
    assert {row["preference"] for row in rows} == {1.5, 2.0, None}
