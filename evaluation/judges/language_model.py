"""A language model as judge: writes the prompts, reads the verdicts, asks again where there was none.

What is asked is a `Form`; who carries the prompts to the model (vLLM on the cluster, or an endpoint) is an `Engine`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from evaluation.judges.base import Unit, Verdict, add_attempt
from evaluation.judges.budget import Budget, Range
from evaluation.judges.forms import Ending, Form
from evaluation.judges.prompts import Messages
from evaluation.judges.verdict import VerdictError
from evaluation.reply import Reply
from evaluation.rows import Row, content_key

# Raised by hand when the reading of replies changes, so that old verdicts are asked again.
_VERSION = 1


@dataclass(frozen=True)
class Ask:
    """One prompt for the judge's model.

    Attributes:
        key: Names the prompt among those of one call.
        messages: The prompt.
        seed: Seed of the sampling; differs between repeats and attempts.
        unit: What is judged.
        part: Which of the form's parts this is.
    """

    key: str
    messages: Messages
    seed: int
    unit: Unit
    part: int


class Engine(Protocol):
    """Carries prompts to the judge's model.

    Attributes:
        name: How the report calls the judge.
        identity: Model, revision, sampling: all that the replies depend on besides the prompt.
        ending: How the verdict is asked for.
        varies: Whether asking the same again can bring another reply.
    """

    name: str
    identity: Row
    ending: Ending
    varies: bool

    def clean(self, text: str) -> str:
        """Break the model's control tokens in a text, and cut it to the longest that is shown to the judge."""
        ...

    def count_tokens(self, messages: Messages) -> Range:
        """Tell how long a prompt is, in tokens, without asking anybody."""
        ...

    def reply_tokens(self) -> Range:
        """Tell how long a reply will be, in tokens."""
        ...

    def replies(self, asks: Iterable[Ask]) -> Iterator[tuple[Ask, Reply]]:
        """Answer each prompt once, in any order. A prompt that fails brings its cause; a hopeless engine raises."""
        ...


@dataclass
class _Pending:
    """A unit some of whose parts have no verdict yet."""

    parts: dict[int, Any] = field(default_factory=dict)  # by part: what the form read
    words: dict[int, str] = field(default_factory=dict)  # by part: the judge's own words
    thoughts: dict[int, str] = field(default_factory=dict)  # by part: what an endpoint gives as its thought
    failed: Verdict | None = None  # the failed attempts so far
    num_owed: int = 0  # replies of this attempt that are on their way
    is_hopeless: bool = False  # a prompt does not fit the judge's model
    num_calls: int = 0
    num_prompt_tokens: int = 0
    num_response_tokens: int = 0


