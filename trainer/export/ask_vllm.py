"""What vLLM answers with an exported model; called in a process of its own, by `trainer.export.check.ask_vllm`.

A process, because vLLM keeps what it took of the device until its process ends.
"""

from __future__ import annotations

import json
from typing import Any

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest


class AdapterModules:
    """A method that vLLM adds to its workers (`worker_extension_cls`), so that it runs where the adapter is held."""

    model_runner: Any

    def adapter_modules(self) -> list[str]:
        """Names of the modules on which this worker applies an adapter.

        vLLM leaves out modules that it does not know, without an error, and offers no list of those that it took; so
        this reads private attributes of vLLM 0.32.

        Returns:
            Names as in the adapter's file, without PEFT's prefix: a module that vLLM fuses is listed by its parts.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        names: list[str] = []
        for adapter in manager.list_adapters().values():
            for name, weights in adapter.loras.items():
                parts = manager.packed_modules.get(name, [name])
                held = weights.lora_a if isinstance(weights.lora_a, list) else [weights.lora_a]
                if name in manager.modules and len(held) == len(parts):
                    names += [part for part, matrix in zip(parts, held, strict=True) if matrix is not None]
                elif name in manager.modules:
                    names += parts  # a layer of experts, fused in another order than its names
        return sorted(names)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Complete the prompts greedily: once as a user gets it, and once past every stop token, with log-probabilities.

    Args:
        question: `model`, `tokenizer` and `adapter` (folder or null), `adapter_rank`, `prompts` (token ids), `texts`
            (to be tokenized), `max_tokens` of a user's answer, `num_scored` tokens and `num_likeliest` tokens a place
            to give log-probabilities of, `engine` (further engine arguments).

    Returns:
        `answers`, one for each prompt: `as_served`, the token ids that a user gets; `token_ids`, what was chosen past
        stop tokens; `likeliest` and `logprobs`, [num_scored][num_likeliest] token ids, the chosen one first, and their
        log-probabilities in nats. `settings`, the model's configuration as vLLM has it, and its `settings_class`.
        `adapter_modules`, or null. `tokenizer`: its `chat_template` and the `token_ids` of the texts.
    """
    adapter = question["adapter"]
    lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": question["adapter_rank"]} if adapter else {}
    engine = LLM(
        model=question["model"],
        tokenizer=question["tokenizer"],
        trust_remote_code=False,
        worker_extension_cls="trainer.export.ask_vllm.AdapterModules",
        **lora,
        **question["engine"],
    )
    request = LoRARequest("tuned", 1, adapter) if adapter else None
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in question["prompts"]]
    as_served = SamplingParams(temperature=0.0, max_tokens=question["max_tokens"], detokenize=False)
    scored = SamplingParams(
        temperature=0.0,
        max_tokens=question["num_scored"],
        ignore_eos=True,
        logprobs=question["num_likeliest"],
        detokenize=False,
    )
    served = engine.generate(prompts, as_served, use_tqdm=False, lora_request=request)
    further = engine.generate(prompts, scored, use_tqdm=False, lora_request=request)
    tokenizer: Any = engine.get_tokenizer()
    config = engine.model_config.hf_config
    return {
        "answers": [
            {"as_served": list(one.outputs[0].token_ids)} | _scored(two.outputs[0], question["num_likeliest"])
            for one, two in zip(served, further, strict=True)
        ],
        "settings": json.loads(json.dumps(config.to_dict(), default=str)),
        "settings_class": f"{type(config).__module__}.{type(config).__name__}",
        "adapter_modules": engine.collective_rpc("adapter_modules")[0] if adapter else None,
        "tokenizer": {
            "chat_template": tokenizer.chat_template,
            "token_ids": [tokenizer(text, add_special_tokens=False).input_ids for text in question["texts"]],
        },
    }


def _scored(completion: Any, num_likeliest: int) -> dict[str, Any]:  # noqa: ANN401 - vLLM's CompletionOutput
    chosen = list(completion.token_ids)
    likeliest, logprobs = [], []
    for token, place in zip(chosen, completion.logprobs, strict=True):  # a dictionary of token id to log-probability
        others = sorted(place.keys() - {token}, key=lambda other: -place[other].logprob)
        ids = [token, *others][:num_likeliest]
        likeliest.append(ids)
        logprobs.append([place[one].logprob for one in ids])
    return {"token_ids": chosen, "likeliest": likeliest, "logprobs": logprobs}
