"""Prompts in, completions out: vLLM engines on a Ray cluster, fed by Ray Data's vLLM processor.

Ray Data streams the rows to the engines with back-pressure and restarts an engine that dies. This module says what
an engine is, checks beforehand that the cluster can hold it, and hands the completions on as they finish.
The process that calls it has initialised Ray.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
import ray.exceptions
from ray.data.llm import Processor, build_processor, vLLMEngineProcessorConfig

from evaluation.engine_memory import EngineSettings, last_words, memory_problem
from evaluation.errors import EvaluationError

# Sequences that an engine works on at a time, and tokens in one of its steps: what vLLM gives its own batch interface,
# `LLM`. Ray Data's engines would get the smaller ones of an engine that serves.
_BATCH_CPU = (256, 4096)
_BATCH_GPU = (256, 8192)
_BATCH_LARGE_GPU = (1024, 16384)
_LARGE_GPUS = ("H100", "H200", "GH200", "B200", "GB200", "B300", "GB300")
# Left to itself Ray Data restarts an engine, and repeats its rows, for ever.
_MAX_RESTARTS = 2
# Longest wait for all engines to be loaded: large models come from slow disks.
_ENGINE_START_S = 3600
# Of vLLM's CPU attention; with another width its worker dies at the first prompt.
_CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_ROWS_PER_BLOCK = 16


@dataclass(frozen=True)
class EngineSpec:
    """One kind of vLLM engine, and how many of it.

    Attributes:
        model: Local Hugging Face folder or hub id.
        revision: Commit on the hub; None for a local folder.
        engines: Engines that share the prompts.
        tensor_parallel_size: GPUs of one engine.
        cpus: CPUs, and threads, of one engine where there are no GPUs.
        max_model_len: Longest prompt plus response, in tokens; None is the model's own limit.
        dtype: Number format of the weights; auto is the model's own.
        gpu_memory_share: Share of a GPU's memory for one engine.
        cpu_cache_gib: Key-value cache of one engine on a CPU, in GiB.
        section: Of the configuration that says all this, for messages.
        num_adapters: LoRA adapters served beside the base.
        adapter_rank: Their largest rank, as vLLM's kernels are built for.
        head_dim: Width of the model's attention heads, where it is known; checked before an engine starts.
    """

    model: str
    revision: str | None = None
    engines: int = 1
    tensor_parallel_size: int = 1
    cpus: int = 1
    max_model_len: int | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    gpu_memory_share: float = 0.9
    cpu_cache_gib: float = 1.0
    section: str = "generation"
    num_adapters: int = 0
    adapter_rank: int = 0
    head_dim: int | None = None


@dataclass(frozen=True)
class Request:
    """One prompt to complete.

    Attributes:
        key: Comes back with the completion.
        token_ids: The prompt; the engine adds and removes nothing.
        sampling: Arguments of `vllm.SamplingParams`; the same keys in every request of one call.
        adapter: Local folder of a LoRA adapter to answer with; None answers with the engine's own weights.
    """

    key: str
    token_ids: Sequence[int]
    sampling: dict[str, Any]
    adapter: str | None = None


@dataclass(frozen=True)
class Completion:
    """What an engine made of one request.

    Attributes:
        key: The request's key.
        text: The response without its stop token; None where the engine failed.
        token_ids: The response's tokens, its stop token included.
        cause: The engine's words where it failed this row, else None.
        serial: How many requests its engine took before this one; -1 where the engine failed this row.
        logprobs: For each response token the log-probabilities asked for, by token id; empty where none were asked for.
    """

    key: str
    text: str | None
    token_ids: tuple[int, ...]
    cause: str | None = None
    serial: int = -1
    logprobs: tuple[dict[int, float], ...] = field(default=())

    def finish_reason(self, stop_token_ids: Container[int]) -> Literal["stop", "length"] | None:
        """Tell whether the response ended by itself or at a limit; None where there is none.

        Ray Data passes no finish reason on; but a response can only end at a stop token or at a limit.
        """
        if self.text is None:
            return None
        return "stop" if self.token_ids and self.token_ids[-1] in stop_token_ids else "length"


def engines_that_fit(spec: EngineSpec) -> int:
    """Count how many engines of this kind the whole cluster can hold at a time, node by node.

    Args:
        spec: The engine.

    Returns:
        At least `spec.engines`.

    Raises:
        EvaluationError: Not even `spec.engines` fit: what was asked and what there is.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    resource = "GPU" if _has_gpus() else "CPU"
    need = spec.tensor_parallel_size * (1 if resource == "GPU" else spec.cpus)
    there = [int(node.get(resource, 0)) for node in nodes]
    if need > max(there):
        raise EvaluationError(
            f"{spec.section}.tensor_parallel_size = {spec.tensor_parallel_size} needs {need} {resource}s of one node, "
            f"and the largest has {max(there)} ({resource}s by node: {there}): an engine is never torn over nodes. "
            f"Lower it to {max(max(there) // (need // spec.tensor_parallel_size), 1)}, or take larger nodes"
        )
    # On GPUs an engine takes a CPU for each, too.
    fit = sum(min(count, int(node.get("CPU", 0))) // need for count, node in zip(there, nodes, strict=True))
    if fit < spec.engines:
        raise EvaluationError(
            f"{spec.engines} vLLM engines of {need} {resource}s each were asked for, and {fit} fit on this cluster "
            f"({resource}s by node: {there}; CPUs by node: {[int(node.get('CPU', 0)) for node in nodes]}); lower "
            f"{spec.section}.engines or their size"
        )
    return fit


def shares(serials: Iterable[int]) -> list[int]:
    """Tell how many requests each engine took, from the largest share to the smallest.

    As many engines took more than k requests as there are completions with the serial k.

    >>> shares([0, 0, 1, 2, -1])
    [3, 1]

    Args:
        serials: Of all completions of one call.

    Returns:
        A number for each engine that took any.
    """
    engines_beyond = Counter(serial for serial in serials if serial >= 0)
    return [sum(num > engine for num in engines_beyond.values()) for engine in range(engines_beyond[0])]


def complete(spec: EngineSpec, requests: Sequence[Request]) -> Iterator[Completion]:
    """Answer the requests on a cluster of engines; the completions come in the order in which they finish.

    A request that the engine refuses fails alone and comes back with its cause.

    Args:
        spec: What the engines are, and how many.
        requests: The prompts; an empty sequence starts no engine.

    Yields:
        One completion for each request.

    Raises:
        EvaluationError: The engines do not fit, do not start, or died too often; with their own last words.
    """
    if not requests:
        return
    engines_that_fit(spec)
    _require_head_dim(spec)
    _quiet()
    # A block goes to one engine as a whole; small ones, equally many for each, let every engine work until the end.
    num_blocks = min(spec.engines * math.ceil(len(requests) / _ROWS_PER_BLOCK / spec.engines), len(requests))
    processor = _processor(spec, len(requests), num_blocks)
    rows = [{processor.DATA_COLUMN: _engine_row(spec, request)} for request in requests]
    data = processor(ray.data.from_items(rows, override_num_blocks=num_blocks))
    data.context.enable_progress_bars = False
    if spec.engines > 1:
        # They load beside each other; the first one to be ready would take a small test set alone.
        data.context.wait_for_min_actors_s = _ENGINE_START_S
    started = time.time()
    try:
        for row in data.iter_rows():
            yield _completion(row[processor.DATA_COLUMN])
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.GetTimeoutError):
            words = f"not all {spec.engines} were up after {_ENGINE_START_S} s; other work may hold their place"
        else:
            words = _why(error, spec, started)
        raise EvaluationError(
            f"the vLLM engines for {spec.model} failed: {words}. What was finished is kept; fix the cause and run the "
            "stage again to resume"
        ) from error


