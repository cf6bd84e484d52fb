"""What an exported folder is compared by before it becomes run_dir/model: settings, loss, and what vLLM answers."""

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

MAX_TOKENS = 16
"""Longest answer as a user gets it."""
_NUM_PLACES = 256
"""Tokens whose log-probabilities are compared, over all prompts: few prompts are followed for longer."""
_NUM_LIKELIEST = 5
_VLLM_TIMEOUT_S = 1800.0
_LAST_WORDS = (15, 500)
"""Lines of vLLM's that an error repeats, and characters of each."""
_NOT_COMPARED = {
    *("_name_or_path", "architectures", "transformers_version", "base_model_name_or_path", "revision", "auto_mapping"),
    *("dtype", "torch_dtype", "quantization_config", "use_cache", "inference_mode", "init_lora_weights"),
    *("eos_token_id", "pad_token_id", "bos_token_id"),  # the tokenizer's: compared with it
}
WAY_OUT = (
    "The trained checkpoint is kept, and the same command resumes at export. export.vllm_prompts: 0 exports without "
    "asking vLLM."
)
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the only values that it takes for its largest rank


LOSS_TOLERANCE = {"fp32": 1e-3, "fp16": 5e-3, "bf16": 0.02}
"""How far two computations of a validation loss with the same weights may be apart, in nats a token."""


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
    settings = comparable(causal_lm(model).config.to_dict())
    if isinstance(model, PeftModel):
        adapter = comparable(model.active_peft_config.to_dict())
        settings |= {f"adapter's {name}": value for name, value in adapter.items()}
    return settings


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them, without those that are not the network's.

    Args:
        settings: Of a configuration of transformers or PEFT.

    Returns:
        The rest, by name.
    """
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
        answers: For each prompt `as_served`, the token ids of a user's answer; `token_ids`, chosen greedily past stop
            tokens; `likeliest` and `logprobs`, [tokens][5] token ids, the chosen one first, and their log-probabilities
            in nats.
        settings: The network's configuration as vLLM has it.
        settings_class: Its class, with the module: transformers' own, or one of vLLM's.
        adapter_modules: Names of the modules on which it applies the adapter; None without one.
        tokenizer: Its `chat_template`, and the `token_ids` that it makes of the texts.
    """

    answers: list[dict[str, Any]]
    settings: dict[str, Any]
    settings_class: str
    adapter_modules: list[str] | None
    tokenizer: dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What vLLM is asked.

    Attributes:
        model: Folder (or hub id) that it loads.
        tokenizer: Folder of the tokenizer that it serves with.
        adapter: LoRA folder that it serves on top, or None.
        rank: Rank of the adapter.
        prompts: Token ids.
        num_scored: Tokens after each prompt whose log-probabilities are given.
        texts: To be tokenized.
        precision: fp32, fp16 or bf16, what is computed with.
        revision: Commit of the model on the hub; None for a local folder.
    """

    model: Path | str
    tokenizer: Path
    adapter: Path | None
    rank: int
    prompts: list[list[int]]
    num_scored: int
    texts: list[str]
    precision: str
    revision: str | None = None


def fit_context(prompts: list[list[int]], context: int | None) -> tuple[list[list[int]], int]:
    """How far each prompt is followed, and prompts that leave room for it. Pure.

    >>> fit_context([[1, 2, 3, 4, 5, 6], [7]], 10)
    ([[2, 3, 4, 5, 6], [7]], 5)

    Args:
        prompts: Token ids; at least one.
        context: Longest sequence of the model, in tokens; None is no limit.

    Returns:
        The prompts, of long ones the end; and how many tokens after each are scored.
    """
    num_scored = max(MAX_TOKENS, -(-_NUM_PLACES // len(prompts)))
    if context is None:
        return prompts, num_scored
    num_scored = min(num_scored, max(1, context // 2))
    return [ids[-(context - num_scored) :] for ids in prompts], num_scored


def ask_vllm(
    question: Question, export: ExportConfig, explain: Callable[[str], str | None] = lambda words: None
) -> Served:
    """vLLM's greedy answers, from a process of its own.

    Args:
        question: What is asked.
        export: GPUs and the share of their memory.
        explain: What its last words mean for the settings, where they are about memory.

    Returns:
        Its answers, with what it computes with.

    Raises:
        TrainerError: vLLM did not load the model, or died, or took too long; with its own last words.
    """
    # The one place where the trainer steers a library through the environment: vLLM offers no argument for these.
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():
        # One process of one thread: more of them spin while they wait, and a busy machine then takes minutes.
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    asked: dict[str, Any] = {
        "model": str(question.model),
        "tokenizer": str(question.tokenizer),
        "adapter": str(question.adapter) if question.adapter else None,
        "adapter_rank": min((served for served in _VLLM_RANKS if served >= question.rank), default=question.rank),
        "prompts": question.prompts,
        "texts": question.texts,
        "max_tokens": MAX_TOKENS,
        "num_scored": question.num_scored,
        "num_likeliest": _NUM_LIKELIEST,
        "engine": _engine(question, export),
    }
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        try:
            answered = run_in_child(
                "trainer.export.ask_vllm:answer", asked, environment=environment, log=log, timeout_s=_VLLM_TIMEOUT_S
            )
        except Exception as error:
            printed = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            printed = f"{printed.strip()}\n{type(error).__name__}: {error}".strip()
            words = explain(printed) or "\n" + last_words(printed)
            raise TrainerError(
                f"vLLM could not answer with the exported model {question.model}: {words}\n{WAY_OUT}"
            ) from error
        return Served(**answered)


def _engine(question: Question, export: ExportConfig) -> dict[str, Any]:
    """Arguments of vLLM's engine."""
    engine: dict[str, Any] = {
        "max_model_len": max(len(ids) for ids in question.prompts) + question.num_scored,
        "max_num_seqs": len(question.prompts),
        "revision": question.revision,
        "dtype": {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[question.precision],
        "enforce_eager": True,  # compiling costs more than it saves on a few prompts
        "disable_log_stats": True,
    }
    if not torch.cuda.is_available():
        # Room for one sequence of a model that keeps 512 KiB a token, more than any that a CPU serves in practice.
        return engine | {"kv_cache_memory_bytes": max(2**28, engine["max_model_len"] * 2**19)}
    return engine | {
        "gpu_memory_utilization": export.gpu_memory_share,
        "tensor_parallel_size": export.tensor_parallel_size,
        # Within one node; Ray's backend would ask for places of its own, in vain: this process's task holds the GPUs.
        "distributed_executor_backend": "uni" if export.tensor_parallel_size == 1 else "mp",
    }


def last_words(output: str) -> str:
    """The end of what a process wrote, bounded. Pure.

    Args:
        output: All of it.

    Returns:
        Its last lines; long ones are cut.
    """
    num_lines, num_chars = _LAST_WORDS
    return "\n".join(line[:num_chars] for line in output.strip().splitlines()[-num_lines:])
