"""Deterministic comparison of a response with its reference answer. It is not a language model.

It sees words, not meaning: a right answer in other words scores low. Use it where answers are short and exact.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.chrf import CHRF

from evaluation.judges.base import Unit, Verdict
from evaluation.rows import Row, content_key

_WORD = re.compile(r"\w+", re.UNICODE)


def normalise(text: str) -> str:
    """Fold case, Unicode forms, runs of white space, and punctuation at the ends unless there is nothing else.

    >>> normalise("  The  Cat. ")
    'the cat'
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(" .,;:!?\"'`") or folded


def token_f1(response: str, reference: str) -> float:
    """F1 of the two bags of words, in 0..1 (Rajpurkar et al., arXiv 1606.05250).

    Precision is the share of the response's words that the reference has, recall the share of the reference's words
    that the response has; F1 is their harmonic mean. Where one text has no word, only equal texts agree.

    >>> round(token_f1("the black cat", "a black cat"), 3)
    0.667
    """
    ours, theirs = Counter(_WORD.findall(normalise(response))), Counter(_WORD.findall(normalise(reference)))
    if not ours or not theirs:
        return float(normalise(response) == normalise(reference))
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


class ReferenceMeter:
    """Scores responses by words shared with the reference; a `Judge` that asks nobody.

    Attributes:
        name: How the report calls it.
        identity: What its results depend on besides the row.
        repeats: Always 1; asking it again changes nothing.
    """

    name: str
    identity: Row
    repeats: int

    def __init__(self) -> None:
        self.name = "reference"
        self.identity = {"judge": "reference", "version": 1}
        self.repeats = 1

    def key(self, row: Row, repeat: int) -> str:
        """Hash what the verdict on a response depends on."""
        return content_key(self.identity, row["id"], row["sample"], row["reference"], row["response"], repeat)

    def verdicts(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        """Compare each response with its reference: 100 for equal texts, else 100 x token F1 but at most 99."""
        for unit in units:
            response, reference = unit.row["response"], unit.row["reference"]
            exact, f1 = normalise(response) == normalise(reference), token_f1(response, reference)
            score = 100.0 if exact else min(99.0, 100 * f1)
            details = {"exact_match": exact, "token_f1": f1, **overlap(response, reference)}
            yield unit, Verdict("scored", score, details=details)


class LabelMeter:
    """Compares labels: 100 where the response names the reference's label, else 0; a `Judge` that asks nobody.

    Args:
        labels: The legal labels.

    Attributes:
        name: How the report calls it.
        identity: What its results depend on besides the row.
        repeats: Always 1.
        labels: The legal labels, each once.
    """

    name: str
    identity: Row
    repeats: int
    labels: tuple[str, ...]

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = {normalise(label): label for label in labels}
        self.labels = tuple(self._labels.values())
        self.name = "label"
        self.identity = {"judge": "label", "version": 1, "labels": sorted(self._labels)}
        self.repeats = 1

    def key(self, row: Row, repeat: int) -> str:
        """Hash what the verdict on a response depends on."""
        return content_key(self.identity, row["id"], row["sample"], row["reference"], row["response"], repeat)

    def verdicts(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        """Read each response as one of the labels. What is none of them is wrong, and counted as such."""
        for unit in units:
            expected = self._labels.get(normalise(unit.row["reference"]))
            if expected is None:
                cause = f"the reference {unit.row['reference'][:40]!r} is none of judge.labels"
                yield unit, Verdict("judge_failed", cause=cause)
                continue
            given = self._labels.get(normalise(unit.row["response"]))
            yield unit, Verdict("scored", 100.0 * (given == expected), details={"expected": expected, "given": given})


def overlap(response: str, reference: str) -> dict[str, float]:
    """ROUGE-L F1 (Lin, 2004; of the `rouge-score` library) in 0..1, and chrF (Popović, 2015; of sacreBLEU) in 0..100.

    ROUGE-L's tokenizer knows Latin letters and digits only; chrF compares characters and works for every script.
    """
    rouge = RougeScorer(["rougeL"]).score(reference, response)["rougeL"].fmeasure
    return {"rouge_l": float(rouge), "chrf": float(CHRF().sentence_score(response, [reference]).score)}
