"""What an exported folder must show before it becomes run_dir/model: the trainer's loss, and vLLM's agreement."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional

from trainer.child import run_in_child
from trainer.config import ExportConfig
from trainer.data.shards import PackedSplit
from trainer.errors import TrainerError
from trainer.model import causal_lm

_MAX_TOKENS = 16
_VLLM_TIMEOUT_S = 1800.0
_NOT_COMPARED = {
    *("_name_or_path", "architectures", "transformers_version", "base_model_name_or_path", "revision", "auto_mapping"),
    *("dtype", "torch_dtype", "quantization_config", "use_cache", "inference_mode", "init_lora_weights"),
    *("eos_token_id", "pad_token_id", "bos_token_id"),  # the tokenizer's: compared with it
}
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the only values that it takes for its largest rank


@dataclass(frozen=True)
class Tolerance:
    """How far two computations with the same weights may be apart.

    Attributes:
        loss: Validation loss, in nats a token.
        logprob: Log-probability of one token, in nats.
    """

    loss: float
    logprob: float


TOLERANCES = {
    "fp32": Tolerance(loss=1e-3, logprob=0.01),
    "fp16": Tolerance(loss=5e-3, logprob=0.1),
    "bf16": Tolerance(loss=0.02, logprob=0.25),
}


def device_of_the_gate() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def row_by_row_loss(model: nn.Module, split: PackedSplit) -> float:
    """Token mean of the loss as a user would compute it: each row alone, unpacked, through the model's own forward.

    Args:
        model: A causal language model of transformers or PEFT, in evaluation mode.
        split: Its rows and labels.

    Returns:
        Nats a target token.

    Raises:
        TrainerError: No token of the split carries loss.
    """
    device = next(model.parameters()).device
    total, num_target_tokens = 0.0, 0
    for row in range(split.num_rows):
        ids, labels = (torch.from_numpy(array.astype("int64")).to(device) for array in split.row_tokens(row))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, -len(ids) : -1].float()  # behind a tuned prompt
        total += functional.cross_entropy(logits, labels[1:], reduction="sum").item()
        num_target_tokens += int((labels[1:] != -100).sum())
    if not num_target_tokens:
        raise TrainerError(f"{split.folder} has no target token, so no loss can be measured on it")
    return total / num_target_tokens


def settings_of(model: nn.Module) -> dict[str, Any]:
    """What a network computes with beside its weights: its configuration, and its adapter's.

    Args:
        model: Of transformers or PEFT.

    Returns:
        JSON-able values by name; without what says where it came from, how it is held, and where generation stops.
    """
    settings = _comparable(causal_lm(model).config.to_dict())
    if isinstance(model, PeftModel):
        adapter = _comparable(model.active_peft_config.to_dict())
        settings |= {f"adapter's {name}": value for name, value in adapter.items()}
    return settings


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    as_json = json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    return {name: value for name, value in json.loads(as_json).items() if name not in _NOT_COMPARED}


def differing_settings(trained: dict[str, Any], other: dict[str, Any], *, only_common: bool = False) -> list[str]:
    """Where two networks' settings differ. Pure.

    >>> differing_settings({"rope_theta": 1e4, "hidden_size": 8}, {"rope_theta": 3.0}, only_common=True)
    ['rope_theta is 10000.0 and 3.0']

    Args:
        trained: The training's.
        other: Somebody else's.
        only_common: Whether to pass over what only one of them has.

    Returns:
        A phrase for each.
    """
    names = trained.keys() & other.keys() if only_common else trained.keys() | other.keys()
    return [
        f"{name} is {trained.get(name)} and {other.get(name)}"
        for name in sorted(names)
        if trained.get(name) != other.get(name)
    ]


def check_loss(trained: float | None, exported: float, tolerance: float) -> None:
    """Refuse a folder whose loss is not the trainer's. Pure.

    Args:
        trained: The trainer's validation loss at the checkpoint; None where none was measured there.
        exported: The exported folder's.
        tolerance: Largest difference, in nats a token.

    Raises:
        TrainerError: They differ by more.
    """
    if trained is not None and not abs(exported - trained) <= tolerance:
        raise TrainerError(
            f"the exported model has validation loss {exported:.5f}, the trainer measured {trained:.5f} (tolerance "
            f"{tolerance}), with the same tensors and settings: its attention differs from the training's (export "
            "loads transformers' own), or data/validation is not what was trained beside"
        )


def read_prompts(run_dir: Path, count: int) -> list[list[int]]:
    """Token ids of the first prompts of the test set.

    Args:
        run_dir: Holds data/test.jsonl.
        count: How many.

    Returns:
        As many, or all where there are fewer.

    Raises:
        TrainerError: There is no test set.
    """
    path = run_dir / "data" / "test.jsonl"
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line)["prompt_token_ids"] for line in islice(file, count)]
    except (OSError, ValueError, KeyError) as error:
        raise TrainerError(
            f"{path} has no prompts to compare vLLM and transformers on ({error}): run prepare, or set "
            "export.vllm_prompts to 0"
        ) from error


@dataclass(frozen=True)
class Served:
    """What vLLM gave.

    Attributes:
        answers: For each prompt `token_ids` and their `logprobs`.
        settings: The network's configuration as vLLM has it.
    """

    answers: list[dict[str, Any]]
    settings: dict[str, Any]


def ask_vllm(
    model: Path | str,
    adapter: Path | None,
    rank: int,
    prompts: list[list[int]],
    precision: str,
    export: ExportConfig,
    explain: Callable[[str], str | None] = lambda words: None,
) -> Served:
    """vLLM's greedy answers, from a process of its own.

    Args:
        model: Folder (or hub id) that vLLM loads.
        adapter: LoRA folder that it serves on top, or None.
        rank: Rank of the adapter.
        prompts: Token ids.
        precision: fp32, fp16 or bf16, what is computed with.
        export: GPUs and the share of their memory.
        explain: What its last words mean for the settings, where they are about memory.

    Returns:
        Its answers and settings.

    Raises:
        TrainerError: vLLM did not load the model, or died; with its own last words.
    """
    longest = max(len(ids) for ids in prompts) + _MAX_TOKENS
    engine: dict[str, Any] = {"max_model_len": longest, "disable_log_stats": True, "max_num_seqs": len(prompts)}
    engine["dtype"] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    engine["trust_remote_code"] = False
    # The one place where the trainer steers a library through the environment: vLLM offers no argument for these.
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    engine["enforce_eager"] = True  # compiling costs more than it saves on a few prompts
    if torch.cuda.is_available():
        engine["gpu_memory_utilization"] = export.gpu_memory_share
        engine["tensor_parallel_size"] = export.tensor_parallel_size
        # Within one node; Ray's backend would ask for places of its own, in vain: this process's task holds the GPUs.
        engine["distributed_executor_backend"] = "uni" if export.tensor_parallel_size == 1 else "mp"
    else:
        engine["kv_cache_memory_bytes"] = 2**28
        # One process of one thread: more of them spin while they wait, and a busy machine then takes minutes.
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    question = {
        "model": str(model),
        "adapter": str(adapter) if adapter else None,
        "adapter_rank": min((served for served in _VLLM_RANKS if served >= rank), default=rank),
        "prompts": prompts,
        "max_tokens": _MAX_TOKENS,
        "engine": engine,
    }
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        try:
            answered = run_in_child(
                "trainer.export.ask_vllm:answer", question, environment=environment, log=log, timeout_s=_VLLM_TIMEOUT_S
            )
        except Exception as error:
            printed = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            printed = f"{printed.strip()}\n{type(error).__name__}: {error}".strip()
            words = explain(printed) or "\n" + "\n".join(printed.splitlines()[-15:])
            raise TrainerError(f"vLLM could not answer with the exported model {model}: {words}") from error
        return Served(**answered)


def disagreement(
    logprobs: torch.Tensor, token_ids: list[int], claimed: list[float], stops: set[int], tolerance: float
) -> str | None:
    """Where vLLM's greedy answer is not the one transformers would give. Pure.

    >>> logprobs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).log()
    >>> disagreement(logprobs, [0, 2], [-0.3567, -0.2231], {2}, 0.01)
    >>> disagreement(logprobs, [0, 1], [-0.3567, -0.2231], {2}, 0.01)
    'token 1: vLLM chose 1 with log-probability -0.2231; transformers gives it -2.3026, and its likeliest, 2, -0.2231'

    Args:
        logprobs: [number of tokens, vocabulary], transformers' along vLLM's own answer.
        token_ids: The tokens that vLLM chose.
        claimed: Their log-probabilities as vLLM has them.
        stops: Tokens at which an answer has to end.
        tolerance: Largest difference of log-probabilities, in nats; as near to the likeliest a token must be.

    Returns:
        The first place, in words; None where they agree.
    """
    for place, (token, there) in enumerate(zip(token_ids, claimed, strict=True)):
        here, best = logprobs[place, token].item(), int(logprobs[place].argmax())
        likeliest = logprobs[place, best].item()
        if not (abs(here - there) <= tolerance and likeliest - here <= tolerance):
            return (
                f"token {place}: vLLM chose {token} with log-probability {there:.4f}; transformers gives it "
                f"{here:.4f}, and its likeliest, {best}, {likeliest:.4f}"
            )
        if token in stops and place != len(token_ids) - 1:
            return f"token {place}: vLLM goes on after the stop token {token}"
    return None


@torch.no_grad()
def compare_with_vllm(
    model: nn.Module, prompts: list[list[int]], served: Served, stops: set[int], tolerance: float
) -> dict[str, Any]:
    """Compare vLLM's answers with transformers', token by token along vLLM's own answer.

    Args:
        model: The exported folder as transformers loads it, in evaluation mode.
        prompts: Token ids.
        served: What `ask_vllm` gave.
        stops: Tokens at which an answer has to end.
        tolerance: Largest difference of log-probabilities, in nats.

    Returns:
        Numbers for the record.

    Raises:
        TrainerError: They do not agree; the first place is named, and the settings that vLLM has otherwise.
    """
    device = next(model.parameters()).device
    differences: list[float] = []
    for number, (prompt, answer) in enumerate(zip(prompts, served.answers, strict=True)):
        ids, claimed = answer["token_ids"], answer["logprobs"]
        logits = model(input_ids=torch.tensor([prompt + ids], device=device), use_cache=False).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].float().log_softmax(-1).cpu()
        words = disagreement(logprobs, ids, claimed, stops, tolerance)
        if words is not None:
            differing = differing_settings(settings_of(model), _comparable(served.settings), only_common=True)
            cause = (
                f"settings that differ (transformers first, vLLM second): {'; '.join(differing)}"
                if differing
                else "no setting differs either, so vLLM computes this architecture otherwise"
            )
            raise TrainerError(
                f"vLLM does not answer like transformers with the exported model (tolerance {tolerance}): prompt "
                f"{number}, {words}. Tensors and tokenizer are those of the training; {cause}"
            )
        differences += (logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0] - torch.tensor(claimed)).abs().tolist()
    return {
        "num_prompts": len(prompts),
        "num_tokens": len(differences),
        "largest_difference": max(differences, default=0.0),
        "mean_difference": sum(differences) / max(1, len(differences)),
        "tolerance": tolerance,
    }