def _why(error: ray.exceptions.RayError, spec: EngineSpec, since: float) -> str:
    """The cause of a failure: an engine's own words where it did not start, else the last that one printed."""
    raised = str(error)
    if own := re.search(rf"\b{EvaluationError.__name__}: (.+)\Z", raised.strip(), re.DOTALL):
        return own[1].strip()
    settings = _settings(spec)
    words = _last_words(since) or ""
    meaning = memory_problem(settings, words) or memory_problem(settings, raised)
    if meaning is not None:
        return meaning
    return f"{words or type(error).__name__ + '; Ray has more in its log files'} ({_MAX_RESTARTS} restarts included)"


def _settings(spec: EngineSpec) -> EngineSettings:
    return EngineSettings(
        spec.section,
        gpu_memory_share=spec.gpu_memory_share,
        tensor_parallel_size=spec.tensor_parallel_size,
        max_model_len=spec.max_model_len,
        cpu_cache_gib=None if _has_gpus() else spec.cpu_cache_gib,
        engines=spec.engines,
    )


def _engine_row(spec: EngineSpec, request: Request) -> dict[str, Any]:
    """What Ray Data's engine stage reads."""
    return {
        "key": request.key,
        "tokenized_prompt": list(request.token_ids),
        "sampling_params": request.sampling,
        "model": request.adapter or spec.model,
    }


