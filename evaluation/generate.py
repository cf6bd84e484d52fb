"""The stage that lets each model answer the test set.

Rows are appended to `responses/<model>.jsonl` as they finish. Each carries a hash of all that it depends on (weights,
prompt, sampling), so a run that was killed asks only for what is missing, and a changed model asks for everything.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from evaluation.config import ApiModel, GenerationConfig, ModelSource
from evaluation.endpoint import EndpointClient
from evaluation.errors import EvaluationError
from evaluation.models import ModelFacts, family_of, inspect_model, render_as_chat, respell
from evaluation.progress import RowCounter
from evaluation.prompts import Prompt, read_prompts
from evaluation.reply import Reply
from evaluation.rows import Row, append_rows, content_key, read_rows, write_json, write_rows
from evaluation.thoughts import Parts, split, split_known, unclosed_cause
from evaluation.vllm_cluster import Completion, EngineSpec, Request, complete, engines_that_fit, shares

# Sizes that vLLM's LoRA kernels are built for.
_ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Of a row whose model may think.
_THOUGHT_FIELDS = ("thought", "thought_closed")


@dataclass
class _Task:
    """One model's part of the stage: what it shall answer, and what it has."""

    name: str
    path: Path
    fingerprint: str
    family: str
    expected: list[Row] = field(default_factory=list)  # every row of the finished file, without its answer
    prompts: list[Prompt] = field(default_factory=list)  # beside `expected`
    finished: dict[str, Row] = field(default_factory=dict)  # by key
    num_reused: int = 0
    wall_s: float = 0.0
    rows_by_engine: list[int] = field(default_factory=list)  # of all models on the same engines


@dataclass
class _LocalTask(_Task):
    """A model on our own engines."""

    source: ModelSource = field(kw_only=True)
    facts: ModelFacts = field(kw_only=True)
    max_model_len: int = field(kw_only=True)


@dataclass
class _RemoteTask(_Task):
    """A model at an endpoint."""

    source: ApiModel = field(kw_only=True)


def generate(config: GenerationConfig, run_dir: Path, models: Mapping[str, ModelSource | ApiModel]) -> dict[str, Any]:
    """Answer the test set with each model; Ray is initialised already.

    Args:
        config: Engines and sampling.
        run_dir: The run's folder, with `data/test.jsonl`; `responses/<model>.jsonl` is written into it.
        models: The models by name; `config.models` come on top. Those that differ in the adapter alone share engines.

    Returns:
        Under `models`, for each name the rows by state, how many were there already, tokens, seconds, and how many
        rows each engine answered.

    Raises:
        EvaluationError: No test set, no model, too few CPUs or GPUs, a prompt beyond a model's vocabulary, or an
            endpoint that refuses everything.
    """
    prompts = read_prompts(run_dir)
    everyone = {**models, **config.models}
    tasks = [_plan(name, source, prompts, config, run_dir) for name, source in everyone.items()]
    write_json(run_dir / "responses" / "models.json", {task.name: _describe(task) for task in tasks})
    owing = [task for task in tasks if next(_missing(task), None) is not None]
    remote = [task for task in owing if isinstance(task, _RemoteTask)]
    groups: dict[tuple[str, str | None, int], list[_LocalTask]] = {}
    for task in owing:
        if isinstance(task, _LocalTask):
            groups.setdefault((task.source.path, task.source.revision, task.max_model_len), []).append(task)
    # Loading dominates on small test sets: models that fit beside each other are loaded beside each other.
    specs = [_spec(config, group) for group in groups.values()]
    at_once = min(engines_that_fit(specs[0]) // config.engines, len(groups)) if specs else 1
    num_owed = sum(len(list(_missing(task))) for task in owing)
    if num_owed:
        with (
            RowCounter("generate: answers", num_owed) as counter,
            ThreadPoolExecutor(at_once) as local_pool,
            ThreadPoolExecutor(max(1, len(remote))) as remote_pool,
        ):
            work = [remote_pool.submit(_answer_remotely, config, task, counter) for task in remote]
            work += [local_pool.submit(_answer, config, group, counter) for group in groups.values()]
            for each in work:
                each.result()
    return {"models": {task.name: _finish(task) for task in tasks}}


def _plan(
    name: str, source: ModelSource | ApiModel, prompts: list[Prompt], config: GenerationConfig, run_dir: Path
) -> _LocalTask | _RemoteTask:
    """List the rows that a model owes, and read those that it has."""
    path = run_dir / "responses" / f"{name}.jsonl"
    if isinstance(source, ApiModel):
        fingerprint = content_key("api", source.base_url, source.model, source.prompt, source.send_sampling)
        remote = _RemoteTask(name, path, fingerprint, family_of(source.model), source=source)
        sampling: Row = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens}
        if source.prompt == "chat":  # in the endpoint's own template, whose tags are not the training template's
            prompts = [replace(prompt, thinking=None) for prompt in prompts]
        asked = [_asked_in_chat(prompt) if source.prompt == "chat" else prompt.text for prompt in prompts]
        _list_rows(remote, prompts, config, sampling, asked)
        return remote
    facts = inspect_model(source)
    if source.prompt == "chat":
        prompts = render_as_chat(prompts, source)
    prompts = respell(prompts, source.spelled)
    _require_vocabulary(name, source, facts, prompts)
    limit = min(config.max_model_len or facts.max_positions, facts.max_positions)
    task = _LocalTask(name, path, facts.fingerprint, facts.family, source=source, facts=facts, max_model_len=limit)
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens,
                "dtype": config.dtype, "max_model_len": limit, "stop": facts.stop_token_ids}  # fmt: skip
    _list_rows(task, prompts, config, sampling, [prompt.token_ids for prompt in prompts])
    for row in task.expected:
        if row["num_prompt_tokens"] >= limit:
            cause = f"{row['num_prompt_tokens']} prompt tokens; the model takes {limit}, answer included"
            _keep(task, row | _answer_fields("too_long", cause=cause))
    return task


