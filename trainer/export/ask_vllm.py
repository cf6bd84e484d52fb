"""What vLLM answers with an exported model; called in a process of its own, by `trainer.export.check.ask_vllm`.

A process, because vLLM keeps what it took of the device until its process ends.
"""

from __future__ import annotations

from typing import Any

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Complete the prompts greedily.

    Args:
        question: `model`, `adapter` (or null), `adapter_rank`, `prompts` (token ids), `max_tokens`, `engine` (further
            engine arguments).

    Returns:
        `answers`, of each prompt the `token_ids` chosen greedily and their `logprobs`, and `settings`, the model's
        configuration as vLLM has it.
    """
    adapter = question["adapter"]
    lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": question["adapter_rank"]} if adapter else {}
    engine = LLM(model=question["model"], **lora, **question["engine"])
    outputs = engine.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in question["prompts"]],
        SamplingParams(temperature=0.0, max_tokens=question["max_tokens"], logprobs=0, detokenize=False),
        use_tqdm=False,
        lora_request=LoRARequest("tuned", 1, adapter) if adapter else None,
    )
    answers = []
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        places: Any = output.outputs[0].logprobs  # one dictionary of token id to log-probability a place
        chosen = [place[token].logprob for place, token in zip(places, ids, strict=True)]
        answers.append({"token_ids": ids, "logprobs": chosen})
    return {"answers": answers, "settings": engine.model_config.hf_config.to_dict()}
