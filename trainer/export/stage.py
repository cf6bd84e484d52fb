"""The stage that turns the newest checkpoint into a Hugging Face folder, and refuses one that answers differently.

Full and partial tuning give the model's whole weights; LoRA, QLoRA and prompt tuning give PEFT's folder beside an
untouched base, or, with `export.merge`, whole weights again. The folder is written under another name, loaded as a
user would load it, compared (every tensor, the tokenizer, the validation loss, vLLM's answers), and only then renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
)

from trainer import sealed
from trainer.base_files import base_digests, refuse_other_base
from trainer.config import LoraTuning, PromptTuning, QloraTuning, TrainerConfig
from trainer.data.new_tokens import read_new_tokens
from trainer.data.shards import PackedSplit
from trainer.errors import TrainerError
from trainer.export.agreement import compare_with_vllm, refuse_disagreement
from trainer.export.check import (
    LOSS_TOLERANCE,
    Question,
    Served,
    ask_vllm,
    check_loss,
    fit_context,
    read_prompts,
    row_by_row_loss,
    settings_of,
)
from trainer.export.device import DeviceUse, memory_in_words, placed
from trainer.export.folder import (
    check_settings,
    check_tokenizer,
    prepare_configs,
    read_tokenizer,
    stop_tokens,
    write_files,
)
from trainer.model import base_folder
from trainer.new_rows import add_rows
from trainer.stored import StoredTensors, newest
from trainer.tuning import apply_tuning, keep_weights_trainable_on_cpu, quantization

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Job:
    """What is exported, and from what.

    Attributes:
        config: What was trained.
        run_dir: The run.
        tokenizer: As it was trained with.
        trained_loss: The trainer's validation loss at the checkpoint; None where none was measured there.
    """

    config: TrainerConfig
    run_dir: Path
    tokenizer: PreTrainedTokenizerBase
    trained_loss: float | None

    @property
    def base(self) -> str:
        """The base model: a hub id, or a folder by its whole path, as an adapter's folder has to name it."""
        place = base_folder(self.config.model, self.run_dir)
        return str(Path(place).resolve()) if Path(place).is_dir() else place

    @property
    def gives_adapter(self) -> bool:
        """Whether the folder holds an adapter, and needs the base beside it."""
        return isinstance(self.config.tuning, LoraTuning | PromptTuning) and not self.config.export.merge

    @property
    def num_gpus(self) -> int:
        """GPUs that the model may be spread over."""
        return self.config.export.tensor_parallel_size

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the training, and of the export."""
        return _DTYPES[self.config.training.precision]


@dataclass(frozen=True)
class Written:
    """What was written, and what must load from it.

    Attributes:
        checkpoint: Name of the checkpoint that it was written from.
        step: Optimizer step of the checkpoint.
        trained_loss: The trainer's validation loss there; None where none was measured.
        num_parameters: Of the model.
        settings: Of the network and its adapter, as trained.
        digests: SHA-256 of every parameter in the folder, by name.
        found: Measurements for the record.
    """

    checkpoint: str
    step: int
    trained_loss: float | None
    num_parameters: int
    settings: dict[str, Any]
    digests: dict[str, str]
    found: dict[str, Any]


def export(config: TrainerConfig, run_dir: Path, device: DeviceUse | None = None) -> dict[str, Any]:
    """Write run_dir/model from the newest whole checkpoint.

    The weights are the checkpoint's fp32 master weights rounded to `training.precision`: exactly those of the trainer's
    forward pass. One process holds one copy of the model; the checkpoint is read a parameter at a time.

    Args:
        config: What was trained.
        run_dir: Holds checkpoints/, data/, and base/ where the model is from scratch.
        device: What is done around each use of the GPUs.

    Returns:
        Counts and measurements for the stage's record.

    Raises:
        TrainerError: There is no checkpoint, it does not fit the model, or what was written does not load and answer
            as it should.
    """
    _refuse_what_cannot_be(config)
    device = device or DeviceUse()
    final = run_dir / "model"
    partial = final.with_name(final.name + sealed.PARTIAL)
    written: Written = device.call(write_trained, config, run_dir, partial)
    job = _job(config, run_dir, written.trained_loss)
    served, prompts = _ask(job, partial, device)
    measured = device.call(check_written, config, run_dir, partial, written, served, prompts)
    _put_in_place(partial, final)
    return {
        "checkpoint": written.checkpoint,
        "step": written.step,
        "kind": "adapter" if job.gives_adapter else "weights",
        "num_parameters": written.num_parameters,
        "dtype": config.training.precision,
        "num_bytes": sum(path.stat().st_size for path in final.rglob("*") if path.is_file()),
        "stop_token": job.tokenizer.eos_token,
        **written.found,
        **measured,
    }


def write_trained(config: TrainerConfig, run_dir: Path, folder: Path) -> Written:
    """Write the newest checkpoint's model to a folder. Uses the GPUs where LoRA is merged.

    Args:
        config: What was trained.
        run_dir: The run.
        folder: Written anew.

    Returns:
        What was written.

    Raises:
        TrainerError: There is no checkpoint, or it does not fit the model.
    """
    checkpoint = newest(run_dir)
    if checkpoint is None:
        raise TrainerError(f"{run_dir} has no checkpoint to export: train first")
    content, files = sealed.read_seal(checkpoint)
    _refuse_changed_base(config, run_dir, content["base"])
    job = _job(config, run_dir, content["validation_loss"])
    with memory_in_words(config.export):
        with StoredTensors(checkpoint, [file.name for file in files]) as stored:
            model, found = _model_to_export(job, content["parameters"], stored)
        notes = prepare_configs(model, job.tokenizer)
        written = Written(
            checkpoint=checkpoint.name,
            step=content["progress"]["step"],
            trained_loss=job.trained_loss,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            settings=settings_of(model),
            digests=_digests(model, job.dtype, trained_only=job.gives_adapter),
            found={"notes": notes} | found,
        )
        _write(model, job.tokenizer, folder)
    return written


def _job(config: TrainerConfig, run_dir: Path, trained_loss: float | None) -> Job:
    return Job(config, run_dir, read_tokenizer(run_dir), trained_loss)


def _refuse_what_cannot_be(config: TrainerConfig) -> None:
    if config.export.merge and not isinstance(config.tuning, LoraTuning):
        raise TrainerError(
            f"export.merge is for lora and qlora; tuning.method {config.tuning.method} has nothing to merge"
        )


def _refuse_changed_base(config: TrainerConfig, run_dir: Path, trained_on: dict[str, str] | None) -> None:
    if trained_on is not None:
        weights = any(name.endswith(".safetensors") for name in trained_on)
        refuse_other_base(trained_on, base_digests(config.model, run_dir, weights=weights))


# --- the model as it was trained ------------------------------------------------------------------


def _load_base(job: Job, *, quantized: bool) -> Any:  # noqa: ANN401
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.base,
        revision=job.config.model.revision,
        dtype=job.dtype,
        use_safetensors=True,
        trust_remote_code=False,
        quantization_config=quantization(job.config.tuning, job.dtype) if quantized else None,
        # 4-bit weights are made on the GPU that they are loaded to.
        device_map="auto" if quantized and job.num_gpus > 1 and torch.cuda.is_available() else None,
    )
    keep_weights_trainable_on_cpu(model)  # bitsandbytes would round their constants at the first evaluation
    return model.eval()


def _model_to_export(job: Job, shapes: dict[str, list[int]], stored: StoredTensors) -> tuple[Any, dict[str, Any]]:
    """The model that is written, merged if asked for; and the loss before merging. Never two models at a time."""
    if not job.config.export.merge:
        return _trained_model(job, shapes, stored, dequantized=True), {}
    as_trained = placed(_trained_model(job, shapes, stored), job.num_gpus)
    loss = row_by_row_loss(as_trained, _validation(job))
    del as_trained
    model = _trained_model(job, shapes, stored, dequantized=True).merge_and_unload()
    return model.to(job.dtype), {"loss_before_merge": loss}


def _trained_model(job: Job, shapes: dict[str, list[int]], stored: StoredTensors, *, dequantized: bool = False) -> Any:  # noqa: ANN401 - transformers' or PEFT's
    """The base model with the checkpoint's weights in it, tuned as it was in training.

    Args:
        job: What is exported.
        shapes: The trained parameters.
        stored: Their values.
        dequantized: QLoRA's base not in 4 bits: as those 4 bits spell it where an adapter is merged into it, else as
            it was before, which is never looked at beside an adapter.

    Returns:
        The model in evaluation mode.
    """
    quantized = isinstance(job.config.tuning, QloraTuning) and (job.config.export.merge or not dequantized)
    base = _load_base(job, quantized=quantized)
    if quantized and dequantized:
        base = base.dequantize(dtype=job.dtype)
    new_tokens = read_new_tokens(job.config.model, job.run_dir)
    add_rows(base, new_tokens)
    tokenizer = str(job.run_dir / "data" / "tokenizer")
    adapter = job.config.model.adapter
    model = apply_tuning(base, job.config.tuning, job.base, tokenizer, adapter=adapter, new_tokens=tuple(new_tokens))
    _fill(model, shapes, stored)
    return model.eval()


@torch.no_grad()
def _fill(model: torch.nn.Module, shapes: dict[str, list[int]], stored: StoredTensors) -> None:
    """Put the trained weights into the base model.

    Args:
        model: Changed in place.
        shapes: The trained parameters.
        stored: Their values.

    Raises:
        TrainerError: The model has no such parameter, or it has another shape.
    """
    parameters = dict(model.named_parameters())
    for name, shape in shapes.items():
        parameter = parameters.get(name)
        if parameter is None or list(parameter.shape) != shape:
            found = "absent" if parameter is None else f"of shape {list(parameter.shape)}"
            raise TrainerError(f"the checkpoint trained {name} of shape {shape}, which is {found} in the base model")
        parameter.copy_(stored.read("weight", name, 0, parameter.numel()).view_as(parameter))


def _digests(model: torch.nn.Module, dtype: torch.dtype, *, trained_only: bool) -> dict[str, str]:
    """SHA-256 of every parameter that goes into the folder, by name; in the number format of the training."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained_only:
            data = parameter.detach().to(dtype if parameter.is_floating_point() else parameter.dtype)
            found[name] = hashlib.sha256(sealed.tensor_bytes(data)).hexdigest()
    return found