def _processor(spec: EngineSpec, num_rows: int, num_blocks: int) -> Processor:
    """Build Ray Data's pipeline: the engines alone."""
    from evaluation.vllm_engine import Engine  # loads torch

    processor = build_processor(_processor_config(spec, num_rows, num_blocks))
    # These would be stages of their own, whose processes take CPUs from the engines and let the rows trickle.
    processor.preprocess = processor.postprocess = None
    stage = processor.get_stage_by_name("vLLMEngineStage")
    stage.map_batches_kwargs.update(max_restarts=_MAX_RESTARTS, max_task_retries=_MAX_RESTARTS)
    stage.fn_constructor_kwargs["settings"] = _settings(spec)
    # A copy, for an assignment would let the stage work out its resources again, from settings that it has used up.
    processor.stages["vLLMEngineStage"] = stage.model_copy(update={"fn": Engine})
    return processor


def _require_head_dim(spec: EngineSpec) -> None:
    if not _has_gpus() and spec.head_dim is not None and spec.head_dim not in _CPU_HEAD_DIMS:
        raise EvaluationError(
            f"{spec.model} has attention heads of width {spec.head_dim} (hidden size / heads); vLLM on a CPU serves "
            f"{', '.join(map(str, _CPU_HEAD_DIMS))} only. Take a model with such heads, or run on a GPU"
        )


def _last_words(since: float) -> str | None:
    """Find the last error that an engine on this machine wrote; Ray's exception does not carry it."""
    node = getattr(ray._private.worker.global_worker, "node", None)
    if node is None:
        return None
    found: list[tuple[float, str]] = []
    for path in Path(node.get_session_dir_path(), "logs").glob("worker-*"):
        if path.suffix in (".out", ".err") and path.stat().st_mtime >= since:
            words = last_words(path.read_text(encoding="utf-8", errors="replace"))
            found += [(path.stat().st_mtime, words)] if words else []
    return max(found)[1] if found else None


def _quiet() -> None:
    """Keep Ray Data's narration from the user: the stage shows its own progress, and Ray's log files have the rest."""
    download = "ray.llm.ray.llm._internal.common.utils.download_utils"
    for name in ("ray._private.worker", download):
        # A filter stays where Ray sets the level again.
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    # Its errors end in an exception as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _has_gpus() -> bool:
    return bool(ray.cluster_resources().get("GPU", 0))