def _asked_in_chat(prompt: Prompt) -> object:
    return [prompt.messages, dict(prompt.template_kwargs)] if prompt.template_kwargs else prompt.messages


def _require_vocabulary(name: str, source: ModelSource, facts: ModelFacts, prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if max(prompt.token_ids) >= facts.vocab_size:
            raise EvaluationError(
                f"model {name} ({source.path}): token {max(prompt.token_ids)} of prompt {prompt.id!r} is beyond its "
                f"vocabulary of {facts.vocab_size}; the model must share the tokenizer of the training data"
            )


def _list_rows(
    task: _Task, prompts: Sequence[Prompt], config: GenerationConfig, sampling: Row, asked: Sequence[object]
) -> None:
    """List the rows of the finished file, each with the hash of all that it depends on, and recover what is there.

    Args:
        task: The model's part of the stage.
        prompts: The test set.
        config: Number of samples, and the seed.
        sampling: What else decides the answers.
        asked: Beside `prompts`, what the model is really given: tokens, text or messages.
    """
    for prompt, given in zip(prompts, asked, strict=True):
        for sample in range(config.num_samples):
            seed = _seed(config, prompt, sample)
            tags = [] if prompt.thinking is None else [prompt.thinking.to_json()]
            task.prompts.append(prompt)
            task.expected.append({
                "id": prompt.id, "category": prompt.category, "model": task.name, "sample": sample,
                "prompt": prompt.text, "reference": prompt.reference, "num_prompt_tokens": len(prompt.token_ids),
                "key": content_key(task.fingerprint, prompt.id, given, sampling, sample, seed, *tags),
            })  # fmt: skip
    _recover(task)


def _recover(task: _Task) -> None:
    """Keep what an earlier attempt finished and is still asked for; the file then holds exactly that."""
    owed = {row["key"]: row for row in task.expected}
    if task.path.exists():
        for row in read_rows(task.path, torn_end=True):
            # The same model with the same limit would not close the same thought.
            if row.get("key") in owed and (row.get("state") == "generated" or row.get("thought_closed") is False):
                names = [*_answer_fields(""), "num_prompt_tokens", *(n for n in _THOUGHT_FIELDS if n in row)]
                task.finished[row["key"]] = owed[row["key"]] | {name: row[name] for name in names}
    task.num_reused = len(task.finished)
    write_rows(task.path, task.finished.values())


def _missing(task: _Task) -> Iterator[tuple[Prompt, Row]]:
    return ((p, r) for p, r in zip(task.prompts, task.expected, strict=True) if r["key"] not in task.finished)


def _answer(config: GenerationConfig, tasks: list[_LocalTask], counter: RowCounter) -> None:
    """Answer everything that models with the same weights still owe, on the same engines."""
    started = time.monotonic()
    owed: dict[str, tuple[_LocalTask, Prompt, Row]] = {}
    requests = []
    may_think = any(prompt.thinking is not None for task in tasks for prompt, _ in _missing(task))
    for task in tasks:
        for prompt, row in _missing(task):
            sampling = {
                "temperature": config.temperature,
                "top_p": config.top_p,
                "max_tokens": config.max_tokens,
                "seed": _seed(config, prompt, row["sample"]),
                "stop_token_ids": list(task.facts.stop_token_ids),
            }
            if may_think:  # all requests of a call have the same keys
                sampling["skip_special_tokens"] = prompt.thinking is None
            request = Request(f"{task.name}/{row['key']}", prompt.token_ids, sampling, task.source.adapter)
            requests.append(request)
            owed[request.key] = (task, prompt, row)
    serials = []
    for completion in complete(_spec(config, tasks), requests):
        task, prompt, row = owed[completion.key]
        serials.append(completion.serial)
        _keep(task, row | _outcome(completion, task, prompt, config))
        counter.advance()
    for task in tasks:
        task.wall_s = time.monotonic() - started
        task.rows_by_engine = shares(serials)


def _answer_remotely(config: GenerationConfig, task: _RemoteTask, counter: RowCounter) -> None:
    """Answer everything that a model at an endpoint still owes."""
    started = time.monotonic()
    source = task.source
    kind: Literal["chat", "completions"] = "chat" if source.prompt == "chat" else "completions"
    client = EndpointClient(source, source.model, f"generation.models.{task.name}", kind)

    def request(owed: tuple[Prompt, Row]) -> Row:
        prompt, row = owed
        given: Row = {"messages": list(prompt.messages)} if kind == "chat" else {"prompt": prompt.text}
        asked = given | {client.limit_name: config.max_tokens}
        if client.takes_template_kwargs and prompt.template_kwargs:
            asked["extra_body"] = {"chat_template_kwargs": dict(prompt.template_kwargs)}
        if source.send_sampling:
            asked |= {"temperature": config.temperature, "top_p": config.top_p}
            if (seed := _seed(config, prompt, row["sample"])) is not None:
                asked["seed"] = seed
        return asked

    for (prompt, row), reply in client.replies(list(_missing(task)), request):
        _keep(task, row | _outcome_of_reply(reply, source, prompt, config))
        counter.advance()
    task.wall_s = time.monotonic() - started


def _keep(task: _Task, finished: Row) -> None:
    task.finished[finished["key"]] = finished
    append_rows(task.path, [finished])


def _outcome_of_reply(reply: Reply, source: ApiModel, prompt: Prompt, config: GenerationConfig) -> Row:
    """Say what became of a row at an endpoint; its tokens are the endpoint's, not the training tokenizer's."""
    tokens = {"num_prompt_tokens": reply.num_prompt_tokens}
    if reply.text is None or reply.cause is not None:
        state = "too_long" if reply.is_too_long else "generation_failed"
        failed = tokens | _answer_fields(state, cause=reply.cause)
        if reply.thought is None:
            return failed
        lengths = {"finish_reason": reply.finish_reason, "num_response_tokens": reply.num_response_tokens}
        return failed | lengths | {"thought": reply.thought, "thought_closed": False}
    parts = _split(reply.text, prompt, knows_tags=source.prompt == "chat")
    if reply.thought is not None:
        thoughts = [thought for thought in (reply.thought, parts.thought) if thought]
        parts = Parts("\n\n".join(thoughts), parts.answer, parts.answer is not None)
    limit = f"generation.max_tokens={config.max_tokens}"
    return tokens | _answered(parts, prompt, reply.finish_reason, reply.num_response_tokens, limit)


def _outcome(completion: Completion, task: _LocalTask, prompt: Prompt, config: GenerationConfig) -> Row:
    if completion.text is None:
        return _answer_fields("generation_failed", cause=completion.cause)
    reason = completion.finish_reason(task.facts.stop_token_ids)
    num_tokens = len(completion.token_ids)
    parts = _split(completion.text, prompt, knows_tags=task.source.prompt == "chat")
    if prompt.thinking is not None:
        # The engine left the special tokens in the text, as the tags may be some.
        specials = {task.facts.special_tokens.get(token, "") for token in completion.token_ids} - {""}
        parts = Parts(_without(parts.thought, specials), _without(parts.answer, specials), parts.closed)
    limit = f"generation.max_tokens={config.max_tokens}"
    if num_tokens < config.max_tokens:  # a model with little room beside the prompt
        limit = f"the model's limit of {task.max_model_len} tokens, prompt included"
    return _answered(parts, prompt, reason, num_tokens, limit)


def _split(text: str, prompt: Prompt, *, knows_tags: bool) -> Parts:
    """Split a response at the tags of its template, or else, for a model asked in its own way, at known tags."""
    if prompt.thinking is not None:
        return split(text, prompt.thinking)
    return split_known(text) if knows_tags else Parts(None, text, None)


def _without(text: str | None, tokens: set[str]) -> str | None:
    if text is None or not tokens:
        return text
    return re.sub("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))), "", text)


def _answered(parts: Parts, prompt: Prompt, reason: str | None, num_tokens: int, limit: str) -> Row:
    """Say what became of a response: an answer, or a thought that was not closed.

    Args:
        parts: The response.
        prompt: What was asked.
        reason: Why the model stopped writing.
        num_tokens: Tokens of the whole response.
        limit: The setting that limits it, with its value.

    Returns:
        The row's fields; those of the thought only where the model's template writes thoughts, or it had one.
    """
    if parts.answer is None:
        fields = _answer_fields("generation_failed", None, reason, num_tokens, unclosed_cause(reason, limit))
        return fields | {"thought": parts.thought, "thought_closed": False}
    thought = {"thought": parts.thought, "thought_closed": parts.closed}
    fields = _answer_fields("generated", parts.answer, reason, num_tokens)
    return fields | (thought if prompt.thinking is not None or parts.thought else {})


def _answer_fields(
    state: str, response: str | None = None, reason: str | None = None, num_tokens: int = 0, cause: str | None = None
) -> Row:
    return {
        "response": response,
        "finish_reason": reason,
        "num_response_tokens": num_tokens,
        "state": state,
        "cause": cause,
    }


def _finish(task: _Task) -> dict[str, Any]:
    """Bring the file into the test set's order and count it."""
    lost = _answer_fields("generation_failed", cause="no engine returned it")
    rows = [task.finished.get(row["key"], row | lost) for row in task.expected]
    write_rows(task.path, rows)
    states = Counter(row["state"] for row in rows)
    return {
        "asked": len(rows), "generated": states["generated"], "too_long": states["too_long"],
        "generation_failed": states["generation_failed"], "reused": task.num_reused,
        "cut_at_the_limit": sum(row["finish_reason"] == "length" for row in rows),
        "num_prompt_tokens": sum(row["num_prompt_tokens"] for row in rows),
        "num_response_tokens": sum(row["num_response_tokens"] for row in rows),
        "wall_s": task.wall_s,
        "rows_by_engine": task.rows_by_engine,
    }  # fmt: skip


def _describe(task: _LocalTask | _RemoteTask) -> Row:
    """Say what a model is; the judge stage sees from it whether a judge is one of the models under test."""
    return task.source.model_dump() | {"fingerprint": task.fingerprint, "family": task.family}


def _spec(config: GenerationConfig, tasks: Sequence[_LocalTask]) -> EngineSpec:
    rank = max(task.facts.adapter_rank for task in tasks)
    return EngineSpec(
        model=tasks[0].source.path,
        revision=tasks[0].source.revision,
        engines=config.engines,
        tensor_parallel_size=config.tensor_parallel_size,
        cpus=config.cpus_per_engine,
        max_model_len=tasks[0].max_model_len,
        dtype=config.dtype,
        gpu_memory_share=config.gpu_memory_share,
        cpu_cache_gib=config.cpu_cache_gib,
        head_dim=tasks[0].facts.head_dim,
        num_adapters=len({task.source.adapter for task in tasks} - {None}),
        adapter_rank=next((r for r in _ADAPTER_RANKS if r >= rank), rank) if rank else 0,
    )


def _seed(config: GenerationConfig, prompt: Prompt, sample: int) -> int | None:
    """Give each response its own seed, so that neither the order nor the number of engines changes it."""
    if config.temperature == 0:
        return None
    return int(content_key(config.seed, prompt.id, sample)[:8], 16)
