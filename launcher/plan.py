"""What a run would do, and what can be known to be wrong with it, before anything starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.config import JudgeConfig, JuryJudge, ModelSource, VllmJudge, key_variables
from launcher import base_model
from launcher.config import RunConfig
from launcher.errors import ConfigError
from launcher.estimate import fit, memory, text
from launcher.estimate.served import served_models
from launcher.estimate.shapes import model_folder
from launcher.placement import in_words
from launcher.ray_cluster import Resources, misfits, resources_of, uses_gpus
from launcher.stage_process import ask_apart
from launcher.stages import STAGES, Differs, Finished, Stage, state_of
from trainer.config import ExportConfig, LoraTuning, PromptTuning, TuningConfig
from trainer.data.names import is_hub_id, missing, near
from trainer.devices import card_problems, device_problems, gpu_problems, slow_precision
from trainer.errors import TrainerError

# vLLM 0.32's attention on CPUs.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


_FIRST_LOOK_S = 120.0  # a few seconds, but where the storage or the machine is slow


@dataclass(frozen=True)
class FirstLook:
    """What the first rows, the chat template and the tokenizer show.

    Attributes:
        problems: What prepare would refuse.
        notes: What a person should know.
    """

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def first_look(config: RunConfig) -> FirstLook:
    """Look at the first rows, the chat template and the tokenizer, in a process of its own that loads no torch.

    Args:
        config: the configuration.

    Returns:
        What they show; nothing where some of the data, or the base, is not there, which `problems` names.
    """
    name = config.model.name_or_path
    if _data_problems(config) or (name is not None and _model_problems("model.name_or_path", name)):
        return FirstLook()
    base = None if name is None else model_folder(name, config.model.revision)
    try:
        found = ask_apart("trainer.first_look:first_look", config.trainer, base, timeout_s=_FIRST_LOOK_S)
    except TrainerError as error:
        return FirstLook(notes=(f"could not be looked at: {error}",))
    return FirstLook(tuple(found["problems"]), tuple(found["notes"]))


def first_looks(configs: Sequence[RunConfig]) -> list[FirstLook]:
    """Look at what each run would read first; runs of the same data and base share one look.

    Args:
        configs: the configurations.

    Returns:
        What each one's rows show.
    """
    distinct: list[tuple[RunConfig, FirstLook]] = []
    looks = []
    for config in configs:
        known = (look for other, look in distinct if (other.data, other.model) == (config.data, config.model))
        look = next(known, None)
        if look is None:
            look = first_look(config)
            distinct.append((config, look))
        looks.append(look)
    return looks


def check(config: RunConfig, stages: Sequence[Stage] = STAGES, look: FirstLook | None = None) -> None:
    """Refuse what is known to be wrong, before anything starts.

    Args:
        config: the configuration.
        stages: the stages that shall run.
        look: what the first rows show, where they have been looked at; None looks at them if they are to be prepared.

    Raises:
        ConfigError: with every problem found.
    """
    found = problems(config, stages)
    if "generate" in stages:
        found += _serving_problems(config.tuning, config.export)
    if look is None:
        look = first_look(config) if "prepare" in stages else FirstLook()
    found += look.problems
    if found:
        raise ConfigError("\n".join([*found, "nothing was started"]))


def problems(config: RunConfig, stages: Sequence[Stage] = STAGES) -> list[str]:
    """All that can be found wrong without loading anything: files, models, keys, resources, memory.

    Args:
        config: the configuration.
        stages: the stages that shall run.

    Returns:
        A line for each.
    """
    resources, known = resources_of(config)
    on_gpu = uses_gpus(config.cluster, resources)
    found = _data_problems(config)
    found += _judge_problems(config) + _storage_problems(config)
    if "generate" in stages:
        found += _harness_problems(config) + _further_model_problems(config)
    found += _head_size_problems(config, on_gpu=on_gpu)
    if config.model.name_or_path is not None:
        found += _model_problems("model.name_or_path", config.model.name_or_path)
        found += base_model.problems(config, stages, on_gpu=on_gpu)
    if resources.is_here:  # what a Slurm job needs of its nodes is compared when it is put together
        found += misfits(config, resources, stages)
    found += _engine_problems(config, resources, stages, on_gpu=on_gpu)
    if "train" not in stages:
        return found
    sections, capability = (config.model, config.training, config.deepspeed), resources.capability if on_gpu else None
    if resources.is_here:
        found += device_problems(*sections, on_gpu=on_gpu, capability=capability)
    elif known and on_gpu and _runs_as_here(config):
        found += gpu_problems(*sections, capability)
    else:  # what is installed there is not known, the kind of GPU may be
        found += card_problems(*sections, capability)
    return found + memory.problems(config, resources, on_gpu=on_gpu)


def _runs_as_here(config: RunConfig) -> bool:
    """Whether the nodes of a Slurm job run the Python that submits it, with its packages."""
    slurm = config.cluster.slurm
    return slurm is not None and slurm.container is None and slurm.python is None


def slow_settings(config: RunConfig) -> list[str]:
    """Settings that work here and cost far more time than another that trains the same.

    Args:
        config: the configuration.

    Returns:
        A line for each.
    """
    resources, _ = resources_of(config)
    if not resources.is_here or uses_gpus(config.cluster, resources):
        return []
    words = slow_precision(config.training.precision)
    return [words] if words else []


def _engine_problems(config: RunConfig, resources: Resources, stages: Sequence[Stage], *, on_gpu: bool) -> list[str]:
    gpu_memory = memory.gpu_memory_of(config, resources)
    served, _ = served_models(config, stages, on_gpu=on_gpu, gpu_memory=gpu_memory)
    return fit.problems(resources, served, gpu_memory, on_gpu=on_gpu)


def _engine_lines(config: RunConfig, resources: Resources, run_dir: Path, *, on_gpu: bool) -> list[str]:
    gpu_memory = memory.gpu_memory_of(config, resources)
    base = run_dir / "base" if (run_dir / "base").is_dir() else None
    served, unknown = served_models(config, on_gpu=on_gpu, gpu_memory=gpu_memory, base=base)
    return fit.describe(resources, served, gpu_memory, on_gpu=on_gpu) + [f"engine     {words}" for words in unknown]


def _resource_lines(config: RunConfig, resources: Resources, known: bool) -> list[str]:
    if not known:
        return [f"resources  known when {resources.source} is there: {config.cluster.address}"]
    gpus = ""
    if resources.num_gpus:
        gpu_memory = memory.gpu_memory_of(config, resources)
        size = "whose memory is not known (cluster.gpu_memory_gib names it)" if gpu_memory is None else ""
        gpus = f"; GPU {resources.gpu_kind or 'of no named type'}, {size or memory.in_gib(gpu_memory or 0)}"
    where = "" if resources.is_here else f"{resources.source}: "
    return [f"resources  {where}{'; '.join(in_words(resources.by_node))}{gpus}"]


def describe(
    config: RunConfig,
    run_dir: Path,
    look: FirstLook | None = None,
    *,
    tokens_per_s: float | None = None,
    gpu_hour_price: float | None = None,
) -> str:
    """The plan as text: where, with what, what it needs, and each stage's state.

    Args:
        config: the configuration.
        run_dir: the run's folder.
        look: what the first rows show.
        tokens_per_s: speed of training to reckon with; None takes what the run has measured, if it has.
        gpu_hour_price: price of one worker's hour, in any currency; None tells no cost.

    Returns:
        The text.
    """
    resources, known = resources_of(config)
    training = config.training
    on_gpu = uses_gpus(config.cluster, resources)
    device = "GPU" if on_gpu else "CPU"
    accumulation = training.global_batch_size // (training.num_workers * training.micro_batch_size)
    sources = ", ".join(source.path for source in config.data.all_sources)
    lines = [
        f"run        {config.run.name} in {run_dir}" + (f", copied to {config.run.url}" if config.run.url else ""),
        f"base       {config.model.name_or_path or 'a small Llama from scratch'}",
        f"data       {sources}, template {config.data.template}, loss on {config.data.train_on}",
        *(f"rows       {note}" for note in (look.notes if look else ())),
        f"training   {config.tuning.method}, {training.num_workers} {device} workers, ZeRO-{config.deepspeed.stage}, "
        f"{training.precision}",
        f"batch      {training.global_batch_size} x {config.data.sequence_length} tokens an optimizer step: "
        f"{training.num_workers} workers x {training.micro_batch_size} micro-batch x {accumulation} accumulation",
        f"judge      {config.judge.type}",
        *_resource_lines(config, resources, known),
        *_engine_lines(config, resources, run_dir, on_gpu=on_gpu),
        *(f"slow       {words}" for words in slow_settings(config)),
    ]
    lines += text.describe(config, run_dir, on_gpu=on_gpu, tokens_per_s=tokens_per_s, price=gpu_hour_price)
    if not all(path.exists() for path in config.data.local_paths):
        return "\n".join(lines)
    stale = False
    for stage in STAGES:
        match state_of(stage, config, run_dir):
            case Finished():
                state = "finished, but of the earlier result" if stale else "finished"
            case Differs(differences):
                state, stale = "made with other settings: " + "; ".join(differences), True
            case _:
                state, stale = "to do", True
        lines.append(f"{stage:<10} {state}")
    return "\n".join(lines)


def _data_problems(config: RunConfig) -> list[str]:
    """What is wrong with the paths of rows; a hub id is no path."""
    named = (Path(source.path) for source in config.data.all_sources if not is_hub_id(source.path))
    problems = []
    for path in dict.fromkeys([*named, *config.data.local_paths]):
        if not path.exists():
            made = path.name == "quickstart-data.json"
            hint = f"; make it with: launcher make-quickstart-data {path}" if made else ""
            problems.append(f"data: {missing(path)}{hint}")
        elif path.is_file() and path.stat().st_size == 0:
            problems.append(f"data: {path}: is empty")
    return problems


def _model_problems(key: str, name: str) -> list[str]:
    """A local folder must hold a model; a hub id has the form owner/name and is looked up when it is loaded."""
    folder = Path(name)
    looks_local = name.startswith(("/", "./", "../", "~")) or name.count("/") != 1
    if not folder.is_dir():
        return [f"{key} = {name}: no such folder, and not a hub id (owner/name){near(folder)}"] if looks_local else []
    if not (folder / "config.json").is_file():
        return [f"{key} = {name}: has no config.json, so it is not a Hugging Face model folder"]
    if any(folder.glob("*.safetensors")):
        return []
    if any(folder.glob("*.bin")):
        return [
            f"{key} = {name}: has its weights in .bin files, and opening these can run code. Where you trust them: "
            f'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"[c.from_pretrained('{name}').save_pretrained('{name}-safetensors') for c in (M, T)]\""
        ]
    return [f"{key} = {name}: has no weights (*.safetensors)"]


def _further_model_problems(config: RunConfig) -> list[str]:
    """What would end generation, hours later, on a model that is no part of training."""
    problems = []
    for name, model in config.generation.models.items():
        if isinstance(model, ModelSource):
            problems += _model_problems(f"generation.models.{name}.path", model.path)
            if model.adapter is not None and not (Path(model.adapter) / "adapter_config.json").is_file():
                problems.append(f"generation.models.{name}.adapter = {model.adapter}: has no adapter_config.json")
    return problems


def _storage_problems(config: RunConfig) -> list[str]:
    if config.run.url is None:
        return []
    from fsspec.core import get_filesystem_class

    try:
        get_filesystem_class(config.run.url.partition("://")[0])
    except (ImportError, ValueError) as error:
        return [f"run.storage = {config.run.storage}: {error}"]
    return []


def _head_size_problems(config: RunConfig, *, on_gpu: bool) -> list[str]:
    sizes = config.model.from_scratch
    if sizes is None or on_gpu:
        return []
    head_size = sizes.hidden_size // sizes.num_heads
    if head_size in CPU_HEAD_SIZES:
        return []
    return [
        f"model.from_scratch: hidden_size / num_heads ({sizes.hidden_size} / {sizes.num_heads} = {head_size}) must be "
        f"one of {', '.join(map(str, CPU_HEAD_SIZES))}: vLLM serves no other on a CPU"
    ]


def _serving_problems(tuning: TuningConfig, export: ExportConfig) -> list[str]:
    match tuning:
        case PromptTuning():
            return [
                "tuning.method = prompt: vLLM serves no tuned prompts, so the stage generate would fail; run "
                "prepare, train and export alone, or tune with lora"
            ]
        case LoraTuning(dora=True) if not export.merge:
            return ["tuning.dora: vLLM serves no DoRA adapters; set export.merge: true, which writes whole weights"]
        case _:
            return []


def judge_members(judge: JudgeConfig) -> tuple[JudgeConfig, ...]:
    """The judges that are asked: the members of a jury, else the one."""
    return tuple(judge.judges) if isinstance(judge, JuryJudge) else (judge,)


def _harness_problems(config: RunConfig) -> list[str]:
    if config.generation.lm_eval is None:
        return []
    from evaluation.harness import harness_problems

    return harness_problems(config.generation.lm_eval)


def _judge_problems(config: RunConfig) -> list[str]:
    problems = [
        f"{where} = {variable}: that environment variable is not set; set it, or give null"
        for where, variable in key_variables(config.generation, config.judge)
        if not os.environ.get(variable)
    ]
    for member in judge_members(config.judge):
        if isinstance(member, VllmJudge):
            problems += _model_problems("judge.model", member.model)
    return problems
