"""The judge's model on the cluster, through the same vLLM engines that generate; its verdict is forced by a grammar."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping

from transformers import AutoTokenizer

from evaluation.config import ModelSource, VllmJudge
from evaluation.judges.budget import Range
from evaluation.judges.forms import Ending, Form
from evaluation.judges.language_model import Ask
from evaluation.judges.prompts import Messages, neutralise
from evaluation.models import inspect_model
from evaluation.reply import Reply
from evaluation.rows import Row
from evaluation.thoughts import thinking_of
from evaluation.vllm_cluster import EngineSpec, Request, complete

# The most that vLLM gives by default; ten grades and what competes with them.
_NUM_LOGPROBS = 20
# The verdict's grammar leaves no room for a thought, so the judge is asked not to think, in the words of the templates
# that can be told so. A template without a use for them ignores them.
_NO_THOUGHT: Row = {"enable_thinking": False, "thinking": False}
_CUT_MARK = "\n[... {} tokens were cut here by the examiner ...]"


class VllmEngine:
    """Carries prompts to a local judge model.

    Args:
        config: The judge's settings.
        form: What it is asked; its pattern forces the verdict.

    Attributes:
        name: How the report calls the judge.
        identity: Model, its fingerprint, sampling.
        ending: The verdict is forced by the form's pattern.
        varies: Greedy decoding says the same again.
    """

    name: str
    identity: Row
    ending: Ending
    varies: bool

    def __init__(self, config: VllmJudge, form: Form) -> None:
        source = ModelSource(path=config.model, revision=config.revision)
        self._config = config
        self._form = form
        self._facts = inspect_model(source)
        self._tokenizer = AutoTokenizer.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
        added = self._tokenizer.added_tokens_decoder.values()
        self._specials = tuple(token.content for token in added if token.special)
        self._limit = min(config.max_model_len or self._facts.max_positions, self._facts.max_positions)
        self.name = f"vllm {config.model.rstrip('/').rpartition('/')[2]}"
        self.ending = "structured"
        self.varies = config.temperature > 0
        self.identity = {
            "judge": "vllm",
            "fingerprint": self._facts.fingerprint,
            "family": self._facts.family,
            "temperature": config.temperature,
            "max_answer_tokens": config.max_answer_tokens,
            "max_model_len": self._limit,
            "expectation": config.expectation,
            "dtype": config.dtype,
        }
        if self._thinks():
            self.identity["thought"] = "closed"

    def clean(self, text: str) -> str:
        """Break the model's control tokens, and cut a text above `max_answer_tokens` with a visible mark."""
        text = neutralise(text, self._specials)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        surplus = len(ids) - self._config.max_answer_tokens
        if surplus <= 0:
            return text
        return str(self._tokenizer.decode(ids[: self._config.max_answer_tokens])) + _CUT_MARK.format(surplus)

    def count_tokens(self, messages: Messages) -> Range:
        """Count with the judge's own tokenizer."""
        num_tokens = len(self._tokens(messages))
        return Range(num_tokens, num_tokens, num_tokens)

    def reply_tokens(self) -> Range:
        """Give the bounds of the form."""
        return Range(2, self._form.max_tokens / 2, self._form.max_tokens)

    def replies(self, asks: Iterable[Ask]) -> Iterator[tuple[Ask, Reply]]:
        """Answer the prompts on `judge.engines` engines; one that is too long for the model fails alone."""
        owed: dict[str, tuple[Ask, int]] = {}
        requests: list[Request] = []
        for ask in asks:
            ids = self._tokens(ask.messages)
            if len(ids) + self._form.max_tokens > self._limit:
                cause = f"the judge's prompt has {len(ids)} tokens, its model takes {self._limit}, verdict included"
                yield ask, Reply(None, cause=cause, is_too_long=True)
                continue
            owed[ask.key] = ask, len(ids)
            requests.append(Request(ask.key, ids, self._sampling(ask)))
        for completion in complete(self._spec(), requests):
            ask, num_prompt_tokens = owed[completion.key]
            reason = completion.finish_reason(self._facts.stop_token_ids)
            if self._config.expectation and completion.logprobs:
                text, reason = self._digit_probabilities(completion.logprobs[0]), "stop"
                yield ask, Reply(text, reason, None, num_prompt_tokens, 1)
                continue
            yield ask, Reply(completion.text, reason, completion.cause, num_prompt_tokens, len(completion.token_ids))

    def _tokens(self, messages: Messages) -> list[int]:
        if self._tokenizer.chat_template is None:
            return list(self._tokenizer(messages[0]["content"] + "\n\n")["input_ids"])
        # The template writes the special tokens itself.
        return list(self._tokenizer(self._rendered(messages), add_special_tokens=False)["input_ids"])

    def _rendered(self, messages: Messages) -> str:
        """Write the prompt up to where the verdict starts; a thought that the template opens is closed."""
        text = str(
            self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **_NO_THOUGHT)
        )
        thinking = thinking_of(self._tokenizer.chat_template, text)
        if thinking is None:
            return text
        return text + (thinking.close if thinking.opened else thinking.plain)

    def _thinks(self) -> bool:
        """Whether the template would let the judge think."""
        if self._tokenizer.chat_template is None:
            return False
        probe = [{"role": "user", "content": "x"}]
        plain = self._tokenizer.apply_chat_template(probe, add_generation_prompt=True, tokenize=False)
        return bool(plain != self._rendered(probe))

    def _digit_probabilities(self, logprobs: Mapping[int, float]) -> str:
        """Add up the probabilities of the tokens that are a digit, with or without a space before it; as JSON."""
        grades: dict[str, float] = {}
        for token, logprob in logprobs.items():
            digit = str(self._tokenizer.decode([token])).strip()
            if len(digit) == 1 and digit in "0123456789":
                grades[digit] = grades.get(digit, 0.0) + math.exp(logprob)
        return json.dumps(grades, sort_keys=True)

    def _sampling(self, ask: Ask) -> Row:
        if self._config.expectation:
            # No grammar: it would hide how much the judge would rather say something else.
            return {"temperature": 0.0, "max_tokens": 1, "logprobs": _NUM_LOGPROBS}
        return {
            "temperature": self._config.temperature,
            "seed": ask.seed if self.varies else None,
            "max_tokens": self._form.max_tokens,
            "stop_token_ids": list(self._facts.stop_token_ids),
            "structured_outputs": {"regex": self._form.pattern},
        }

    def _spec(self) -> EngineSpec:
        return EngineSpec(
            model=self._config.model,
            revision=self._config.revision,
            engines=self._config.engines,
            tensor_parallel_size=self._config.tensor_parallel_size,
            cpus=self._config.cpus_per_engine,
            max_model_len=self._limit,
            dtype=self._config.dtype,
            gpu_memory_share=self._config.gpu_memory_share,
            cpu_cache_gib=self._config.cpu_cache_gib,
            section="judge",
            head_dim=self._facts.head_dim,
        )
