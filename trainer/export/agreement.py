"""Whether vLLM computes the model that transformers computes: another model is told from another rounding.

Kernels round differently, so single log-probabilities differ, in bf16 by half a nat. How far rounding goes depends on
the model, so it is measured each time: transformers scores vLLM's answers in the export's number format and in fp32,
and these two differ by rounding alone. vLLM may be twice as far from fp32 on average. No limit is set on the largest
difference. Settings, adapted modules, tokenizer and stop tokens are compared as they are: some faults move the numbers
less than rounding does.

Measured on SmolLM2-135M-Instruct on a CPU by tests/benchmarks/export_check.py, over 72 tokens with the five likeliest
of each (an export compares 256), in nats:

                                          vLLM   own    ratio      far    largest  refused by
    bf16, 7 honest, the farthest of each  0.075  0.078  0.85..1.08    0%    0.42   -
    fp16, 2 honest (full)                 0.008  0.008  1.00          0%    0.04   -
    two heads of one layer swapped        0.187  0.060  3.1         9.2%    1.3    mean, share
    biases of one layer lost              0.342  0.100  3.4         5.8%    3.6    mean, share
    attention scale * 0.9                 0.215  0.058  3.7        10.8%    1.4    mean, share
    rope theta / 10                       0.385  0.061  6.3        29.7%    3.0    mean, share, settings
    tied head lost, the base's instead    0.493  0.066  7.5        40.0%    1.6    mean, share, settings
    the untuned base instead              0.651  0.051  12.9       51.7%    5.8    mean, share, gap
    prompt without its last 4 tokens      0.989  0.069  14.3       39.7%    7.7    mean, share, gap
    sliding window ignored                3.821  0.244  15.6       65.0%   18.0    mean, share, gap, settings
    adapter's alpha / 2                   1.074  0.067  16.0       56.7%    7.7    mean, share, gap
    two neighbouring layers swapped       1.523  0.062  24.8       73.6%    7.3    mean, share, gap
    norm epsilon 1e-6 instead of 1e-5     0.063  0.057  1.1           0%    0.30   settings alone
    adapter missing on one module         by name, whatever its size (test_export.py)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.errors import TrainerError
from trainer.export.check import MAX_TOKENS, WAY_OUT, Served, comparable, differing_settings, settings_of
from trainer.model import causal_lm

_MOST_NAMES = 5


@dataclass(frozen=True)
class Limits:
    """What rounding is taken to explain. A difference is that of a log-probability from fp32's.

    Attributes:
        mean: vLLM's mean difference, as a multiple of transformers' own.
        far: From here on a difference is far, as a multiple of transformers' own mean.
        far_share: Largest share of far differences, 0 to 1.
        gap: By how much the likeliest token may be likelier than the one that vLLM chose, as such a multiple.
        least: Transformers' own mean counts as at least this, in nats.
    """

    mean: float
    far: float
    far_share: float
    gap: float
    least: float


LIMITS = {
    precision: Limits(mean=2.0, far=8.0, far_share=0.02, gap=20.0, least=least)
    for precision, least in (("fp32", 1e-3), ("fp16", 1e-3), ("bf16", 5e-3))
}


@dataclass(frozen=True)
class Place:
    """One token of an answer.

    Attributes:
        prompt: Number of its prompt.
        token: Number of the token in the answer.
        chosen: The token that vLLM chose.
        likeliest: The likeliest token in fp32.
        gap: By how many nats that one is likelier than the chosen one, in fp32.
        served: vLLM's absolute differences from fp32 for the chosen token and the likeliest others, in nats.
        own: Transformers' differences for the same tokens, in the export's number format.
    """

    prompt: int
    token: int
    chosen: int
    likeliest: int
    gap: float
    served: list[float]
    own: list[float]


@dataclass(frozen=True)
class Measured:
    """How far vLLM is from fp32, and how far rounding may bring it; in nats. NaN where a number is not finite.

    Attributes:
        num_tokens: Log-probabilities that were compared.
        mean_difference: vLLM's mean difference.
        mean_limit: Its limit.
        own_difference: Transformers' mean difference, which is rounding alone.
        far_difference: From here on a difference is far.
        far_share: Share of vLLM's differences that are far, 0 to 1.
        far_share_limit: Its limit.
        largest_difference: The largest of vLLM's; it decides nothing.
        widest_gap: By how much a likeliest token is likelier than the one that vLLM chose, at most.
        gap_limit: Its limit.
    """

    num_tokens: int
    mean_difference: float
    mean_limit: float
    own_difference: float
    far_difference: float
    far_share: float
    far_share_limit: float
    largest_difference: float
    widest_gap: float
    gap_limit: float


def measure(places: Sequence[Place], limits: Limits) -> Measured:
    """Summarise places. Pure.

    Args:
        places: At least one.
        limits: For the number format.

    Returns:
        The summary, with the limits in nats.
    """
    served, own, gaps = (
        torch.tensor(values, dtype=torch.float64)
        for values in (
            [one for place in places for one in place.served],
            [one for place in places for one in place.own],
            [place.gap for place in places],
        )
    )
    unit = max(own.mean().item(), limits.least)
    return Measured(
        num_tokens=len(served),
        mean_difference=served.mean().item(),
        mean_limit=limits.mean * unit,
        own_difference=own.mean().item(),
        far_difference=limits.far * unit,
        far_share=(served > limits.far * unit).double().mean().item(),
        far_share_limit=limits.far_share,
        largest_difference=served.max().item(),
        widest_gap=gaps.max().item(),
        gap_limit=limits.gap * unit,
    )


def beyond_rounding(measured: Measured) -> list[str]:
    """What rounding does not explain. Pure.

    Args:
        measured: What was measured.

    Returns:
        A phrase for each number beyond its limit; a number that is not finite is beyond every limit.
    """
    checks = [
        (
            measured.mean_difference,
            measured.mean_limit,
            "log-probabilities differ from fp32's by {:.4g} nats on average (limit {:.4g}; transformers' own differ by "
            f"{measured.own_difference:.4g})",
        ),
        (
            measured.far_share,
            measured.far_share_limit,
            f"a share of {{:.4g}} of them differs by more than {measured.far_difference:.4g} nats (limit {{:.4g}})",
        ),
        (
            measured.widest_gap,
            measured.gap_limit,
            "vLLM chose a token that is {:.4g} nats less likely than the likeliest (limit {:.4g})",
        ),
    ]
    return [words.format(value, limit) for value, limit, words in checks if not value <= limit]


# --- scoring --------------------------------------------------------------------------------------


@contextmanager
def computing_in_fp32(model: nn.Module) -> Iterator[None]:
    """Let a model compute in fp32 with the weights that it has, without holding a second copy of them.

    Each module's weights are fp32 while its forward pass runs, so that one module at a time takes twice the memory.

    Args:
        model: In any number format; as it was afterwards.
    """
    handles = []
    for module, parameters in _holders(model):
        was = [(parameter, parameter.data) for parameter in parameters]

        def widen(*_: object, was: list[tuple[nn.Parameter, torch.Tensor]] = was) -> None:
            for parameter, data in was:
                parameter.data = data.float()

        def restore(*_: object, was: list[tuple[nn.Parameter, torch.Tensor]] = was) -> None:
            for parameter, data in was:
                parameter.data = data

        handles.append(module.register_forward_pre_hook(widen))
        handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _holders(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules with their floating parameters; an adapter's layer, which casts by its weights' type, as a whole."""
    whole = isinstance(module, BaseTunerLayer)
    parameters = [one for one in module.parameters(recurse=whole) if one.is_floating_point()]
    if parameters:
        yield module, parameters
    if not whole:
        for child in module.children():
            yield from _holders(child)


