"""EleutherAI's lm-evaluation-harness on real vLLM engines, with tasks from a local folder; what is refused before."""

import json
import math
import sys

import pytest
import torch
import yaml

from evaluation.config import GenerationConfig, HarnessConfig, ModelSource
from evaluation.errors import EvaluationError
from evaluation.harness import harness_problems, measures_of, run_harness
from evaluation.report.build import write_report
from tests.evaluation import tiny_models

NUM_DOCUMENTS = 6
WORDS = ["red", "blue", "green"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks over one local file: which of three words is likelier, and how likely a text is."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"Say word {number}.", "answer": number % 3} for number in range(NUM_DOCUMENTS)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
        "test_split": "test",
        "metadata": {"version": 3.0},
    }
    choice = common | {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": WORDS,
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    spoken = common | {
        "task": "tiny_spoken",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{question}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, spoken):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder


def best_choice(model, tokenizer, question):
    """The word with the largest sum of log-probabilities after the question, as the harness defines accuracy."""
    sums = []
    for word in WORDS:
        start = tokenizer(question)["input_ids"]
        whole = tokenizer(f"{question} {word}")["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        sums.append(sum(float(logprobs[i - 1, whole[i]]) for i in range(len(start), len(whole))))
    return max(range(len(WORDS)), key=sums.__getitem__)


@pytest.mark.slow
def test_the_harness_says_what_the_models_logits_say(tasks, tmp_path, local_ray):
    pytest.importorskip("lm_eval")
    from peft import PeftModel
    from transformers import AutoTokenizer, LlamaForCausalLM

    base = tiny_models.build(tmp_path / "base")
    adapter = tiny_models.build_adapter(base, tmp_path / "adapter")
    models = {"base": ModelSource(path=str(base)), "tuned": ModelSource(path=str(base), adapter=str(adapter))}
    asked = {"tasks": ["tiny_choice", "tiny_spoken"], "include_path": str(tasks)}
    config = GenerationConfig(dtype="float32", cpu_cache_gib=0.1, lm_eval=asked)
    run = tmp_path / "run"
    counts = run_harness(config, run, models)
    assert counts == {name: {"num_measures": 2, "reused": False} for name in ("base", "tuned")}

    tokenizer, model = AutoTokenizer.from_pretrained(base), LlamaForCausalLM.from_pretrained(base)
    right = [best_choice(model, tokenizer, f"Say word {n}.") == n % 3 for n in range(NUM_DOCUMENTS)]
    share = sum(right) / NUM_DOCUMENTS
    written = json.loads((run / "lm_eval/base.json").read_text(encoding="utf-8"))
    by_task = {measure["task"]: measure for measure in written["measures"]}
    choice = by_task["tiny_choice"]
    assert choice["value"] == pytest.approx(share)
    assert choice["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / (NUM_DOCUMENTS - 1)))
    assert (choice["metric"], choice["num"], choice["version"], choice["num_fewshot"]) == ("acc", 6, 3.0, 0)
    assert by_task["tiny_spoken"]["value"] == 0  # four tokens cannot repeat the question
    assert written["harness_version"].startswith("0.")

    tuned = PeftModel.from_pretrained(model, adapter)
    right = [best_choice(tuned, tokenizer, f"Say word {n}.") == n % 3 for n in range(NUM_DOCUMENTS)]
    written = json.loads((run / "lm_eval/tuned.json").read_text(encoding="utf-8"))
    assert written["measures"][0]["value"] == pytest.approx(sum(right) / NUM_DOCUMENTS)
    assert {path.name for path in (run / "lm_eval").iterdir()} == {"base.json", "tuned.json"}  # no merged weights

    write_report_of(run)
    rows = json.loads((run / "report.json").read_text(encoding="utf-8"))["benchmarks"]
    assert {row["task"]: row["models"]["base"]["value"] for row in rows}["tiny_choice"] == pytest.approx(share)
    assert set(rows[0]["models"]) == {"base", "tuned"}
    assert "tiny_choice" in (run / "report.html").read_text(encoding="utf-8")

    again = run_harness(config, run, models)
    assert again == {name: {"num_measures": 2, "reused": True} for name in ("base", "tuned")}
    run_harness(GenerationConfig(), run, models)
    assert not list((run / "lm_eval").glob("*.json"))  # no longer asked for


def write_report_of(run):
    from evaluation.config import ReportConfig

    write_report(ReportConfig(bootstrap_samples=100), run)


def test_without_the_extra_it_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = harness_problems(HarnessConfig(tasks=["arc_easy"]))
    assert "generation.lm_eval" in problem and "pip install 'lm-eval[api]" in problem


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    pytest.importorskip("lm_eval")
    (problem,) = harness_problems(HarnessConfig(tasks=["a"], include_path=str(tmp_path / "nowhere")))
    assert "include_path" in problem and "no such folder" in problem


def test_tasks_of_the_users_folder_are_known(tasks):
    pytest.importorskip("lm_eval")
    assert harness_problems(HarnessConfig(tasks=["tiny_choice", "tiny_spoken"], include_path=str(tasks))) == []


@pytest.mark.slow
def test_an_unknown_task_is_named_before_anything_starts(tasks):
    pytest.importorskip("lm_eval")
    config = HarnessConfig(tasks=["tiny_choice", "arc_easy", "no_such_task"], include_path=str(tasks))
    (problem,) = harness_problems(config)
    assert problem.startswith("generation.lm_eval.tasks: no_such_task is no task of the harness and ")


def test_a_bare_list_of_tasks_is_enough_and_models_must_be_there():
    config = GenerationConfig.model_validate({"lm_eval": ["arc_easy"]})
    assert config.lm_eval.tasks == ["arc_easy"] and config.lm_eval.models == ["base", "tuned"]
    with pytest.raises(ValueError, match=r"lm_eval\.models: third is not one of base, tuned"):
        GenerationConfig.model_validate({"lm_eval": {"tasks": ["arc_easy"], "models": ["third"]}})


def test_a_model_without_weights_of_its_own_is_refused(tmp_path, tasks):
    pytest.importorskip("lm_eval")
    config = GenerationConfig(lm_eval={"tasks": ["tiny_choice"], "include_path": str(tasks), "models": ["tuned"]})
    with pytest.raises(EvaluationError, match="tuned is not a model of this run with weights"):
        run_harness(config, tmp_path, {"base": ModelSource(path="x")})


def test_groups_and_errors_are_flattened():
    results = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "bleu,strict": 3, "bleu_stderr,strict": "N/A"}
        },
        "groups": {"g": {"alias": "g", "acc,none": 0.5, "acc_stderr,none": 0.1}},
        "group_subtasks": {"g": ["a"], "a": []},
        "versions": {"a": 2.0},
        "n-shot": {"a": 5},
        "n-samples": {"a": {"original": 10, "effective": 4}},
        "higher_is_better": {"a": {"acc": True}},
    }
    rows = measures_of(results)
    assert [(row["task"], row["metric"], row["filter"]) for row in rows] == [
        ("a", "acc", "none"),
        ("a", "bleu", "strict"),
        ("g", "acc", "none"),
    ]
    assert [row["num"] for row in rows] == [4, 4, 4]
    assert [row["standard_error"] for row in rows] == [0.1, None, 0.1]
    nothing = measures_of({"results": {"a": {"acc,none": math.nan, "acc_stderr,none": math.nan}}})
    assert (nothing[0]["value"], nothing[0]["standard_error"]) == (None, None)
