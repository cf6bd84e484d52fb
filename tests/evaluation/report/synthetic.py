"""A run directory made up for the tests: deterministic, complete, and full of text that tries to break out."""

import json
import random
from pathlib import Path

HOSTILE = [
    "<script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 2">',
    "</script><script>window.pwned = 3</script>",
    "<!--<script>",
    "safe \u202eevil txt.exe\u202c and \u2066isolate\u2069",
    "| a | table ``` fence [link](javascript:window.pwned=4) @somebody",
    "{{ 7 * 7 }} {% raw %} ${7*7}",
    "nul \x00 bell \x07 line\u2028separator lone \ud800 end",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u4f60\u597d \U0001f600",
]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "answers", "plainly"]
CATEGORIES = ["first word", "last word", "count", "reverse", "<b>bold</b>"]


EXPORT_CHECK = {
    "trained_loss": 0.6621,
    "exported_loss": 0.6634,
    "loss_tolerance": 0.02,
    "vllm": {
        "num_prompts": 16,
        "num_tokens": 1280,
        "mean_difference": 0.0583,
        "mean_limit": 0.0795,
        "own_difference": 0.053,
        "far_difference": 0.424,
        "far_share": 0.0047,
        "far_share_limit": 0.02,
        "largest_difference": 0.576,
        "widest_gap": 0.188,
        "gap_limit": 1.06,
        "disagreements": [],
    },
}
"""What an export's record holds of its check."""


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Lone surrogates cannot be UTF-8: they reach files as JSON escapes.
    path.write_text("".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows), encoding="utf-8")


def make_run(
    run_dir: Path,
    *,
    num_rows: int = 200,
    num_filler_chars: int = 0,
    repeats: int = 1,
    seed: int = 0,
    judge: str = "reference",
    models: tuple[str, ...] = ("base", "tuned"),
    tuned_mean: float = 85.0,
) -> Path:
    """Write every file of the contract; about one response in a hundred has no score.

    Args:
        run_dir: Made when absent.
        num_rows: Prompts of the test set.
        num_filler_chars: Length of ordinary text added to each response.
        repeats: Verdicts a response.
        seed: Of all choices.
        judge: Name written into the verdicts.
        models: Names of the models; base scores about 20, the others about `tuned_mean`.
        tuned_mean: Centre of the other models' scores.

    Returns:
        The folder.
    """
    rng = random.Random(seed)  # noqa: S311
    run_dir.mkdir(parents=True, exist_ok=True)
    test = []
    for i in range(num_rows):
        hostile = HOSTILE[i % len(HOSTILE)] if i % 3 == 0 else ""
        question = f"Question {i}: say the word number {i * 7}. {hostile}"
        test.append(
            {
                "id": f"row-{i:05d}",
                "category": CATEGORIES[i % len(CATEGORIES)],
                "messages": [{"role": "user", "content": question}],
                "prompt": f"### Instruction:\n{question}\n\n### Response:\n",
                "prompt_token_ids": [1, 2, 3],
                "reference": f"the word is {i * 7}",
            }
        )
    write_jsonl(run_dir / "data/test.jsonl", test)
    for model in models:
        responses, scores = _model_rows(model, test, rng, num_filler_chars, repeats, judge, tuned_mean)
        write_jsonl(run_dir / f"responses/{model}.jsonl", responses)
        write_jsonl(run_dir / f"scores/{model}.jsonl", scores)
    _write_rest(run_dir, num_rows, rng)
    return run_dir