def _batch_limits() -> tuple[int, int]:
    """Give the most sequences that an engine works on at a time, and the most tokens in one of its steps."""
    if not _has_gpus():
        return _BATCH_CPU
    kinds = [name.removeprefix("accelerator_type:") for name in ray.cluster_resources()]
    return _BATCH_LARGE_GPU if any(kind in _LARGE_GPUS for kind in kinds) else _BATCH_GPU


def _processor_config(spec: EngineSpec, num_rows: int, num_blocks: int) -> vLLMEngineProcessorConfig:
    num_sequences, num_step_tokens = _batch_limits()
    engine: dict[str, Any] = {
        "max_model_len": spec.max_model_len,
        "tensor_parallel_size": spec.tensor_parallel_size,
        # Within the actor's node, by the GPUs that the actor itself holds. Under the backend "ray" each engine has a
        # placement group that nobody removes (https://github.com/ray-project/ray/issues/64035).
        "distributed_executor_backend": "uni" if spec.tensor_parallel_size == 1 else "mp",
        "trust_remote_code": False,
        "dtype": spec.dtype,
        "revision": spec.revision,
        "disable_log_stats": True,
        "enable_prefix_caching": True,
        "max_num_seqs": num_sequences,
        "max_num_batched_tokens": num_step_tokens,
        # Ray Data streams each token of each response and throws all but the last away.
        "stream_interval": 2**30,
    }
    if spec.num_adapters:
        # One slot more than adapters: vLLM's CPU kernels give the last slot to rows without one, so it stays empty.
        engine |= {"enable_lora": True, "max_loras": spec.num_adapters + 1, "max_lora_rank": spec.adapter_rank}
    size = spec.tensor_parallel_size
    bundle = {"GPU": size, "CPU": size}
    # The one place where the evaluation steers a library through the environment: vLLM and OpenMP offer no argument.
    variables = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if _has_gpus():
        engine["gpu_memory_utilization"] = spec.gpu_memory_share
    else:
        # Eager: compiling costs more than it saves on a test set. A fixed cache needs no measuring pass.
        engine |= {"enforce_eager": True, "kv_cache_memory_bytes": int(spec.cpu_cache_gib * 2**30)}
        bundle = {"CPU": spec.cpus * size}
        variables["OMP_NUM_THREADS"] = str(spec.cpus)
        if size == 1:
            # Otherwise a CPU engine starts a third process, which costs its 10 s of imports again.
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # No engine is given more than its share at a time, nor more than keeps it full while batches come and go.
    share = math.ceil(num_blocks / spec.engines)
    at_once = min(2 * math.ceil(num_sequences / _ROWS_PER_BLOCK), share)
    return vLLMEngineProcessorConfig(
        model_source=spec.model,
        engine_kwargs=engine,
        concurrency=(spec.engines, spec.engines),
        # No block has fewer rows; smaller blocks would be put together again.
        batch_size=num_rows // num_blocks,
        max_concurrent_batches=at_once,
        max_tasks_in_flight_per_actor=min(2 * at_once, share),
        # One bundle: the resources of the engine's actor, which Ray places on one node.
        placement_group_config={"bundles": [bundle]},
        runtime_env={"env_vars": variables},
        log_engine_metrics=False,
        should_continue_on_error=True,
        chat_template_stage=False,
        tokenize_stage=False,
        # vLLM has the text already; and Ray Data's own stage stops the job at a row that failed.
        detokenize_stage=False,
    )


def _completion(row: dict[str, Any]) -> Completion:
    cause = row["__inference_error__"] or None
    if cause is not None:
        return Completion(row["key"], None, (), cause)
    logprobs = tuple(
        {int(token): float(entry["logprob"]) for token, entry in of_token.items()} for of_token in row["logprobs"] or ()
    )
    tokens = tuple(int(token) for token in row["generated_tokens"])
    return Completion(row["key"], row["generated_text"], tokens, serial=int(row["request_id"]), logprobs=logprobs)
