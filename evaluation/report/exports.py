"""The way out: a run as CSV, JUnit XML, and in the formats of other tools; each a pure function of the run's files.

JSON is written in ASCII, as many readers of JSON Lines break lines at U+2028 too.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import yaml

from evaluation.errors import EvaluationError
from evaluation.report.page import visible
from evaluation.report.run_files import RunFiles, read_run
from evaluation.report.scores import asked_ids, categories_of, gather_scores
from evaluation.rows import Row

Format = Literal["alpaca-eval-outputs", "alpaca-eval-annotations", "lm-eval-samples", "openai-batch", "model-index"]
FORMATS: tuple[Format, ...] = (
    "alpaca-eval-outputs",
    "alpaca-eval-annotations",
    "lm-eval-samples",
    "openai-batch",
    "model-index",
)


def export_run(run_dir: Path, kind: Format, out: Path, *, model: str = "tuned") -> Path:
    """Write a run in another tool's format.

    Args:
        run_dir: Folder of the run.
        kind: The format; see the function of each.
        out: File to write.
        model: Whose responses and scores.

    Returns:
        The file.

    Raises:
        EvaluationError: The model has no responses or no scores in this run.
    """
    files = read_run(run_dir)
    makers: Mapping[Format, Callable[[RunFiles, str], str]] = {
        "alpaca-eval-outputs": alpaca_eval_outputs,
        "alpaca-eval-annotations": alpaca_eval_annotations,
        "lm-eval-samples": lm_eval_samples,
        "openai-batch": openai_batch,
        "model-index": model_index,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(makers[kind](files, model), encoding="utf-8")
    return out


def table_csv(files: RunFiles) -> str:
    """One line a prompt and model: id, category, model, state, score, number of verdicts, response.

    Args:
        files: The run directory's content.

    Returns:
        CSV with a header. Text that a spreadsheet would run as a formula gets a leading apostrophe, and characters
        that reorder or hide text are spelled out.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", "category", "model", "state", "score", "num_verdicts", "response"])
    categories, ids = categories_of(files), asked_ids(files)
    for model in files.models():
        scores = gather_scores(files.verdicts.get(model, {}), ids)
        counts = _verdicts_by_id(files, model)
        for name in ids:
            response = files.responses.get(model, {}).get((name, 0), {}).get("response")
            score = scores.scores.get(name)
            cells = [name, categories.get(name, ""), model, scores.states[name]]
            writer.writerow(
                [
                    *(_cell(cell) for cell in cells),
                    "" if score is None else f"{score:g}",
                    len(counts.get(name, [])),
                    _cell(str(response or "")),
                ]
            )
    return out.getvalue()


def _cell(text: str) -> str:
    text = visible(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _verdicts_by_id(files: RunFiles, model: str) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for (name, _, _), row in files.verdicts.get(model, {}).items():
        rows.setdefault(name, []).append(row)
    return rows


def junit_xml(files: RunFiles, pass_score: float, model: str = "tuned") -> str:
    """One test case a prompt, for a CI server: a low score is a failure, an outage of judge or engine an error.

    Args:
        files: The run directory's content.
        pass_score: Scores below it fail, in points.
        model: Whose scores.

    Returns:
        JUnit XML. A skipped row is skipped.
    """
    ids, categories = asked_ids(files), categories_of(files)
    scores = gather_scores(files.verdicts.get(model, {}), ids)
    failed = sum(score < pass_score for score in scores.scores.values())
    skipped = sum(state == "skipped" for state in scores.states.values())
    counts = {
        "tests": len(ids),
        "failures": failed,
        "skipped": skipped,
        "errors": len(ids) - len(scores.scores) - skipped,
    }
    attributes = {key: str(value) for key, value in counts.items()}
    root = ElementTree.Element("testsuites", attributes)
    suite = ElementTree.SubElement(
        root, "testsuite", {"name": f"{visible(files.run_dir.resolve().name)} {model}"} | attributes
    )
    verdicts = _verdicts_by_id(files, model)
    for name in ids:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": visible(categories.get(name, "")), "name": visible(name)}
        )
        state, score = scores.states[name], scores.scores.get(name)
        cause = visible(str((verdicts.get(name) or [{}])[-1].get("cause") or "no verdict was written"))
        if score is not None:
            if score < pass_score:
                words = visible(str((verdicts[name][-1]).get("raw") or ""))
                ElementTree.SubElement(
                    case, "failure", {"message": f"score {score:g} below {pass_score:g}"}
                ).text = words
        elif state == "skipped":
            ElementTree.SubElement(case, "skipped", {"message": cause})
        else:
            ElementTree.SubElement(case, "error", {"type": state, "message": cause})
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _json(value: Any, indent: int | None = None) -> str:  # noqa: ANN401 - any JSON
    """ASCII, with a question mark for each lone surrogate: readers built on Arrow (pandas, datasets) stop at one."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return json.dumps(json.loads(text), indent=indent)


def _responses_of(files: RunFiles, model: str) -> dict[str, Row]:
    rows = {name: row for (name, sample), row in files.responses.get(model, {}).items() if sample == 0}
    if not rows:
        raise EvaluationError(
            f"{files.run_dir} has no responses of {model}; it has {', '.join(files.models()) or 'none'}"
        )
    return {name: rows[name] for name in asked_ids(files) if name in rows}


def _instruction(files: RunFiles, row: Row) -> str:
    """The last user message where there is one: what AlpacaEval calls the instruction."""
    messages = files.test.get(row["id"], {}).get("messages") or []
    spoken = [str(message.get("content")) for message in messages if message.get("role") == "user"]
    return spoken[-1] if spoken else str(row["prompt"])


def alpaca_eval_outputs(files: RunFiles, model: str) -> str:
    """AlpacaEval's model outputs: a JSON list of instruction, output, generator, dataset. Null responses stay out."""
    rows = [
        {
            "instruction": _instruction(files, row),
            "output": row["response"],
            "generator": model,
            "dataset": row.get("category") or "",
        }
        for row in _responses_of(files, model).values()
        if row["response"] is not None
    ]
    return _json(rows, indent=1) + "\n"


