"""Whether a base model can be tuned and exported, asked before anything starts.

What its small files show is read here. The rest is found by writing the export once without weights, in a process of
its own: this one loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.config import RunConfig
from launcher.errors import ConfigError
from launcher.estimate.shapes import model_folder
from launcher.stage_process import ask_apart
from launcher.stages import Finished, Stage, state_of
from trainer.base_problems import base_problems, missing_weights
from trainer.errors import TrainerError

_REHEARSAL_S = 600.0  # seconds; a few, of which most go into importing transformers


def problems(config: RunConfig, stages: Sequence[Stage], *, on_gpu: bool) -> list[str]:
    """What the small files of the base model show that can't work.

    Args:
        config: the configuration.
        stages: the stages that shall run.
        on_gpu: whether vLLM runs on GPUs.

    Returns:
        A line for each problem; none for a hub id that is not in this machine's cache.
    """
    name, folder = config.model.name_or_path, _folder(config)
    if folder is None:
        return []
    served = "generate" in stages or ("export" in stages and config.export.vllm_prompts > 0)
    cached = not Path(str(name)).is_dir()
    found = base_problems(
        folder,
        config.tuning,
        config.export,
        served=served,
        on_gpu=on_gpu,
        cached=cached,
        model=config.model,
        sequence_length=config.data.sequence_length if "train" in stages or "prepare" in stages else None,
    )
    return [problem if problem.startswith("model.") else f"model.name_or_path = {name}: {problem}" for problem in found]


def rehearse(config: RunConfig, run_dir: Path, stages: Sequence[Stage]) -> list[str]:
    """Write the export of the base model once, without weights, where a stage to come depends on it.

    Args:
        config: the checked configuration.
        run_dir: the run's folder.
        stages: the stages that shall run.

    Returns:
        A line for each thing that export will write otherwise than the base has it; none for a base that is only known
        once it has been downloaded: the train stage rehearses that one.

    Raises:
        ConfigError: the base can't be tuned or exported, with the reason.
    """
    folder = _folder(config)
    to_do: list[Stage] = [stage for stage in stages if stage in ("train", "export")]
    if folder is None or missing_weights(folder):
        return []
    if all(isinstance(state_of(stage, config, run_dir), Finished) for stage in to_do):
        return []
    try:
        notes = ask_apart("trainer.export.rehearsal:rehearse_base", config.trainer, run_dir, timeout_s=_REHEARSAL_S)
    except TrainerError as error:
        raise ConfigError(f"{error}\nnothing was started") from error
    return [f"export: {note}" for note in notes]


def _folder(config: RunConfig) -> Path | None:
    """The base's folder, in place or in the hub's cache; None where there is none yet."""
    if config.model.name_or_path is None:
        return None
    return model_folder(config.model.name_or_path, config.model.revision)
