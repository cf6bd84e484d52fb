"""Which models a run serves by vLLM, and with what settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from evaluation.config import GenerationConfig, JuryJudge, ModelSource, VllmJudge
from launcher.config import RunConfig
from launcher.estimate.engines import CPU_STEP, GIB, GPU_STEP, LARGE_GPU, LARGE_GPU_STEP, Settings
from launcher.estimate.shapes import Shape, shape_named, shape_of
from launcher.stages import STAGES, Stage
from trainer.config import LoraTuning, PromptTuning

EXPORT_ANSWER_TOKENS = 16  # of trainer.export.check
JUDGE_PROMPT_TOKENS = 1024  # instructions, rubric and verdict


@dataclass(frozen=True)
class Served:
    """One kind of engine, and the model that it serves.

    Attributes:
        key: The configuration's section with the engines' settings.
        what: Who uses it, in words.
        shape: The model's sizes.
        settings: How the engine is run.
        engines: How many.
        share: Share of a GPU's memory that each takes.
        cpu_cache: Size of the cache on CPUs, in bytes.
        least_len: The shortest max_model_len that still holds the prompts; 0 where it can't be set.
    """

    key: str
    what: str
    shape: Shape
    settings: Settings
    engines: int
    share: float
    cpu_cache: int
    least_len: int


def served_models(
    config: RunConfig,
    stages: Collection[Stage] = STAGES,
    *,
    on_gpu: bool,
    gpu_memory: int | None = None,
    base: Path | None = None,
) -> tuple[list[Served], list[str]]:
    """The engines that the stages start.

    Args:
        config: The run's configuration.
        stages: The stages that shall run.
        on_gpu: Whether engines have GPUs.
        gpu_memory: Memory of one GPU, in bytes; it decides how large vLLM's steps are.
        base: Folder of the base model, where it is known; None looks at model.name_or_path.

    Returns:
        The engines whose model's sizes are known; and a phrase for each of the others.
    """
    step = CPU_STEP if not on_gpu else LARGE_GPU_STEP if (gpu_memory or 0) >= LARGE_GPU else GPU_STEP
    found: list[Served] = []
    unknown: list[str] = []
    for key, what, shape, of, adapter_rank in _users(config, stages, base):
        length = None if shape is None else _length(of.max_model_len, shape.max_positions)
        if shape is None or shape.attention is None or length is None:
            unknown.append(f"{key} ({what}): the model's sizes are not known here")
            continue
        sequences, step_tokens, block = step
        settings = Settings(
            max_model_len=length,
            tensor_parallel_size=of.tensor_parallel_size,
            element=4 if of.dtype == "float32" else 2,
            sequences=sequences,
            step_tokens=step_tokens,
            block=block,
            adapters=2 if adapter_rank else 0,  # one slot stays empty
            adapter_rank=adapter_rank,
            eager=not on_gpu,
            steps_under_way=2 if on_gpu else 1,
        )
        cache = int(of.cpu_cache_gib * GIB)
        least = _least_len(config, of)
        found.append(Served(key, what, shape, settings, of.engines, of.gpu_memory_share, cache, least))
    if "export" in stages and on_gpu and config.export.vllm_prompts and not isinstance(config.tuning, PromptTuning):
        shape = shape_of(config, base)
        if shape is not None and shape.attention is not None:
            found.append(_export_check(config, shape, step))
    return found, unknown


_User = tuple[str, str, Shape | None, GenerationConfig | VllmJudge, int]


def _users(config: RunConfig, stages: Collection[Stage], base: Path | None) -> Iterator[_User]:
    """Section, words, sizes, engine settings, and rank of the adapters beside the model."""
    generation = config.generation
    if "generate" in stages:
        rank = max(_served_rank(config), _rank_in(config.model.adapter))
        yield "generation", "base and tuned", shape_of(config, base), generation, rank
        for name, model in generation.models.items():
            if isinstance(model, ModelSource):
                yield "generation", name, shape_named(model.path, model.revision), generation, _rank_in(model.adapter)
    if "judge" in stages:
        members = config.judge.judges if isinstance(config.judge, JuryJudge) else [config.judge]
        for number, member in enumerate(members):
            if isinstance(member, VllmJudge):
                key = f"judge.judges.{number}" if isinstance(config.judge, JuryJudge) else "judge"
                yield key, member.model, shape_named(member.model, member.revision), member, 0


def _served_rank(config: RunConfig) -> int:
    """Rank of the tuned adapter where it is served beside its base."""
    tuning = config.tuning
    return tuning.rank if isinstance(tuning, LoraTuning) and not config.export.merge else 0


def _rank_in(adapter: str | None) -> int:
    if adapter is None:
        return 0
    try:
        settings = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
        return max(int(settings["r"]), *map(int, (settings.get("rank_pattern") or {}).values()), 0)
    except (OSError, ValueError, KeyError):
        return 0


def _export_check(config: RunConfig, shape: Shape, step: tuple[int, int, int]) -> Served:
    """vLLM's answers on a few prompts, without CUDA graphs."""
    export = config.export
    rank = _served_rank(config)
    settings = Settings(
        max_model_len=config.data.sequence_length + EXPORT_ANSWER_TOKENS,
        tensor_parallel_size=export.tensor_parallel_size,
        element=4 if config.training.precision == "fp32" else 2,
        sequences=export.vllm_prompts,
        step_tokens=step[1],
        block=step[2],
        adapters=1 if rank else 0,
        adapter_rank=rank,
        eager=True,
    )
    return Served("export", "the check of the exported model", shape, settings, 1, export.gpu_memory_share, 0, 0)


def _length(asked: int | None, positions: int | None) -> int | None:
    return min(filter(None, (asked, positions)), default=None)


def _least_len(config: RunConfig, of: GenerationConfig | VllmJudge) -> int:
    """What the stage's prompts and responses may take: a row of the data, or three texts before a judge."""
    if isinstance(of, GenerationConfig):
        return config.data.sequence_length + of.max_tokens
    return 3 * of.max_answer_tokens + JUDGE_PROMPT_TOKENS