def alpaca_eval_annotations(files: RunFiles, model: str) -> str:
    """AlpacaEval's annotations of the model against base, made from scores.

    The higher score is preferred: 2 the model, 1 base, 1.5 a draw, null where one of them has no score.
    """
    ids = asked_ids(files)
    base_scores, own_scores = (gather_scores(files.verdicts.get(name, {}), ids) for name in ("base", model))
    base, own = _responses_of(files, "base"), _responses_of(files, model)
    rows = []
    for name in ids:
        if name not in base or name not in own:
            continue
        a, b = base_scores.scores.get(name), own_scores.scores.get(name)
        preference = None if a is None or b is None else 1.5 if a == b else 1.0 + (b > a)
        rows.append(
            {
                "instruction": _instruction(files, own[name]),
                "output_1": base[name]["response"],
                "generator_1": "base",
                "output_2": own[name]["response"],
                "generator_2": model,
                "annotator": " and ".join(own_scores.judges),
                "preference": preference,
            }
        )
    return _json(rows, indent=1) + "\n"


def lm_eval_samples(files: RunFiles, model: str) -> str:
    """lm-evaluation-harness's sample log, one JSON object a line; `score` is our judge's, null where there is none."""
    scores = gather_scores(files.verdicts.get(model, {}), asked_ids(files)).scores
    lines = []
    for number, (name, row) in enumerate(_responses_of(files, model).items()):
        doc = {
            "id": name,
            "category": row.get("category"),
            "question": _instruction(files, row),
            "answer": row["reference"],
        }
        response = row["response"] if row["response"] is not None else ""
        lines.append(
            {
                "doc_id": number,
                "doc": doc,
                "target": row["reference"],
                "arguments": {"gen_args_0": {"arg_0": row["prompt"], "arg_1": {}}},
                "resps": [[response]],
                "filtered_resps": [response],
                "filter": "none",
                "metrics": ["score"],
                "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
                "prompt_hash": _hash(str(row["prompt"])),
                "target_hash": _hash(str(row["reference"])),
                "score": scores.get(name),
            }
        )
    return "".join(_json(line) + "\n" for line in lines)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def openai_batch(files: RunFiles, model: str) -> str:
    """OpenAI's batch requests, one a line: the test prompts for the model of that name, `custom_id` the row's id."""
    if not files.test:
        raise EvaluationError(f"{files.run_dir}/data/test.jsonl is missing; run the prepare stage")
    return "".join(
        _json(
            {
                "custom_id": name,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": model, "messages": row["messages"]},
            }
        )
        + "\n"
        for name, row in files.test.items()
    )


def model_index(files: RunFiles, model: str) -> str:
    """Hugging Face's model-index, the YAML front matter of a model card with the mean score on the test set."""
    ids = asked_ids(files)
    scores = gather_scores(files.verdicts.get(model, {}), ids)
    if not scores.scores:
        raise EvaluationError(f"{files.run_dir} has no scores of {model}; run the judge stage")
    name = visible(files.run_dir.resolve().name)
    metric: dict[str, Any] = {
        "type": "judge_score",
        "name": f"mean score 0..100 ({', '.join(scores.judges)} judge, {len(scores.scores)} of {len(ids)} prompts)",
        "value": round(sum(scores.scores.values()) / len(scores.scores), 4),
    }
    result = {
        "task": {"type": "text-generation", "name": "Text Generation"},
        "dataset": {"type": name, "name": f"{name} test split", "split": "test"},
        "metrics": [metric],
    }
    card = {"model-index": [{"name": f"{name}-{model}", "results": [result]}]}
    return f"---\n{yaml.safe_dump(card, sort_keys=False, allow_unicode=True)}---\n"
