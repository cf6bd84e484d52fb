"""Classification: labels given against labels expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.errors import EvaluationError


@dataclass(frozen=True)
class Classification:
    """How labels given meet labels expected; shares in 0..1.

    `f1` has the labels that are expected at least once. `confusion[i][j]` counts rows expected to be `labels[i]` and
    given `labels[j]`, its last column those given none of them.
    """

    num: int
    labels: tuple[str, ...]
    accuracy: float
    macro_f1: float
    micro_f1: float
    f1: dict[str, float]
    confusion: tuple[tuple[int, ...], ...]


def classification(expected: Sequence[str], given: Sequence[str | None]) -> Classification | None:
    """Accuracy, F1 and the confusion matrix of single-label classification.

    F1 of a label is 2 x right / (times given + times expected). Macro F1 is its mean over the labels that are expected;
    micro F1 pools the counts of all labels, so that a row given no label costs recall alone.

    Args:
        expected: The right label of each of n rows.
        given: The label given, None where it is no legal label.

    Returns:
        The measures; None of no rows.

    Raises:
        EvaluationError: The lists differ in length.
    """
    if len(expected) != len(given):
        raise EvaluationError(f"{len(expected)} expected labels meet {len(given)} given ones; give each row both")
    if not expected:
        return None
    labels = tuple(sorted({*expected, *(label for label in given if label is not None)}))
    number: dict[str | None, int] = {label: index for index, label in enumerate(labels)}
    table = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
    for right, said in zip(expected, given, strict=True):
        table[number[right], number.get(said, len(labels))] += 1
    hits = np.diag(table[:, :-1])
    asked, said_often = table.sum(1), table[:, :-1].sum(0)
    f1 = {label: float(2 * hits[i] / (asked[i] + said_often[i])) for i, label in enumerate(labels) if asked[i]}
    correct = int(hits.sum())
    return Classification(
        num=len(expected),
        labels=labels,
        accuracy=correct / len(expected),
        macro_f1=sum(f1.values()) / len(f1),
        micro_f1=2 * correct / (len(expected) + int(said_often.sum())),
        f1=f1,
        confusion=tuple(tuple(int(cell) for cell in row) for row in table),
    )
