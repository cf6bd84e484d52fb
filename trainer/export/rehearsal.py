"""The export of a base model before it is trained: what will be written is written once, without weights, and read.

Folders of the hub are in every state, and some of them load but can't be saved. The same functions that write the
export (trainer.export.folder) write its configurations, its tokenizer and an adapter of zeros from the base; what loads
from there is compared as the export will be. The base is read on PyTorch's meta device: only the heads of its files.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from trainer.base_problems import MEDIA_TOKENS, beyond_the_embedding
from trainer.config import FullTuning, LoraTuning, ModelConfig, PromptTuning, QloraTuning, TrainerConfig, TuningConfig
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import TrainerError
from trainer.export.check import settings_of
from trainer.export.folder import check_settings, check_tokenizer, prepare_configs, write_files
from trainer.model import base_folder
from trainer.new_rows import add_rows
from trainer.tuning import apply_tuning

_NAMED = 3  # tensors named in a message


def rehearse(config: TrainerConfig, run_dir: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Write what export will write, without weights, load it again, and compare.

    Args:
        config: Base, tuning and export are used.
        run_dir: Holds base/ where the model is from scratch.
        tokenizer: As it will be trained with.

    Returns:
        A sentence for each thing that export will write otherwise than the base has it.

    Raises:
        TrainerError: The base can't be loaded whole, tuned so, written, or loaded from what was written.
    """
    place = base_folder(config.model, run_dir)
    network, notes = read_base(config.model, place)
    _check_tied_head(network, config.model, place)
    new_tokens = [tokenizer.get_vocab()[token] for token in config.model.new_tokens]
    add_rows(network, dict.fromkeys(new_tokens, ()))
    _check_token_ids(network, tokenizer, place)
    adapter = config.model.adapter
    tuning = _small(config.tuning, keep_rank=adapter is not None)
    writes_adapter = isinstance(tuning, LoraTuning) and not config.export.merge
    try:
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as written, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors that can't be copied to the meta device
            tokenizer.save_pretrained(Path(written, "tokenizer"))
            saved = str(Path(written, "tokenizer"))
            model: Any = apply_tuning(network, tuning, place, saved, adapter=adapter, new_tokens=new_tokens)
            if config.export.merge and isinstance(model, PeftModel):
                model = model.unload()
            notes += prepare_configs(model, tokenizer)
            folder = Path(written, "model")
            write_files(model, tokenizer, folder, _zeros(model) if writes_adapter else {})
            check_tokenizer(folder, tokenizer)
            again = _load_again(config.model, place, folder, adapter=writes_adapter)
            check_settings(settings_of(again), settings_of(model), folder)
            _check_names(model, again, folder)
    except TrainerError:
        raise
    except Exception as error:
        raise TrainerError(f"what is tuned from the base model {place} can't be exported: {_words(error)}") from error
    return notes


