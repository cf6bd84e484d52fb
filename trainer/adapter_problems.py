"""What the files of model.adapter show that can't be continued, merged or served; nothing is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.base_headers import Shapes, fits, linear_layers, matrices, tensor_shapes
from trainer.config import LoraTuning, TuningConfig

_MERGE = (
    "merge it into its base first (PEFT's merge_and_unload, then save_pretrained) and give that folder as "
    "model.name_or_path"
)
# What vLLM 0.32 serves: other ways to begin change the base's weights when PEFT loads the adapter.
_PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# Settings of PEFT with which an adapter is more than low-rank matrices beside frozen weights.
_MORE_THAN_LORA = {
    "use_dora": "is a DoRA adapter (use_dora), which vLLM does not serve",
    "lora_bias": "trains biases (lora_bias), which vLLM does not serve",
    "modules_to_save": "holds whole layers beside LoRA (modules_to_save), which vLLM does not serve",
    "trainable_token_indices": "holds rows of the embedding (trainable_token_indices), which vLLM does not serve",
    "layer_replication": "repeats layers of its base (layer_replication), which vLLM does not serve",
    "alora_invocation_tokens": "works from a token on (alora_invocation_tokens), which vLLM does not serve",
    "use_qalora": "is a QA-LoRA adapter (use_qalora), which vLLM does not serve",
    "use_bdlora": "is a block-diagonal adapter (use_bdlora), which vLLM does not serve",
    "target_parameters": "adapts single parameters (target_parameters), which can't be continued here",
}


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The content of an adapter's adapter_config.json.

    Args:
        folder: The adapter's folder.

    Returns:
        Its settings.

    Raises:
        ValueError: There is no such file, or it holds no JSON object.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ValueError("no such file")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def adapter_problems(folder: Path, base: Shapes, tuning: TuningConfig, *, checks_names: bool = True) -> list[str]:
    """Why an adapter can't be tuned from.

    Args:
        folder: The adapter's folder.
        base: The base's tensors; empty where they are not known.
        tuning: The tuning section.
        checks_names: Whether the base's files name its layers as its class does; not so for fused experts.

    Returns:
        A phrase for each problem, to be put after the folder's name.
    """
    if not folder.is_dir():
        return ["no such folder: give a local folder; an adapter on the hub is downloaded by: hf download OWNER/NAME "
                "--local-dir FOLDER"]  # fmt: skip
    try:
        settings = adapter_settings(folder)
    except ValueError as error:
        return [f"adapter_config.json can't be read ({error}), so it is not the folder of an adapter"]
    if problems := _kind_problems(settings):
        return problems
    if not (folder / "adapter_model.safetensors").is_file():
        other = next((file.name for file in sorted(folder.glob("adapter_model*"))), None)
        found = f"has its weights in {other}, and opening that can run code" if other else "has no weights"
        return [f"{found}: only adapter_model.safetensors is read; load it with PEFT where you trust it, and save it "
                "by save_pretrained"]  # fmt: skip
    stored = tensor_shapes([folder / "adapter_model.safetensors"])
    if not stored:
        return ["adapter_model.safetensors holds no tensors, or is cut short: download it again"]
    problems = _tensor_problems(stored, base if checks_names else {}, settings)
    return problems or _tuning_problems(settings, tuning, stored, base)


def _kind_problems(settings: dict[str, Any]) -> list[str]:
    """An adapter of another kind than plain LoRA for a causal language model."""
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if kind != "LORA":
        return [f"is a {kind} adapter: only LoRA adapters are continued and served; {_MERGE}"]
    if task not in (None, "CAUSAL_LM"):
        return [f"is for {task} (task_type), not a causal language model: give another adapter"]
    problems = [f"{words}: {_MERGE}" for name, words in _MORE_THAN_LORA.items() if settings.get(name)]
    if settings.get("bias", "none") != "none":
        problems.append(f"trains biases (bias: {settings['bias']}), which vLLM does not serve: {_MERGE}")
    rank, largest = settings.get("r") or 0, max((settings.get("rank_pattern") or {}).values(), default=0)
    if largest > rank:
        problems.append(
            f"has layers of rank {largest} (rank_pattern) beside rank {rank} (r), and vLLM is set up for the latter: "
            + _MERGE
        )
    begins = settings.get("init_lora_weights", True)
    if isinstance(begins, str) and begins.lower() not in _PLAIN_BEGINNINGS:
        problems.append(
            f"began as {begins} (init_lora_weights), which changes the base's weights whenever it is loaded: "
            "convert it to plain LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return problems


def _tensor_problems(stored: Shapes, base: Shapes, settings: dict[str, Any]) -> list[str]:
    """Tensors that are not LoRA's, or that the base has no layer of that shape for."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in stored.items():
        module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if side not in ("lora_A", "lora_B") or len(shape) != 2:
            return [f"holds {name}, which is not a matrix of LoRA on a linear layer: {_MERGE}"]
        layers.setdefault(module, {})[side] = shape
    of = f" ({settings['base_model_name_or_path']})" if settings.get("base_model_name_or_path") else ""
    known = matrices(base)
    for module, sides in sorted(layers.items()):
        if set(sides) != {"lora_A", "lora_B"}:
            return [f"has only one of the two matrices of {module}: download it again"]
        if not known:
            continue
        widths = (sides["lora_B"][0], sides["lora_A"][1])
        held = next((shape for name, shape in known.items() if fits(module, name) or fits(name, module)), None)
        if held is None:
            return [f"is an adapter of another base{of}: it has matrices for {module}, which this base has not"]
        if sorted(held) != sorted(widths):
            return [
                f"is an adapter of another base{of}: its {module} has {widths[1]} inputs and {widths[0]} outputs, this "
                f"base's weight the shape {list(held)}"
            ]
    return []


def _tuning_problems(settings: dict[str, Any], tuning: TuningConfig, stored: Shapes, base: Shapes) -> list[str]:
    """Settings of tuning that are not the adapter's, where it is continued."""
    if not isinstance(tuning, LoraTuning):
        return []
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in stored}
    wanted = {"rank": settings.get("r"), "alpha": float(settings.get("lora_alpha") or 0),
              "rslora": bool(settings.get("use_rslora"))}  # fmt: skip
    differing = {name: value for name, value in wanted.items() if getattr(tuning, name) != value}
    if base and not _same_layers(tuning, modules, base):
        differing["targets"] = "[" + ", ".join(sorted({module.rpartition(".")[2] for module in modules})) + "]"
    if not differing:
        return []
    named = ", ".join(f"tuning.{name} is {_shown(getattr(tuning, name))}" for name in differing)
    to_set = ", ".join(f"tuning.{name}: {_shown(value)}" for name, value in differing.items())
    return [f"is continued with its own settings, and {named}: set {to_set}"]


def _same_layers(tuning: LoraTuning, modules: set[str], base: Shapes) -> bool:
    """Whether tuning.targets names the layers that the adapter is on, or leaves out some of a list of layers."""
    if tuning.targets == "all-linear":
        return len(modules) == len(linear_layers(base))
    return all(any(fits(module, target) for target in tuning.targets) for module in modules) and all(
        any(fits(module, target) for module in modules) for target in tuning.targets
    )


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