@torch.no_grad()
def score(model: nn.Module, prompts: list[list[int]], served: Served) -> list[Place]:
    """Score every token of vLLM's answers by transformers, in the export's number format and in fp32.

    Args:
        model: The exported folder as transformers loads it, in evaluation mode.
        prompts: Token ids.
        served: What vLLM answered to them.

    Returns:
        The places in order.
    """
    places = []
    for number, (prompt, answer) in enumerate(zip(prompts, served.answers, strict=True)):
        ids, likeliest = answer["token_ids"], torch.tensor(answer["likeliest"])
        own = _log_probabilities(model, prompt, ids)
        with computing_in_fp32(model):
            exact = _log_probabilities(model, prompt, ids)
        expected = exact.gather(1, likeliest)
        theirs = (torch.tensor(answer["logprobs"]) - expected).abs().tolist()
        ours = (own.gather(1, likeliest) - expected).abs().tolist()
        gaps = (exact.amax(1) - expected[:, 0]).tolist()
        bests = exact.argmax(1).tolist()
        places += [
            Place(number, token, ids[token], bests[token], gaps[token], theirs[token], ours[token])
            for token in range(len(ids))
        ]
    return places


def _log_probabilities(model: nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[tokens of the answer, vocabulary], fp32, on the CPU."""
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([prompt + answer], device=device), use_cache=False).logits[0]
    logprobs: torch.Tensor = logits[-len(answer) - 1 : -1].float().log_softmax(-1)
    return logprobs.cpu()


# --- what differs beside the numbers --------------------------------------------------------------


def differing_answers(served: Served, stops: set[int]) -> list[str]:
    """Where vLLM's answers don't end, or are not chosen, as a user's would be. Pure.

    Args:
        served: What vLLM gave.
        stops: Tokens at which an answer ends; empty where they are not known.

    Returns:
        The first place of each kind, in words.
    """
    found: dict[str, str] = {}
    for number, answer in enumerate(served.answers):
        ids = answer["as_served"]
        stopped = next((place for place, token in enumerate(ids) if token in stops), None)
        if stopped is not None and stopped != len(ids) - 1:
            found.setdefault(
                "after", f"prompt {number}, token {stopped}: vLLM goes on after the stop token {ids[stopped]}"
            )
        elif stops and stopped is None and len(ids) < MAX_TOKENS:
            found.setdefault("before", f"prompt {number}: vLLM ends after {len(ids)} tokens without a stop token")
        for place, logprobs in enumerate(answer["logprobs"]):
            if max(logprobs) > logprobs[0]:
                found.setdefault(
                    "greedy",
                    f"prompt {number}, token {place}: vLLM did not choose the token that is likeliest to itself",
                )
    return list(found.values())


def _settings_in_vllm(model: nn.Module, served: Served, *, suspected: bool) -> list[str]:
    """Settings that vLLM has otherwise; where its class has other defaults, only if the numbers differ too."""
    config = type(causal_lm(model).config)
    if served.settings_class != f"{config.__module__}.{config.__name__}" and not suspected:
        return []
    settings = differing_settings(settings_of(model), comparable(served.settings), only_common=True)
    return [f"the setting {phrase} (transformers first, vLLM second)" for phrase in settings]


def differing_adapter(model: nn.Module, served: Served) -> list[str]:
    """Modules that the adapter tunes in transformers and vLLM leaves alone.

    Args:
        model: Of transformers or PEFT.
        served: What vLLM gave.

    Returns:
        None or one phrase. Nothing is known where vLLM names all modules otherwise than transformers.
    """
    if served.adapter_modules is None or not isinstance(model, PeftModel):
        return []
    tuned = {_short(name): name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    applied = {_short(name) for name in served.adapter_modules}
    missing = sorted(name.removeprefix("base_model.model.") for short, name in tuned.items() if short not in applied)
    if not missing or (applied and len(missing) == len(tuned)):
        return []
    named = ", ".join(missing[:_MOST_NAMES]) + (", ..." if len(missing) > _MOST_NAMES else "")
    return [f"vLLM does not apply the adapter on {len(missing)} of {len(tuned)} modules: {named}"]


def _short(name: str) -> str:
    """A module's name from its layer's number on: what stands before differs between libraries."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[first:])


def differing_tokenizer(tokenizer: PreTrainedTokenizerBase, texts: list[str], served: Served) -> list[str]:
    """Whether vLLM makes other prompts of the same messages.

    Args:
        tokenizer: As trained with.
        texts: Those that vLLM tokenized.
        served: What vLLM gave.

    Returns:
        Phrases.
    """
    found = []
    if served.tokenizer["chat_template"] != tokenizer.chat_template:
        found.append("vLLM reads another chat template")
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    other = [number for number, ids in enumerate(served.tokenizer["token_ids"]) if ids != expected[number]]
    if other:
        found.append(f"vLLM tokenizes the text of prompt {other[0]} otherwise")
    return found


def compare_with_vllm(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    served: Served,
    *,
    stops: set[int],
    precision: str,
) -> dict[str, Any]:
    """Compare what vLLM computes with what transformers computes.

    Args:
        model: The exported folder as transformers loads it, in evaluation mode.
        tokenizer: As trained with.
        prompts: Token ids.
        served: What `ask_vllm` gave.
        stops: Tokens at which an answer has to end; empty where they are not the folder's.
        precision: fp32, fp16 or bf16.

    Returns:
        Numbers and `disagreements`, phrases, for the record; numbers that are not finite are None.
    """
    places = score(model, prompts, served)
    measured = measure(places, LIMITS[precision])
    numbers = beyond_rounding(measured)
    if numbers:
        worst = max(places, key=lambda place: math.inf if math.isnan(sum(place.served)) else max(place.served))
        numbers[-1] += (
            f"; the largest difference is {max(worst.served):.4g} nats, at prompt {worst.prompt}, token {worst.token}, "
            f"where vLLM chose {worst.chosen} and {worst.likeliest} is likeliest"
        )
    disagreements = [
        *_settings_in_vllm(model, served, suspected=bool(numbers)),
        *differing_adapter(model, served),
        *differing_tokenizer(tokenizer, [str(tokenizer.decode(ids)) for ids in prompts], served),
        *differing_answers(served, stops),
        *numbers,
    ]
    finite = {name: value if math.isfinite(value) else None for name, value in asdict(measured).items()}
    return {"num_prompts": len(prompts), **finite, "disagreements": disagreements}


def refuse_disagreement(disagreements: list[str]) -> None:
    """Refuse a folder that vLLM computes otherwise.

    Args:
        disagreements: Phrases.

    Raises:
        TrainerError: There is one.
    """
    if disagreements:
        raise TrainerError(
            f"vLLM does not compute the exported model as transformers does: {'; '.join(disagreements)}. The folder's "
            "tensors and tokenizer are those of the training. export.on_disagreement: warn exports in spite of it, and "
            f"the report shows it. {WAY_OUT}"
        )