def _validation(job: Job) -> PackedSplit:
    return PackedSplit.open(job.run_dir / "data" / "validation")


# --- the folder -----------------------------------------------------------------------------------


def _write(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:  # noqa: ANN401
    """Write the folder to disk; PEFT's model writes its adapter alone."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write_files(model, tokenizer, folder)
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sealed.flush_folder(folder)
    except OSError as error:
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
        free = shutil.disk_usage(folder.parent).free
        raise TrainerError(
            f"the model could not be written to {folder} ({error}): it needs {num_bytes:,} bytes, {free:,} are free"
        ) from error


def _put_in_place(partial: Path, final: Path) -> None:
    """Give the new folder its name; the one before it goes only when the new one is complete."""
    removed = final.with_name(final.name + sealed.REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    if final.exists():
        final.rename(removed)
    partial.rename(final)
    sealed.flush_folder(final.parent)
    shutil.rmtree(removed, ignore_errors=True)


# --- the gate -------------------------------------------------------------------------------------


def check_written(
    config: TrainerConfig,
    run_dir: Path,
    folder: Path,
    written: Written,
    served: Served | None,
    prompts: list[list[int]],
) -> dict[str, Any]:
    """Load the folder as a user would and compare it with what was trained. Uses the GPUs.

    Args:
        config: What was trained.
        run_dir: The run.
        folder: What was written.
        written: What must load from it.
        served: vLLM's answers; None where it was not asked.
        prompts: What it answered.

    Returns:
        Measurements for the record.

    Raises:
        TrainerError: A tensor, a setting, the tokenizer, the stop token, the loss or vLLM's answers are not as they
            should be.
    """
    with memory_in_words(config.export):
        return _gate(_job(config, run_dir, written.trained_loss), folder, written, served, prompts)


def _gate(job: Job, folder: Path, expected: Written, served: Served | None, prompts: list[list[int]]) -> dict[str, Any]:
    tolerance = LOSS_TOLERANCE[job.config.training.precision]
    check_tokenizer(folder, job.tokenizer)
    model = _load_again(job, folder, quantized=True)
    _check_tensors(_digests(model, job.dtype, trained_only=False), expected.digests, folder)
    check_settings(settings_of(model), expected.settings, folder)
    model = placed(model, job.num_gpus)
    loss = row_by_row_loss(model, _validation(job))
    check_loss(job.trained_loss, loss, tolerance)
    measured: dict[str, Any] = {
        "trained_loss": job.trained_loss,
        "exported_loss": loss,
        "loss_tolerance": tolerance,
        "vllm": None,
    }
    if job.gives_adapter and isinstance(job.config.tuning, QloraTuning):  # served on the base as it is, not in 4 bits
        del model
        model = placed(_load_again(job, folder, quantized=False), job.num_gpus)
        measured["served_loss"] = row_by_row_loss(model, _validation(job))
    if served is not None:
        stops = set() if job.gives_adapter else stop_tokens(folder)  # beside an adapter vLLM goes by the base's stops
        measured["vllm"] = compare_with_vllm(
            model, job.tokenizer, prompts, served, stops=stops, precision=job.config.training.precision
        )
        if job.config.export.on_disagreement == "fail":
            refuse_disagreement(measured["vllm"]["disagreements"])
    return measured


def _ask(job: Job, folder: Path, device: DeviceUse) -> tuple[Served | None, list[list[int]]]:
    """vLLM's answers and the prompts; None where it is not asked, or cannot serve such an adapter."""
    tuning, export = job.config.tuning, job.config.export
    unserved = job.gives_adapter and (isinstance(tuning, PromptTuning) or getattr(tuning, "dora", False))
    if export.vllm_prompts == 0 or unserved:
        return None, []
    adapter = tuning if job.gives_adapter and isinstance(tuning, LoraTuning) else None
    model, revision = (job.base, job.config.model.revision) if adapter else (str(folder), None)
    loaded: Any = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    prompts, num_scored = fit_context(
        read_prompts(job.run_dir, export.vllm_prompts),
        getattr(loaded.get_text_config(), "max_position_embeddings", None),
    )
    question = Question(
        model=model,
        revision=revision,
        tokenizer=folder,
        adapter=folder if adapter else None,
        rank=adapter.rank if adapter else 0,
        prompts=prompts,
        num_scored=num_scored,
        texts=[str(job.tokenizer.decode(ids)) for ids in prompts],
        precision=job.config.training.precision,
    )
    device.claim()
    return ask_vllm(question, export, device.explain), prompts


def _load_again(job: Job, folder: Path, *, quantized: bool) -> Any:  # noqa: ANN401
    """The model of the folder, fresh; an adapter on the base as it was trained on, or as it is."""
    if job.gives_adapter:
        base = _load_base(job, quantized=quantized)
        return PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    return model.eval()


def _check_tensors(found: dict[str, str], digests: dict[str, str], folder: Path) -> None:
    for name, digest in digests.items():
        if name not in found:
            raise TrainerError(f"the exported folder {folder} does not hold {name}")
        if found[name] != digest:
            raise TrainerError(f"{name} in the exported folder {folder} is not what was trained")
