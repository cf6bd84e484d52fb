"""Calibrates the export check: planted faults and honest exports of a pretrained model, in vLLM and in transformers.

    python tests/benchmarks/export_check.py MODEL ROWS WORK [--precisions bf16,fp16,fp32] [--only NAME]

MODEL is the folder of a pretrained model of Llama's architecture, ROWS a JSON file of instructions (`instruction`,
`input`, `output`), WORK a folder that keeps what was trained and measured: a second start measures what is missing, and
prints the whole table.

Twenty honest variants are trained for a few steps: full tuning, and LoRA of several ranks and targets, served as an
adapter and merged. A fault is planted by giving vLLM another folder (or other prompts) than transformers. Engines start
one after another in this process.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, Qwen2Config
from vllm.distributed import cleanup_dist_env_and_memory

from trainer.export.agreement import LIMITS, Measured, Place, measure
from trainer.export.ask_vllm import answer
from trainer.export.check import comparable, differing_settings

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
NUM_PROMPTS, NUM_SCORED, NUM_LIKELIEST = 6, 12, 5
PROMPT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
LAYER = 15
"""Where faults of a single layer are planted; for a model with fewer layers, its middle."""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LORAS = {
    "lora-r4-qv": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "lora-r16-all": LoraConfig(r=16, lora_alpha=32, target_modules=ATTENTION + MLP),
    "lora-r32-mlp": LoraConfig(r=32, lora_alpha=32, target_modules=MLP),
    "lora-r64-attention": LoraConfig(r=64, lora_alpha=64, target_modules=ATTENTION),
}
POINTS = (6, 18)
"""Optimizer steps after which a variant is kept."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: For the table.
        model: Folder of the weights.
        adapter: Folder of an adapter on them, or None.
        spoil: Makes what vLLM is given instead: takes model, adapter and an empty folder, returns model and adapter.
        spoil_prompt: Makes the prompt that vLLM is given instead.
    """

    name: str
    model: Path
    adapter: Path | None = None
    spoil: Callable[[Path, Path | None, Path], tuple[Path, Path | None]] | None = None
    spoil_prompt: Callable[[list[int]], list[int]] | None = None

    @property
    def is_honest(self) -> bool:
        """Whether vLLM is given what transformers is given."""
        return self.spoil is None and self.spoil_prompt is None


# --- variants -------------------------------------------------------------------------------------


def train(model: Any, rows: list[list[int]], lr: float, keep: Callable[[int], None]) -> None:
    """A few steps of AdamW on two rows each; `keep` is called at each of POINTS."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for step in range(1, max(POINTS) + 1):
        for ids in rows[2 * step : 2 * step + 2]:
            batch = torch.tensor([ids])
            (model(input_ids=batch, labels=batch).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in POINTS:
            keep(step)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write a folder, its last file last."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_variants(base: Path, tokenizer: Any, rows: list[list[int]], work: Path) -> list[Case]:
    """Twenty honest exports; trained where they are not in WORK yet."""
    for name, lr in (("full-2e-5", 2e-5), ("full-2e-4", 2e-4)):
        if not (work / f"{name}-{POINTS[-1]}").exists():
            model = load(base)
            train(model, rows, lr, lambda step, m=model, n=name: save(m, tokenizer, work / f"{n}-{step}"))
    for name, config in LORAS.items():
        if not (work / f"{name}-{POINTS[-1]}-merged").exists():
            model = get_peft_model(load(base), config)
            train(model, rows, 1e-3, lambda step, m=model, n=name: save(m, tokenizer, work / f"{n}-{step}"))
            for step in POINTS:
                merged = PeftModel.from_pretrained(load(base), work / f"{name}-{step}").merge_and_unload()
                save(merged, tokenizer, work / f"{name}-{step}-merged")
    cases = [Case(f"{name}-{step}", work / f"{name}-{step}") for name in ("full-2e-5", "full-2e-4") for step in POINTS]
    for name in LORAS:
        for step in POINTS:
            cases.append(Case(f"{name}-{step}", base, work / f"{name}-{step}"))
            cases.append(Case(f"{name}-{step}-merged", work / f"{name}-{step}-merged"))
    return cases


# --- faults ---------------------------------------------------------------------------------------


def other_config(**changes: object) -> Callable[[Path, Path | None, Path], tuple[Path, Path | None]]:
    """vLLM reads other settings."""

    def spoil(model: Path, adapter: Path | None, out: Path) -> tuple[Path, Path | None]:
        shutil.copytree(model, out / "model")
        path = out / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return out / "model", adapter

    return spoil


def other_weights(
    change: Callable[[dict[str, torch.Tensor]], None], **settings: object
) -> Callable[[Path, Path | None, Path], tuple[Path, Path | None]]:
    """vLLM reads other weights."""

    def spoil(model: Path, adapter: Path | None, out: Path) -> tuple[Path, Path | None]:
        other_config(**settings)(model, adapter, out)
        path = out / "model" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
        return out / "model", adapter

    return spoil


def other_adapter(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **settings: object
) -> Callable[[Path, Path | None, Path], tuple[Path, Path | None]]:
    """vLLM reads another adapter."""

    def spoil(model: Path, adapter: Path | None, out: Path) -> tuple[Path, Path | None]:
        shutil.copytree(adapter, out / "adapter")
        path = out / "adapter" / "adapter_model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})
        path = out / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return model, out / "adapter"

    return spoil


def swap_layers(first: int, second: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """Two layers change places."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"model.layers.{first}.")]:
            other = name.replace(f".{first}.", f".{second}.", 1)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return change


def swap_heads(head_dim: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """The first two query heads of one layer change places."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = f"model.layers.{LAYER}.self_attn.q_proj.weight"
        weight = tensors[name]
        tensors[name] = torch.cat([weight[head_dim : 2 * head_dim], weight[:head_dim], weight[2 * head_dim :]])

    return change


def scale(part: str, factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """All tensors with this in their name are multiplied."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        found = [name for name in tensors if part in name]
        assert found, part
        for name in found:
            tensors[name] = tensors[name] * factor

    return change


def head_of_base(base: Path) -> Callable[[dict[str, torch.Tensor]], None]:
    """A head that is not the trained embedding, but the one before training."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = load_file(base / "model.safetensors")["model.embed_tokens.weight"].float()

    return change


def random_head(tensors: dict[str, torch.Tensor]) -> None:
    """A head that was never loaded."""
    tensors["lm_head.weight"] = 0.02 * torch.randn(tensors["model.embed_tokens.weight"].shape)


def without(part: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """No adapter on these modules."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {name: tensor for name, tensor in tensors.items() if part not in name}
        assert len(kept) < len(tensors), part
        return kept

    return change


def with_biases(model: Path, tokenizer: Any, folder: Path) -> Path:
    """The same weights as a Qwen 2, whose attention has biases."""
    if not folder.exists():
        llama = load(model)
        qwen = AutoModelForCausalLM.from_config(
            Qwen2Config(**common(llama.config), use_sliding_window=False), trust_remote_code=False
        )
        state = llama.state_dict()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in qwen.named_parameters():
            if name.endswith("_proj.bias"):
                state[name] = 0.2 * torch.randn(parameter.shape, generator=generator)
        qwen.load_state_dict(state)
        save(qwen, tokenizer, folder)
    return folder


def with_window(model: Path, tokenizer: Any, folder: Path) -> Path:
    """The same weights as a Mistral with a sliding window of 16 tokens."""
    if not folder.exists():
        llama = load(model)
        config = MistralConfig(**common(llama.config), sliding_window=16)
        mistral = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        mistral.load_state_dict(llama.state_dict())
        save(mistral, tokenizer, folder)
    return folder


def common(config: Any) -> dict[str, Any]:
    """The sizes of a Llama, for a model of another class."""
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "head_dim"),
    )
    return {name: getattr(config, name) for name in names}


def faults(base: Path, tokenizer: Any, work: Path) -> Iterator[Case]:
    """The planted ones."""
    full, lora = work / f"full-2e-5-{POINTS[-1]}", work / f"lora-r16-all-{POINTS[-1]}"
    config = json.loads((base / "config.json").read_text())
    rope = config["rope_parameters"] | {"rope_theta": config["rope_parameters"]["rope_theta"] / 10}
    yield Case("rope theta / 10", full, spoil=other_config(rope_parameters=rope))
    for name, eps in (("norm epsilon 1e-6", 1e-6), ("norm epsilon 1e-3", 1e-3)):
        yield Case(name, full, spoil=other_config(rms_norm_eps=eps))
    yield Case("layers 15 and 16 swapped", full, spoil=other_weights(swap_layers(LAYER, LAYER + 1)))
    yield Case("layers 5 and 20 swapped", full, spoil=other_weights(swap_layers(5, 20)))
    yield Case("two query heads of a layer swapped", full, spoil=other_weights(swap_heads(config["head_dim"])))
    yield Case("attention scale / 2", full, spoil=other_weights(scale("q_proj.weight", 0.5)))
    yield Case("attention scale * 0.9", full, spoil=other_weights(scale("q_proj.weight", 0.9)))
    yield Case("MLP of a layer lost", full, spoil=other_weights(scale(f"layers.{LAYER}.mlp.down_proj", 0.0)))
    untied = {"tie_word_embeddings": False}
    yield Case("tied head lost (random)", full, spoil=other_weights(random_head, **untied))
    trained_more = work / f"full-2e-4-{POINTS[-1]}"
    yield Case("tied head lost (the base's)", trained_more, spoil=other_weights(head_of_base(base), **untied))
    yield Case("the base instead (2e-5)", full, spoil=lambda model, adapter, out: (base, adapter))
    yield Case("the base instead (2e-4)", trained_more, spoil=lambda model, adapter, out: (base, adapter))
    yield Case("prompt without its last 4 tokens", full, spoil_prompt=lambda ids: ids[:-4])
    yield Case("prompt without its template", full, spoil_prompt=lambda ids: ids[6:-6])
    qwen = with_biases(full, tokenizer, work / "with-biases")
    yield Case("all biases lost", qwen, spoil=other_weights(scale("_proj.bias", 0.0)))
    yield Case("biases of a layer lost", qwen, spoil=other_weights(scale(f"layers.{LAYER}.self_attn.v_proj.bias", 0.0)))
    window = with_window(full, tokenizer, work / "with-window")
    yield Case("sliding window ignored", window, spoil=other_config(sliding_window=None))
    yield Case("adapter not applied", base, lora, spoil=other_adapter(lambda t: {n: 0 * v for n, v in t.items()}))
    yield Case("adapter's alpha / 2", base, lora, spoil=other_adapter(lambda t: t, lora_alpha=16))
    yield Case("no adapter on any v_proj", base, lora, spoil=other_adapter(without("v_proj")))
    yield Case("no adapter on one v_proj", base, lora, spoil=other_adapter(without(f"layers.{LAYER}.self_attn.v_proj")))


# --- measuring ------------------------------------------------------------------------------------


def ask(case: Case, precision: str, prompts: list[list[int]], out: Path) -> dict[str, Any]:
    """What vLLM answers, in this process."""
    model, adapter = case.spoil(case.model, case.adapter, out) if case.spoil else (case.model, case.adapter)
    given = [case.spoil_prompt(ids) if case.spoil_prompt else ids for ids in prompts]
    engine = {"max_model_len": max(map(len, given)) + NUM_SCORED + 8, "max_num_seqs": len(given), "enforce_eager": True}
    try:
        return answer(
            {
                "model": str(model),
                "tokenizer": str(case.model),
                "adapter": str(adapter) if adapter else None,
                "adapter_rank": 64,
                "prompts": given,
                "texts": [],
                "max_tokens": 1,
                "num_scored": NUM_SCORED,
                "num_likeliest": NUM_LIKELIEST,
                "engine": engine
                | {"dtype": DTYPES[precision], "kv_cache_memory_bytes": 2**28, "disable_log_stats": True},
            }
        )
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


_linear = torch.nn.functional.linear


def _fast_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A 16-bit product that is summed in fp32 and rounded once, as a 16-bit kernel does; CPUs without one are slow."""
    return _linear(inputs.float(), weight.float(), None if bias is None else bias.float()).to(inputs.dtype)


@torch.no_grad()
def score(model: Any, prompts: list[list[int]], answers: list[dict[str, Any]]) -> list[Any]:
    """Transformers' log-probabilities of the same tokens, [prompts][places][likeliest]."""
    found = []
    for prompt, one in zip(prompts, answers, strict=True):
        logits = model(input_ids=torch.tensor([prompt + one["token_ids"]]), use_cache=False).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
        found.append(logprobs.gather(1, torch.tensor(one["likeliest"])).tolist())
    return found


@torch.no_grad()
def measure_case(case: Case, precision: str, prompts: list[list[int]], out: Path) -> dict[str, Any]:
    """Both sides of a case: log-probabilities of the same tokens, [prompts][places][likeliest]."""
    served = ask(case, precision, prompts, out)
    dtype = getattr(torch, DTYPES[precision])
    model = load(case.model, dtype)
    if case.adapter:
        model = PeftModel.from_pretrained(model, case.adapter, autocast_adapter_dtype=False).to(dtype).eval()
    with patch("torch.nn.functional.linear", _fast_linear):
        here = score(model, prompts, served["answers"])
    exact = score(model.float(), prompts, served["answers"])
    there = [one["logprobs"] for one in served["answers"]]
    return {
        "here": here,
        "there": there,
        "exact": exact,
        "settings": served["settings"],
        "config": model.config.to_dict(),
        "served_modules": served["adapter_modules"],
        "modules": modules_of(case.adapter),
    }


def modules_of(adapter: Path | None) -> list[str] | None:
    """Modules that an adapter's file tunes."""
    if adapter is None:
        return None
    names = load_file(adapter / "adapter_model.safetensors")
    return sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names})


def decide(result: dict[str, Any], precision: str) -> tuple[Measured, list[str]]:
    """The check's decision on a measured case: numbers, and what speaks against it, shortly."""
    places = [
        Place(
            prompt=prompt,
            token=token,
            chosen=0,
            likeliest=0,
            gap=max(exact) - exact[0],
            served=[abs(one - other) for one, other in zip(there, exact, strict=True)],
            own=[abs(one - other) for one, other in zip(here, exact, strict=True)],
        )
        for prompt, sides in enumerate(zip(result["here"], result["there"], result["exact"], strict=True))
        for token, (here, there, exact) in enumerate(zip(*sides, strict=True))
    ]
    measured = measure(places, LIMITS[precision])
    reasons = [
        name
        for name, value, limit in (
            ("mean", measured.mean_difference, measured.mean_limit),
            ("share", measured.far_share, measured.far_share_limit),
            ("gap", measured.widest_gap, measured.gap_limit),
        )
        if not value <= limit
    ]
    settings = comparable(result["config"]), comparable(result["settings"])
    reasons += ["settings"] if differing_settings(*settings, only_common=True) else []
    missing = set(result.get("modules") or []) - set(result.get("served_modules") or [])
    return measured, reasons + (["modules"] if missing else [])


def print_table(folder: Path) -> None:
    """All that was measured so far."""
    print("| precision | case | mean | own | ratio | far | largest | gap | refused by |")
    print("|---" * 9 + "|")
    wrong = 0
    for path in sorted(folder.glob("*.json")):
        precision, _, name = path.stem.partition("-")
        result = json.loads(path.read_text())
        if "error" in result:
            print(f"| {precision} | {name} | | | | | | | vLLM itself: {result['error'][:80]} |")
            continue
        measured, reasons = decide(result, precision)
        wrong += bool(reasons) == result["honest"]
        print(
            f"| {precision} | {'' if result['honest'] else 'fault: '}{name} | {measured.mean_difference:.4f} "
            f"| {measured.own_difference:.4f} | {measured.mean_difference / max(1e-9, measured.own_difference):.2f} "
            f"| {measured.far_share:.3f} | {measured.largest_difference:.3f} | {measured.widest_gap:.3f} "
            f"| {', '.join(reasons) or '-'} |"
        )
    print(f"{wrong} decided wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--precisions", default="bf16,fp16,fp32")
    parser.add_argument("--only", default="", help="Only cases with this in their name.")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    rows = json.loads(arguments.rows.read_text())
    texts = [PROMPT.format(**row) for row in rows]
    prompts = sorted((tokenizer(text).input_ids for text in texts[:64]), key=len)[:NUM_PROMPTS]
    full = [tokenizer(text + row["output"]).input_ids[:160] for text, row in zip(texts, rows, strict=True)]
    honest = make_variants(arguments.model, tokenizer, full[64:], arguments.work)
    planted = list(faults(arguments.model, tokenizer, arguments.work))
    rounds = [honest[::3], planted, honest[1::3], honest[2::3]]
    measured = arguments.work / "measured"
    measured.mkdir(exist_ok=True)
    for cases in rounds:
        for precision, case in itertools.product(arguments.precisions.split(","), cases):
            path = measured / f"{precision}-{case.name.replace('/', 'by')}.json"
            if arguments.only not in case.name or path.exists():
                continue
            out = arguments.work / "served"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            try:
                result = measure_case(case, precision, prompts, out)
            except Exception as error:  # noqa: BLE001 - vLLM refuses some faults by itself, which is a result too
                result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            path.write_text(json.dumps({"honest": case.is_honest} | result, default=str))
            print(precision, case.name, result.get("error", ""), file=sys.stderr, flush=True)
    print_table(measured)


if __name__ == "__main__":
    main()
