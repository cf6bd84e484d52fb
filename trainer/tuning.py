"""Which weights are trained, by which method, with which optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.base_headers import fits
from trainer.config import (
    FreezeTuning,
    FullTuning,
    LoraTuning,
    PromptTuning,
    QloraTuning,
    TrainingConfig,
    TuningConfig,
)
from trainer.errors import TrainerError
from trainer.new_rows import require_trained_rows, trained_rows, whole


def quantization(config: TuningConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How the base weights are held in memory; QLoRA (arXiv:2305.14314) holds them in 4 bits.

    Args:
        config: The tuning section.
        dtype: What is computed with.

    Returns:
        What from_pretrained takes; None for weights as they are.
    """
    if not isinstance(config, QloraTuning):
        return None
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def apply_tuning(
    model: PreTrainedModel,
    config: TuningConfig,
    base: str,
    tokenizer: str,
    *,
    adapter: str | None = None,
    new_tokens: Sequence[int] = (),
) -> nn.Module:
    """Set requires_grad on what is trained, adding adapters where the method has them.

    Args:
        model: The base model, with rows for the new tokens.
        config: The tuning section.
        base: Where the base model is, as an adapter's folder will name it.
        tokenizer: Folder of the tokenizer, for a prompt that begins as text.
        adapter: Folder of a LoRA adapter of the base: continued, or merged first where no adapter is trained.
        new_tokens: Ids of tokens whose rows are trained beside LoRA.

    Returns:
        The model itself, or a PEFT model around it.

    Raises:
        TrainerError: No weight fits the names that were given, or the adapter does not fit the base.
    """
    match config:
        case FullTuning() | FreezeTuning():
            if adapter is not None:
                model = merge_adapter(model, adapter)
            if isinstance(config, FreezeTuning):
                freeze(model, config)
            if new_tokens:
                require_trained_rows(model)
            return model
        case LoraTuning():  # QLoRA too
            keep_weights_trainable_on_cpu(model)
            if adapter is not None:
                return _ready(continued(model, adapter, config), model, base)
            refuse_unmatched(model, config)
            peft: PeftConfig = lora_config(config)
            if new_tokens:
                peft.trainable_token_indices = trained_rows(model, new_tokens)  # type: ignore[attr-defined]
        case PromptTuning():
            peft = PromptTuningConfig(
                task_type=TaskType.CAUSAL_LM,
                num_virtual_tokens=config.num_tokens,
                prompt_tuning_init=PromptTuningInit.TEXT if config.init_text else PromptTuningInit.RANDOM,
                prompt_tuning_init_text=config.init_text,
                tokenizer_name_or_path=tokenizer if config.init_text else None,
            )
    try:
        tuned = get_peft_model(model, peft, autocast_adapter_dtype=False)
    except ValueError as error:
        raise TrainerError(f"tuning.method {config.method} does not fit this model: {error}") from error
    return _ready(tuned, model, base)


def _ready(tuned: Any, model: PreTrainedModel, base: str) -> PeftModel:  # noqa: ANN401 - PEFT is not typed
    """The PEFT model with what is trained in the number format of the base, which its folder will name."""
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(compute_dtype(model))
    tuned.peft_config["default"].base_model_name_or_path = base
    return cast(PeftModel, tuned)


def refuse_unmatched(model: nn.Module, config: LoraTuning) -> None:
    """Refuse targets that fit no layer of the model; PEFT passes over one beside others that fit.

    Args:
        model: The base model.
        config: The tuning section.

    Raises:
        TrainerError: With the first such target.
    """
    if config.targets == "all-linear":
        return
    modules = dict(model.named_modules())
    for target in config.targets:
        if not any(fits(name, target) for name in modules):
            linear = {name.rpartition(".")[2] for name, one in modules.items() if isinstance(one, nn.Linear | Conv1D)}
            raise TrainerError(
                f"tuning.targets: {target} fits no layer of the model, which has {', '.join(sorted(linear))}"
            )


def continued(model: PreTrainedModel, adapter: str, config: LoraTuning) -> Any:  # noqa: ANN401 - PEFT is not typed
    """The base with an adapter that is trained on, with its own rank, scale and layers.

    Args:
        model: The base model.
        adapter: Folder of a LoRA adapter.
        config: Its dropout is used; base_problems has compared the rest with the adapter.

    Returns:
        PEFT's model.

    Raises:
        TrainerError: The adapter can't be read, or does not fit the base.
    """
    try:
        peft: Any = PeftConfig.from_pretrained(adapter)
        peft.lora_dropout = config.dropout
        return _adapted(model, adapter, peft, is_trainable=True)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        raise TrainerError(f"model.adapter {adapter} does not fit this model: {error}") from error