class PromptedJudge:
    """A language model that is shown each response and asked for a verdict; a `Judge`.

    Args:
        engine: Who carries the prompts.
        form: What it is asked.
        repeats: Verdicts asked per response.
        attempts: Times that a verdict is asked for before it counts as failed.
        budget: How many calls it may make; None: any number.

    Attributes:
        name: How the report calls it.
        identity: What its verdicts depend on besides the row.
        repeats: Verdicts asked per response.
        form: What it is asked.
        budget: How many calls it may make; where it ends, units are left without a verdict.
    """

    name: str
    identity: Row
    repeats: int
    form: Form
    budget: Budget

    def __init__(
        self, engine: Engine, form: Form, *, repeats: int, attempts: int, budget: Budget | None = None
    ) -> None:
        self._engine = engine
        self.budget = budget or Budget()
        self._attempts = attempts if engine.varies else 1
        self.form = form
        self.name = engine.name
        self.repeats = repeats
        blank = {"id": "", "sample": 0} | dict.fromkeys(form.fields, "")
        template = [form.messages(blank, part, engine.ending, lambda text: text) for part in range(form.num_parts)]
        self.identity = {**engine.identity, "version": _VERSION, "protocol": form.name, "template": template}

    def key(self, row: Row, repeat: int) -> str:
        """Hash what the verdict on a response depends on."""
        return content_key(self.identity, row["id"], row["sample"], [row[name] for name in self.form.fields], repeat)

    def prompts(self, unit: Unit) -> list[Messages]:
        """Write the prompts for one verdict, without asking."""
        parts = range(self.form.num_parts)
        return [self.form.messages(unit.row, part, self._engine.ending, self._engine.clean) for part in parts]

    def estimate(self, units: Iterable[Unit]) -> dict[str, Range]:
        """Add up what the verdicts on the units will take, without asking anybody.

        Args:
            units: The verdicts that would be asked for.

        Returns:
            Calls, prompt tokens and reply tokens; the most is with every attempt used.
        """
        calls = prompt = reply = Range(0, 0, 0)
        for unit in units:
            if self.form.known(unit.row) is not None:
                continue
            for messages in self.prompts(unit):
                calls += Range(1, 1, self._attempts)
                prompt += self._engine.count_tokens(messages).at_most_times(self._attempts)
                reply += self._engine.reply_tokens().at_most_times(self._attempts)
        return {"calls": calls, "prompt_tokens": prompt, "reply_tokens": reply}

    def verdicts(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        """Judge the units; what has no verdict is asked again at the end, a bounded number of times."""
        pending: dict[str, _Pending] = {}
        known: list[tuple[Unit, Verdict]] = []
        for attempt in range(self._attempts):
            again: list[Unit] = []
            for ask, reply in self._engine.replies(self._asks(units, pending, known, attempt)):
                while known:
                    yield known.pop()
                state = pending[ask.unit.key]
                cause = self._take(state, ask, reply)
                if cause is not None:
                    failed = Verdict("judge_failed", cause=cause, raw=reply.text or reply.thought)
                    state.failed = add_attempt(state.failed, failed)
                if state.num_owed:
                    continue
                is_last = attempt == self._attempts - 1 or state.is_hopeless
                if len(state.parts) < self.form.num_parts and not is_last:
                    again.append(ask.unit)
                else:
                    yield ask.unit, self._settle(pending.pop(ask.unit.key))
            yield from known
            known.clear()
            if not again:
                return
            units = again

    def _asks(
        self, units: Iterable[Unit], pending: dict[str, _Pending], known: list[tuple[Unit, Verdict]], attempt: int
    ) -> Iterator[Ask]:
        """Write the prompts that are still owed; nothing is held of a unit before its turn.

        What the form knows without asking goes to `known`.
        """
        for unit in units:
            if (result := self.form.known(unit.row)) is not None:
                known.append((unit, Verdict("scored", result[0], details=result[1])))
                continue
            state = pending.setdefault(unit.key, _Pending())
            missing = [part for part in range(self.form.num_parts) if part not in state.parts]
            state.num_owed = len(missing)
            for part in missing:
                if not self.budget.grant():
                    return
                messages = self.form.messages(unit.row, part, self._engine.ending, self._engine.clean)
                seed = int(content_key(unit.key, part, attempt)[:8], 16)
                yield Ask(f"{unit.key}/{part}", messages, seed, unit, part)

    def _take(self, state: _Pending, ask: Ask, reply: Reply) -> str | None:
        """Add one reply to its unit; gives the cause where it holds no verdict."""
        self.budget.spend(reply.num_prompt_tokens, reply.num_response_tokens)
        state.num_owed -= 1
        state.num_calls += 1
        state.num_prompt_tokens += reply.num_prompt_tokens
        state.num_response_tokens += reply.num_response_tokens
        state.is_hopeless = state.is_hopeless or reply.is_too_long
        if reply.text is None:
            return reply.cause
        try:
            state.parts[ask.part] = self.form.read(reply.text, reply.finish_reason)
        except VerdictError as error:
            return str(error)
        state.words[ask.part] = reply.text
        if reply.thought is not None:
            state.thoughts[ask.part] = reply.thought
        return None

    def _settle(self, state: _Pending) -> Verdict:
        """Make the verdict on a unit of its parts, or of its last failure."""
        if len(state.parts) == self.form.num_parts:
            score, details = self.form.combine([state.parts[part] for part in range(self.form.num_parts)])
            words = "\n---\n".join(state.words[part] for part in range(self.form.num_parts))
            if state.thoughts:
                details = details | {"thought": "\n---\n".join(state.thoughts.values())}
            verdict = add_attempt(state.failed, Verdict("scored", score, raw=words, details=details))
        else:
            verdict = state.failed or Verdict("judge_failed", cause="the judge returned no verdict")
        return replace(
            verdict,
            num_calls=state.num_calls,
            num_prompt_tokens=state.num_prompt_tokens,
            num_response_tokens=state.num_response_tokens,
        )
