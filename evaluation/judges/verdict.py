"""A judge's words in, a verdict out; or the reason why there is none.

Only the last thing that the judge says counts: a score that it quotes from the answer on the way there does not.
What is not plainly a verdict is a failure with a cause, never a number: nothing is clamped, rounded or guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from evaluation.thoughts import KNOWN

# The asked-for form, at the very end: no closing quotation mark may follow, which would make it a quotation.
_BRACKETED = re.compile(r"\[\[\s*([^\[\]]*?)\s*\]\][\s.*]*\Z")
_FENCED = re.compile(r"```(?:json)?\s*(\{.*\})\s*```\Z", re.DOTALL)
_HEAD = r"[*\s]*(?:(?:final\s+)?(?:score|rating|verdict|better|winner)\s*[:=]\s*)?[*\s]*"
_SCORE_LINE = re.compile(_HEAD + r"(-?\d{1,9})\s*(?:/\s*100)?[.*\s]*", re.IGNORECASE)
_CLOSES = tuple(thinking.close.strip() for thinking in KNOWN)
_OPENED = re.compile("|".join(rf"(?m:^\s*){re.escape(thinking.open.strip())}" for thinking in KNOWN) + "|<think>")
_WORD_LINE = re.compile(_HEAD + r"(\w+)[.*\s]*", re.IGNORECASE)


class VerdictError(Exception):
    """The judge's reply holds no verdict; says why."""


def parse_score(reply: str, finish_reason: str | None) -> int:
    """Read the final score of a reply.

    Accepted are `[[85]]` at the end, a last line that is a score and nothing else (`85`, `Score: 85.`, `85/100`), and
    a JSON object with an integer `score` that is the whole reply or its last line.

    Args:
        reply: The judge's words.
        finish_reason: Why the judge stopped writing, in OpenAI's words.

    Returns:
        The score, in 0..100.

    Raises:
        VerdictError: The reply was cut, has no final score, or one that is out of range.
    """
    value = _final(reply, finish_reason)
    if isinstance(value, dict):
        return _in_range(_field(value, "score"), "score")
    match = _SCORE_LINE.fullmatch(value)
    if match is None:
        raise VerdictError("the reply does not end in a score")
    return _in_range(int(match[1]), "score")


def parse_criteria(reply: str, finish_reason: str | None, names: Sequence[str]) -> dict[str, int]:
    """Read a score for each criterion from the JSON object that is the whole reply or its last line.

    Args:
        reply: The judge's words.
        finish_reason: Why the judge stopped writing, in OpenAI's words.
        names: The criteria.

    Returns:
        The scores by criterion, each in 0..100.

    Raises:
        VerdictError: The reply was cut, has no such object, lacks a criterion, or one is out of range.
    """
    value = _final(reply, finish_reason)
    if not isinstance(value, dict):
        raise VerdictError("the reply does not end in a JSON object with the criteria")
    return {name: _in_range(_field(value, name), name) for name in names}


def parse_choice(reply: str, finish_reason: str | None, choices: Sequence[str]) -> str:
    """Read which one of a few words the reply ends in: `[[A]]`, a last line `A`, or JSON with `better`.

    Args:
        reply: The judge's words.
        finish_reason: Why the judge stopped writing, in OpenAI's words.
        choices: The legal words.

    Returns:
        One of them.

    Raises:
        VerdictError: The reply was cut, or does not end in one of the words.
    """
    value = _final(reply, finish_reason)
    if isinstance(value, dict):
        word = _field(value, "better")
    else:
        match = _WORD_LINE.fullmatch(value)
        word = match[1] if match else None
    for choice in choices:
        if isinstance(word, str) and word.casefold() == choice.casefold():
            return choice
    raise VerdictError(f"the reply does not end in one of {', '.join(choices)}")


def parse_grades(reply: str, least_share: float = 0.5) -> float:
    """Read the expected grade out of the probabilities that a judge gives to the grades 0..9.

    >>> round(parse_grades('{"3": 0.4, "5": 0.4}'), 2)
    4.0

    Args:
        reply: JSON of the probability of each digit as the first token.
        least_share: Probability that must lie on the digits, in 0..1.

    Returns:
        The mean grade, in 0..9.

    Raises:
        VerdictError: The judge would rather have said something else than a grade.
    """
    grades = {int(digit): float(probability) for digit, probability in json.loads(reply).items()}
    total = sum(grades.values())
    if total < least_share:
        raise VerdictError(f"the judge puts {total:.0%} of its probability on a grade, less than {least_share:.0%}")
    return sum(digit * probability for digit, probability in grades.items()) / total


def _final(reply: str, finish_reason: str | None) -> str | dict[str, Any]:
    """Cut a reply down to what it says last: a JSON object, the bracketed verdict, or the last line."""
    # What the judge thinks is no verdict, and the last thought that it closed ends what it thinks.
    is_json = reply.lstrip().startswith("{")
    end = 0 if is_json else max((reply.rfind(close) + len(close) for close in _CLOSES if close in reply), default=0)
    text = reply[end:].strip()
    if not is_json and _OPENED.search(text):
        way_out = ": raise judge.max_tokens" if finish_reason == "length" else ""
        raise VerdictError(f"the judge's thought did not end (finish reason: {finish_reason}){way_out}")
    if finish_reason not in ("stop", None):
        raise VerdictError(f"the reply did not end by itself (finish reason: {finish_reason})")
    if not text:
        raise VerdictError("nothing follows the reasoning" if end else "the reply is empty")
    fenced = _FENCED.search(text)
    last_line = text.splitlines()[-1].strip()
    for candidate in (text, fenced[1] if fenced else "", last_line):
        if candidate.startswith("{"):
            return _json_object(candidate)
    bracketed = _BRACKETED.search(text)
    if bracketed is None and finish_reason is None:
        # `Score: 8` may be a `Score: 85` that was cut; JSON and brackets are closed or they are none.
        raise VerdictError("the reply has no finish reason, and no verdict in brackets or JSON that shows its end")
    return bracketed[1] if bracketed else last_line


def _json_object(text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise VerdictError("a key stands twice in the JSON reply")
        return dict(pairs)

    try:
        value: dict[str, Any] = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise VerdictError("the reply starts as JSON and is none") from error
    return value


def _field(value: dict[str, Any], name: str) -> object:
    if name not in value:
        raise VerdictError(f"the JSON reply has no {name!r}")
    return value[name]


def _in_range(value: object, name: str) -> int:
    if type(value) is not int:  # not isinstance: true is no score
        raise VerdictError(f"{name} is a JSON {type(value).__name__}, not an integer")
    if not 0 <= value <= 100:
        raise VerdictError(f"{name} is outside 0..100")
    return value