def _model_rows(model, test, rng, num_filler_chars, repeats, judge, tuned_mean):
    responses, scores = [], []
    for i, row in enumerate(test):
        filler = " ".join(rng.choices(WORDS, k=num_filler_chars // 5))[:num_filler_chars]
        hostile = HOSTILE[(i + 1) % len(HOSTILE)] if i % 4 == 0 else ""
        text = f"the word is {i if model == 'base' else i * 7} {hostile}{filler}"
        failed = i % 101 == 100
        common = {"id": row["id"], "category": row["category"], "model": model, "sample": 0}
        responses.append(
            common
            | {
                "prompt": row["prompt"],
                "reference": row["reference"],
                "response": None if failed else text,
                "finish_reason": None if failed else ("length" if i % 50 == 49 else "stop"),
                "num_prompt_tokens": 20,
                "num_response_tokens": 0 if failed else 12,
                "state": "generation_failed" if failed else "generated",
                "cause": "the engine died" if failed else None,
                "key": f"k{i}",
            }
        )
        for repeat in range(repeats):
            centre = 20 if model == "base" else tuned_mean
            score = min(100, max(0, round(rng.gauss(centre, 18))))
            unparsed = model == "tuned" and i % 97 == 96
            state = "generation_failed" if failed else "judge_failed" if unparsed else "scored"
            scores.append(
                common
                | {
                    "repeat": repeat,
                    "state": state,
                    "score": score if state == "scored" else None,
                    "cause": None
                    if state == "scored"
                    else "no integer in the verdict"
                    if unparsed
                    else "the engine died",
                    "raw": f"Rating: {score} {HOSTILE[i % len(HOSTILE)] if i % 7 == 0 else ''}" if not failed else None,
                    "judge": judge,
                    "key": f"v{i}-{repeat}",
                }
            )
    return responses, scores


def _write_rest(run_dir: Path, num_rows: int, rng: random.Random) -> None:
    summary = {
        "format": "alpaca",
        "template": "alpaca",
        "train_on": "response",
        "sequence_length": 256,
        "splits": {
            "train": {"rows": 4000, "tokens": 212_345, "target_tokens": 41_234, "packs": 840, "utilisation": 0.987},
            "validation": {"rows": 200, "tokens": 10_345, "target_tokens": 2_034, "packs": 42, "utilisation": 0.96},
            "test": {"rows": num_rows},
        },
        "dropped": {"longer than the sequence": 12, "empty answer": 3},
        "truncated": {},
    }
    (run_dir / "data/summary.json").write_text(json.dumps(summary), encoding="utf-8")
    metrics: list[dict] = [{"kind": "validation", "step": 0, "epoch": 0.0, "loss": 6.2, "num_target_tokens": 2034}]
    for step in range(1, 701):
        loss = 0.25 + 5.9 * 0.993**step + rng.gauss(0, 0.05)
        metrics.append(
            {
                "kind": "train",
                "step": step,
                "epoch": step / 140,
                "loss": loss,
                "lr": 1e-3 * min(1, step / 50) * (1 - step / 701),
                "grad_norm": abs(rng.gauss(0.8, 0.2)),
                "num_tokens": 14_000,
                "num_target_tokens": 2_700,
                "step_s": 0.97,
                "tokens_per_s": rng.gauss(14_500, 300),
                "wait_s": 0.001,
                "memory_bytes": 900_000_000,
                "mfu": None,
                "padding_share": 0.02,
                "total_tokens": 14_000 * step,
                "max_steps": 700,
            }
        )
        if step % 100 == 0:
            metrics.append(
                {
                    "kind": "validation",
                    "step": step,
                    "epoch": step / 140,
                    "loss": loss + 0.08,
                    "num_target_tokens": 2034,
                }
            )
    write_jsonl(run_dir / "metrics.jsonl", metrics)
    (run_dir / "config.yaml").write_text("model:\n  from_scratch: {layers: 4}\n# </pre><script>\n", encoding="utf-8")
    for number, stage in enumerate(("prepare", "train", "export", "generate", "judge")):
        record = {
            "wall_s": 3.2 * 4**number,
            "finished_at": f"2026-01-02T03:0{number}:05+00:00",
            "versions": {"torch": "2.13.0", "vllm": "0.32.0"},
            "counts": {"rows": num_rows, "nested": {"deep": 1}} | (EXPORT_CHECK if stage == "export" else {}),
        }
        (run_dir / f"{stage}.record.json").write_text(json.dumps(record), encoding="utf-8")
