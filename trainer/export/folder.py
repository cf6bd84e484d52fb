"""The folder that export writes: its files, and the comparison of what loads from them with what was trained.

`trainer.export.stage` writes the trained weights by it, `trainer.export.rehearsal` the same folder without weights
before training starts, so that what can't be written is known then.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from trainer.errors import TrainerError
from trainer.export.check import differing_settings
from trainer.model import causal_lm


def read_tokenizer(run_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the run's data was prepared with.

    Args:
        run_dir: The run.

    Returns:
        The tokenizer, with its template.

    Raises:
        TrainerError: There is none.
    """
    folder = run_dir / "data" / "tokenizer"
    if not folder.is_dir():
        raise TrainerError(f"{folder}, the tokenizer as trained with, is missing: run prepare")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def prepare_configs(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:  # noqa: ANN401 - transformers' or PEFT's
    """Set the stop tokens that training used, and fix what transformers refuses to write.

    Generation ends where training ended an answer; what else the base stops at stays.

    Args:
        model: Its configuration and generation configuration are changed in place.
        tokenizer: As it was trained with.

    Returns:
        A sentence for each fix.

    Raises:
        TrainerError: The generation configuration can't be fixed.
    """
    network = causal_lm(model)
    stop = tokenizer.eos_token_id
    generation = network.generation_config
    before = generation.eos_token_id
    others = [before] if isinstance(before, int) else list(before or [])
    stops = [stop, *(token for token in others if token != stop)]
    generation.eos_token_id = stops if len(stops) > 1 else stop
    generation.pad_token_id = network.config.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = network.config.bos_token_id = tokenizer.bos_token_id
    network.config.eos_token_id = stop
    network.config.use_cache = generation.use_cache = True
    notes = fix_generation(generation)
    if getattr(network.config, "auto_map", None) and not isinstance(
        model, PeftModel
    ):  # an adapter leaves its base as is
        del network.config.auto_map
        notes.append("config.json: auto_map is left out, because the code that it names is not exported and not needed")
    return notes


def fix_generation(generation: GenerationConfig) -> list[str]:
    """Change settings of generation that transformers refuses to save because they have no effect.

    Settings of sampling without do_sample make it true, for that is how vLLM reads such a file; with an explicit
    do_sample: false, and everywhere else, the settings without effect are left out.

    Args:
        generation: Changed in place.

    Returns:
        A sentence for each change.

    Raises:
        TrainerError: It can't be saved for another reason.
    """
    invalid = _without_effect(generation)
    notes = []
    if invalid and generation.do_sample is None:
        generation.do_sample = True
        remaining = _without_effect(generation)
        if remaining == invalid:
            generation.do_sample = None
        else:
            listed = ", ".join(f"{name} ({getattr(generation, name)})" for name in sorted(invalid - remaining))
            notes.append(f"generation_config.json: do_sample is set to true, as {listed} can have an effect only then")
            invalid = remaining
    for name in sorted(invalid):
        notes.append(
            f"generation_config.json: {name} ({getattr(generation, name)}) is left out, as it has no effect beside the "
            "other settings there"
        )
        setattr(generation, name, None)
    if remaining := _without_effect(generation):
        raise TrainerError(f"generation_config.json can't be saved: {', '.join(sorted(remaining))} has no effect there")
    return notes


def _without_effect(generation: GenerationConfig) -> set[str]:
    """The settings for which transformers would refuse to save the configuration."""
    try:
        generation.validate(strict=True)
    except ValueError as error:
        names = set(re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE))
        if not names:
            raise TrainerError(f"generation_config.json can't be saved: {error}") from error
        return names
    return set()


def write_files(
    model: Any,  # noqa: ANN401 - transformers' or PEFT's
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the model and the tokenizer; PEFT's model writes its adapter alone.

    Args:
        model: After prepare_configs.
        tokenizer: As it was trained with.
        folder: Written into.
        weights: Written in place of the model's own.
    """
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    if isinstance(model, PeftModel):
        causal_lm(model).generation_config.save_pretrained(folder)
    # safetensors 0.8 makes its files readable by their owner alone; those beside them follow the umask.
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "tokenizer_config.json").stat().st_mode)


def check_settings(found: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    """Refuse a folder whose settings are not the training's.

    Args:
        found: `settings_of` the model that loads from the folder.
        expected: `settings_of` the trained model.
        folder: For the message.

    Raises:
        TrainerError: They differ.
    """
    differing = differing_settings(expected, found)
    if differing:
        raise TrainerError(
            f"the exported folder {folder} does not load with the training's settings: {'; '.join(differing)} (trained "
            "first, exported second)"
        )


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a folder whose tokenizer or stop tokens are not the training's.

    Args:
        folder: What was written.
        tokenizer: As it was trained with.

    Raises:
        TrainerError: The vocabulary, a template or the stop token differs.
    """
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if again.chat_template != tokenizer.chat_template or again.get_vocab() != tokenizer.get_vocab():
        raise TrainerError(f"the tokenizer in {folder} is not the training's: its vocabulary or template differs")
    stops = stop_tokens(folder)
    if again.eos_token_id not in stops:
        raise TrainerError(
            f"generation_config.json in {folder} stops at {sorted(stops)}, training at {again.eos_token_id}"
        )


def stop_tokens(folder: Path) -> set[int]:
    """The tokens at which generation from an exported folder ends."""
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    return {stops} if isinstance(stops, int) else set(stops or [])
