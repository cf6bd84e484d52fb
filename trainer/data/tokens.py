"""Segments -> token ids and labels, born together: the only place that masks.

Every segment is tokenized by itself, so a token never reaches over the place where an answer starts: the prompt that a
model is asked with is, token for token, the beginning of what it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trainer.data.renderer import Segment
from trainer.data.shards import IGNORE
from trainer.errors import TrainerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Json = dict[str, "_Json"] | list["_Json"] | str | float | bool | None


@dataclass(frozen=True)
class EncodedRow:
    """One row: token ids, and beside each the same id where it is a target, else -100; shape [length]."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    segment_tokens: tuple[int, ...]
    """Tokens of each segment."""
    num_prompt_tokens: int
    """Tokens before the last turn starts: what a model is asked with."""


class Encoder:
    """Tokenizes segments.

    A tokenizer of the SentencePiece kind marks the start of a text as if a space stood before it. An answer starts no
    text, so it goes through a copy of the tokenizer that does not do this. What follows an answer is tokenized after
    the stop token, as it stands there in the whole text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TrainerError(f"{type(tokenizer).__name__} has no fast tokenizer (tokenizer.json), which is needed")
        self._first = Tokenizer.from_str(backend.to_str())
        self._first.no_padding()
        self._first.no_truncation()
        described = json.loads(self._first.to_str())
        without = _without_prefix(described)
        self._answers = self._first if without == described else Tokenizer.from_str(json.dumps(without))
        self._before_context = "" if without == described else str(tokenizer.eos_token)

    def encode(self, rows: Sequence[Sequence[Segment]]) -> list[EncodedRow]:
        """Token ids and labels of many rows at once, on all cores.

        Worked example: segments ("Q: 1+1 A: ", no target) and ("2<eos>", target) with ids [5, 6, 7] and [8, 2] give
        input_ids [5, 6, 7, 8, 2] and labels [-100, -100, -100, 8, 2].

        Args:
            rows: the segments of each row; the first one is context.

        Returns:
            One row for each.
        """
        starts = iter(self._ids(self._first, [row[0].pieces[0] for row in rows]))
        between = [self._before_context + b.pieces[0] for row in rows for a, b in pairwise(row) if _is_context(a, b)]
        contexts = iter(self._ids(self._first, between))
        inner = iter(
            self._ids(self._answers, [b.pieces[0] for row in rows for a, b in pairwise(row) if not _is_context(a, b)])
        )
        # What follows a cut starts no text either.
        after_cuts = iter(
            self._ids(self._answers, [piece for row in rows for segment in row for piece in segment.pieces[1:]])
        )
        encoded = []
        for row in rows:
            pieces = [next(starts)]
            for before, segment in pairwise(row):
                is_context = _is_context(before, segment)
                pieces.append(next(contexts)[bool(self._before_context) :] if is_context else next(inner))
            for piece, segment in zip(pieces, row, strict=True):
                piece.extend(chain.from_iterable(next(after_cuts) for _ in segment.cuts))
            input_ids = np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces])
            lengths = [len(piece) for piece in pieces]
            is_target = np.repeat([segment.is_target for segment in row], lengths)
            labels = np.where(is_target, input_ids, IGNORE).astype(np.int32)
            last_context = max(number for number, segment in enumerate(row) if not segment.in_turn)
            encoded.append(EncodedRow(input_ids, labels, tuple(lengths), sum(lengths[: last_context + 1])))
        return encoded

    @staticmethod
    def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt as one text, the way a chat API makes them."""
        return list(self._first.encode(prompt, add_special_tokens=False).ids)

    def decode(self, rows: Sequence[npt.NDArray[np.int32]]) -> list[str]:
        """The text of each row's ids, special tokens included."""
        return self._first.decode_batch([row.tolist() for row in rows], skip_special_tokens=False)


def _is_context(before: Segment, segment: Segment) -> bool:
    """Whether a segment follows an assistant's turn, and so a stop token."""
    return before.in_turn and not segment.in_turn


def _without_prefix(part: _Json) -> _Json:
    """A part of a tokenizer's JSON, changed so that it puts no space before a text."""
    if isinstance(part, list):
        return [kept for kept in map(_without_prefix, part) if kept is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    changed = {key: value if key == "model" else _without_prefix(value) for key, value in part.items()}
    if part.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in part:
        changed["add_prefix_space"] = False
    return changed