def merge_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The base with an adapter merged into its weights.

    Args:
        model: The base model; its weights are changed in place.
        adapter: Folder of a LoRA adapter.

    Returns:
        The model without PEFT's layers, everything trainable.

    Raises:
        TrainerError: The adapter can't be read, or does not fit the base.
    """
    try:
        adapted = _adapted(model, adapter, PeftConfig.from_pretrained(adapter), is_trainable=False)
        layers: list[Any] = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            with whole([layer.get_base_layer().weight], changed=True):
                layer.merge()
        merged: PreTrainedModel = adapted.base_model.unload()
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        raise TrainerError(f"model.adapter {adapter} does not fit this model: {error}") from error
    return merged.requires_grad_(True)


def _adapted(model: PreTrainedModel, adapter: str, config: Any, *, is_trainable: bool) -> Any:  # noqa: ANN401
    """PEFT's model with every tensor of the adapter's file in it, and with no other LoRA weight."""
    with safe_open(Path(adapter, "adapter_model.safetensors"), framework="pt") as file:
        stored = {name.removeprefix("base_model.model.") for name in file.keys()}  # noqa: SIM118 - no dictionary
    tuned = PeftModel.from_pretrained(
        model, adapter, config=config, is_trainable=is_trainable, autocast_adapter_dtype=False
    )
    expected = {
        name.removeprefix("base_model.model.").replace(".default", "")
        for name, _ in tuned.named_parameters()
        if ".default" in name
    }
    if differing := sorted(stored ^ expected):
        where = "the adapter's file" if differing[0] in stored else "the model"
        raise TrainerError(
            f"model.adapter {adapter} does not fit this model: only {where} has {differing[0]} ({len(differing)} such "
            "tensors). Give the base that the adapter was trained on"
        )
    return tuned


def keep_weights_trainable_on_cpu(model: nn.Module) -> None:
    """Stop bitsandbytes (0.50.2) from repacking 4-bit weights in place for inference.

    On CPUs with AVX512-BF16 it does so in the first forward pass in evaluation mode, which here is a validation between
    steps; the layout is for its inference kernel and refuses layers narrower than a quantisation block.

    Args:
        model: Changed in place; its 4-bit layers, if it has any.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def lora_config(config: LoraTuning) -> LoraConfig:
    """The adapters as PEFT takes them (LoRA: arXiv:2106.09685; rslora: 2312.03732; DoRA: 2402.09353).

    Args:
        config: The tuning section.

    Returns:
        PEFT's configuration.
    """
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=config.targets if config.targets == "all-linear" else list(config.targets),
        use_rslora=config.rslora,
        use_dora=config.dora,
        init_lora_weights=True if config.init == "default" else config.init,
    )


def freeze(model: PreTrainedModel, config: FreezeTuning) -> None:
    """Set requires_grad on the named parts and on nothing else.

    Args:
        model: Changed in place.
        config: Which parts are trained.

    Raises:
        TrainerError: A name fits no weight, or the model has fewer layers.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in config.names:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise TrainerError(
                f"tuning.names: {pattern} fits no weight of the model; its weights are such as {names[-3:]}"
            )
    layers, norm = decoder_parts(model)
    if config.last_layers > len(layers):
        raise TrainerError(f"tuning.last_layers is {config.last_layers}, the model has {len(layers)} layers")
    model.requires_grad_(False)
    for layer in layers[len(layers) - config.last_layers :]:
        layer.requires_grad_(True)
    if config.head:
        model.get_output_embeddings().requires_grad_(True)
        norm.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in config.names):
            parameter.requires_grad_(True)


def decoder_parts(model: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module]:
    """The layers of the decoder, and the norm after the last one.

    Args:
        model: A causal language model.

    Returns:
        Both; GPT-2 and its kin name them h and ln_f, all newer families layers and norm.

    Raises:
        TrainerError: This model names them otherwise.
    """
    decoder: Any = model.get_decoder()
    layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    norm = getattr(decoder, "norm", None) or getattr(decoder, "ln_f", None)
    if layers is None or norm is None:
        raise TrainerError(
            f"tuning.method freeze finds no layers and last norm in {type(decoder).__name__}: use tuning.method full "
            "or lora"
        )
    return layers, norm


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Number format of the first weight that is not quantised."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def num_weights(parameter: nn.Parameter) -> int:
    """Weights in a parameter, also where ZeRO-3 holds a part of it or two 4-bit ones share a byte.

    Args:
        parameter: Of a model before or inside DeepSpeed's engine.

    Returns:
        Their number.
    """
    if hasattr(parameter, "quant_state"):
        return math.prod(parameter.quant_state.shape)
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """How many weights there are and how many are trained, for the record and the reader.

    Args:
        model: With requires_grad set.

    Returns:
        num_parameters and num_trained_parameters.
    """
    parameters = list(model.parameters())
    return {
        "num_parameters": sum(num_weights(parameter) for parameter in parameters),
        "num_trained_parameters": sum(num_weights(parameter) for parameter in parameters if parameter.requires_grad),
    }


def optimizer_for(model: nn.Module, config: TrainingConfig, *, offloaded: bool = False) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) over the weights that are trained; norms and biases (one axis) do not decay.

    Args:
        model: With requires_grad set on what is trained.
        config: Which implementation, decay, betas, epsilon.
        offloaded: Whether its states lie in the CPU's memory beside a GPU: DeepSpeed's vectorised AdamW runs there.

    Returns:
        The optimizer, with a learning rate of 0: the loop sets it anew before each step.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Under ZeRO-3 a parameter lies flat and cut; ds_shape is the shape it stands for.
    axes = [len(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trained]
    decayed = [parameter for parameter, count in zip(trained, axes, strict=True) if count > 1]
    others = [parameter for parameter, count in zip(trained, axes, strict=True) if count <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    # Here, so that who only applies a tuning method does not wait for DeepSpeed to load.
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    numbers: dict[str, Any] = {"lr": 0.0, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    match config.optimizer:
        case "adamw" if offloaded:
            return DeepSpeedCPUAdam(filled, **numbers, adamw_mode=True)
        case "adamw":
            return torch.optim.AdamW(filled, **numbers, fused=True)
        case "adamw_8bit":  # block-wise quantised moments (arXiv:2110.02861)
            return AdamW8bit(filled, **numbers)
        case "paged_adamw_8bit":
            return PagedAdamW8bit(filled, **numbers)
        case "paged_adamw_32bit":
            return PagedAdamW32bit(filled, **numbers)