def read_base(config: ModelConfig, place: str) -> tuple[Any, list[str]]:
    """The base model on the meta device, which reads no weights, and what is notable about its files.

    Args:
        config: The model section.
        place: Hub id or folder.

    Returns:
        The model, and a sentence for tensors of its files that it has no use for.

    Raises:
        TrainerError: It can't be loaded, or its files lack tensors of the model, or hold them in other shapes.
    """
    try:
        _check_generation_config(config, place)
        network, report = AutoModelForCausalLM.from_pretrained(
            place,
            revision=config.revision,
            device_map="meta",
            use_safetensors=True,
            trust_remote_code=False,
            quantization_config=None,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except TrainerError:
        raise
    except Exception as error:
        raise TrainerError(f"the base model {place} can't be loaded: {_words(error)}") from error
    if report["missing_keys"]:
        raise TrainerError(
            f"the base model {place} has no weights for {_listed(report['missing_keys'])}, which config.json asks for; "
            "they would begin at random: download it again, or take the model that config.json describes"
        )
    if report["mismatched_keys"]:
        name, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise TrainerError(
            f"the base model {place} holds {name} of shape {list(stored)}, where config.json asks for {list(wanted)}: "
            "the two are not of one model"
        )
    unused = report["unexpected_keys"]
    return network, [f"the base's files hold {_listed(unused)}, unused by its class: not exported"] if unused else []


def _check_generation_config(config: ModelConfig, place: str) -> None:
    try:
        GenerationConfig.from_pretrained(place, revision=config.revision or "main")
    except OSError:  # the file is optional
        return
    except Exception as error:
        raise TrainerError(
            f"the base model {place} has a generation_config.json that can't be read: {_words(error)}. Correct it, or "
            "take it away"
        ) from error


def _check_tied_head(network: Any, config: ModelConfig, place: str) -> None:  # noqa: ANN401
    """Tie the output layer to the embedding where config.json says so and the files hold both with the same values.

    transformers ties two stored tensors only if they are equal, which the meta device can't tell; vLLM always does.
    """
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    if not network.config.get_text_config().tie_word_embeddings or head.weight is embedding.weight:
        return
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    stored = [_stored(config, place, names[id(module.weight)]) for module in (embedding, head)]
    if not torch.equal(*stored):
        raise TrainerError(
            f"config.json of the base model {place} says that its output layer is its embedding (tie_word_embeddings), "
            "and the files hold another one, so that transformers and vLLM compute different models: set "
            "tie_word_embeddings to false in a copy of the folder, or take the output layer's tensor out"
        )
    head.weight = embedding.weight


def _stored(config: ModelConfig, place: str, name: str) -> torch.Tensor:
    """One tensor of the base's files."""
    folder = Path(str(cached_file(place, "config.json", revision=config.revision))).parent
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - no dictionary
                return tensors.get_tensor(name)
    raise TrainerError(f"the base model {place} does not hold {name} under this name, so it can't be compared")


def _check_token_ids(network: Any, tokenizer: PreTrainedTokenizerBase, place: str) -> None:  # noqa: ANN401
    """Refuse tokens that the embedding has no row for; training would stop at the first of them."""
    rows = network.get_input_embeddings().weight.shape[0]
    ids = tokenizer.get_vocab()
    for name in ("eos_token", "pad_token", "bos_token"):
        number = getattr(tokenizer, f"{name}_id")
        if number is not None and number >= rows:
            raise TrainerError(
                f"the tokenizer's {name} {getattr(tokenizer, name)!r} has the id {number}, the base model {place} only "
                f"{rows} rows in its embedding: they are not of one model"
            )
    media = {getattr(tokenizer, name, None) for name in MEDIA_TOKENS}
    if beyond := sorted((number, token) for token, number in ids.items() if number >= rows and token not in media):
        raise TrainerError(f"the base model {place}: {beyond_the_embedding([token for _, token in beyond], rows)}")


def _small(tuning: TuningConfig, *, keep_rank: bool) -> TuningConfig:
    """The same method at a size that costs nothing to write, and without 4 bits."""
    match tuning:
        case QloraTuning():
            plain = {name: value for name, value in tuning.model_dump().items() if name in LoraTuning.model_fields}
            return _small(LoraTuning.model_validate(plain | {"method": "lora"}), keep_rank=keep_rank)
        case LoraTuning() if not keep_rank:
            return tuning.model_copy(update={"rank": 2})  # "orthogonal" needs an even one
        case PromptTuning():
            return FullTuning()  # its vectors begin as rows of the embedding, which is not read
    return tuning


def _zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(parameter.shape, dtype=parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _load_again(model: ModelConfig, place: str, folder: Path, *, adapter: bool) -> Any:  # noqa: ANN401
    """The model that the folder describes, on the meta device."""
    if adapter:
        return PeftModel.from_pretrained(read_base(model, place)[0], str(folder), autocast_adapter_dtype=False)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _check_names(model: nn.Module, again: nn.Module, folder: Path) -> None:
    """Compare the names and shapes of all parameters."""
    shapes, others = (
        {name: list(parameter.shape) for name, parameter in one.named_parameters()} for one in (model, again)
    )
    differing = [name for name in sorted(shapes.keys() | others.keys()) if shapes.get(name) != others.get(name)]
    if differing:
        name = differing[0]
        raise TrainerError(
            f"the exported folder {folder} does not describe the trained model: {name} has shape {shapes.get(name)} in "
            f"training and {others.get(name)} in the export"
        )


def _listed(names: Any) -> str:  # noqa: ANN401 - a set or a list of names
    """A few names, and how many there are."""
    shown = ", ".join(sorted(names)[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more tensors"


def _words(error: Exception) -> str:
    """The error's kind and its first words."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400].rstrip('.')}"


def rehearse_base(config: TrainerConfig, run_dir: Path) -> list[str]:
    """Rehearse before prepare has run, with the base's own tokenizer; called in a process of its own.

    Args:
        config: Base, template, tuning and export are used.
        run_dir: The run's folder.

    Returns:
        As `rehearse`.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return rehearse(config, run_dir, load_tokenizer(config.model, config.data))
