"""Test rows that the train rows repeat: the same question, or nearly the same conversation.

Near duplicates are rows whose sets of five-character pieces have a Jaccard similarity of at least the limit. MinHash
(Broder, 1997) with locality-sensitive hashing finds the candidates; each candidate's true similarity decides.

Memory holds less than a kilobyte for each test row (data.max_test_rows bounds them), and a chunk of train rows.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

from trainer.data.collect import Collected, parse_line
from trainer.data.conversation import Conversation
from trainer.data.spread import ChunkMap, chunked

_PIECE = 5  # characters
_PERMUTATIONS = 64
_PIECES_AT_ONCE = 10_000
_MARGIN = 0.1  # the index seeks candidates this much below the limit, since it only estimates
_ERROR = 0.15  # three standard errors of an estimate near 0.8 from 64 permutations
_MISSES_WEIGH = (0.02, 0.98)  # a candidate too many costs a comparison, a miss is a leak: 99.9% are found at the limit
_EXAMPLES = 5
# Where test rows are much alike, so many of those that share a band with a train row are estimated, and so many of the
# most similar by estimate are compared; one that is similar enough makes a leak.
_MOST_ESTIMATED = 100
_MOST_COMPARED = 5
_KEPT_ROWS = 10_000  # test rows whose pieces are kept for the next comparison
_SPACE = re.compile(r"\s+")

Rows = npt.NDArray[np.int64]


@dataclass
class Leaks:
    """Train rows that repeat a test row."""

    exact: list[int] = field(default_factory=list)
    """Train rows whose question is a test row's, after normalisation."""
    near: list[int] = field(default_factory=list)
    """Train rows that are nearly a test row, and not exact."""
    test_rows: set[int] = field(default_factory=set)
    """Test rows that are repeated."""
    examples: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the summary."""
        return {
            "exact_train_rows": len(self.exact),
            "near_train_rows": len(self.near),
            "test_rows": len(self.test_rows),
            "examples": self.examples,
        }


@dataclass(frozen=True)
class Sketches:
    """What is compared of some rows."""

    questions: npt.NDArray[np.uint64]
    """A digest of each row's question, shape [num_rows]."""
    min_hashes: npt.NDArray[np.uint32]
    """Shape [num_rows, permutations]; two rows agree in a share of them that estimates their similarity."""


def sketch_chunk(lines: Sequence[bytes]) -> Sketches:
    """Sketch the rows of a chunk.

    Args:
        lines: of the collected file.

    Returns:
        One sketch for each.
    """
    conversations = [parse_line(line).conversation for line in lines]
    return Sketches(
        np.array([_question(conversation) for conversation in conversations], dtype=np.uint64),
        np.array([_min_hash(_pieces(conversation)) for conversation in conversations], dtype=np.uint32),
    )


def find_leaks(collected: Collected, train: Rows, test: Rows, similarity: float, map_chunks: ChunkMap) -> Leaks:
    """Compare every train row with the test rows.

    Args:
        collected: all rows.
        train: numbers of the train rows.
        test: numbers of the test rows.
        similarity: Jaccard similarity from which two rows are near duplicates.
        map_chunks: sketches chunks of rows.

    Returns:
        The train rows in question, with a few examples.
    """
    train, test = np.sort(train), np.sort(test)
    index = _Index(list(map_chunks(sketch_chunk, chunked(collected.lines(test)))), similarity)
    pieces_of = lru_cache(_KEPT_ROWS)(lambda row: _pieces(_conversation(collected, int(test[row]))))
    leaks, at = Leaks(), 0
    for sketches in map_chunks(sketch_chunk, chunked(collected.lines(train))):
        exact = index.same_questions(sketches.questions)
        near = index.candidates(sketches.min_hashes)
        for number in sorted({*near, *np.flatnonzero(exact >= 0).tolist()}):
            row = int(train[at + number])
            same = int(exact[number])
            found, best = _most_similar(_conversation(collected, row), near[number] if same < 0 else [same], pieces_of)
            if same < 0 and found < similarity:
                continue
            (leaks.near if same < 0 else leaks.exact).append(row)
            leaks.test_rows.add(int(test[best]))
            if len(leaks.examples) < _EXAMPLES:
                leaks.examples.append(_example(collected, row, int(test[best]), found, same >= 0))
        at += sketches.questions.size
    return leaks


def _most_similar(
    conversation: Conversation, candidates: Sequence[int], pieces_of: Callable[[int], npt.NDArray[np.uint32]]
) -> tuple[float, int]:
    """The highest true similarity, and the candidate that has it."""
    own = _pieces(conversation)
    return max((_jaccard(own, pieces_of(candidate)), candidate) for candidate in candidates)


def _example(collected: Collected, train: int, test: int, similarity: float, same_question: bool) -> dict[str, Any]:
    one, other = (_conversation(collected, row) for row in (train, test))
    return {
        "train": one.id,
        "test": other.id,
        "similarity": round(similarity, 3),
        "same_question": same_question,
        "train_question": one.messages[-2]["content"][:200],
        "test_question": other.messages[-2]["content"][:200],
    }


@dataclass(frozen=True)
class _Sorted:
    """Test rows in the order of a key."""

    keys: npt.NDArray[np.uint64]
    rows: Rows

    @classmethod
    def of(cls, keys: npt.NDArray[np.uint64]) -> _Sorted:
        rows = np.argsort(keys, kind="stable")
        return cls(keys[rows], rows)

    def pairs(self, keys: npt.NDArray[np.uint64], most: int) -> tuple[Rows, Rows]:
        """Numbers of the keys that test rows have, and these rows; so many rows of each key at most."""
        starts = np.searchsorted(self.keys, keys, side="left")
        counts = np.minimum(np.searchsorted(self.keys, keys, side="right") - starts, most)
        numbers = np.repeat(np.arange(keys.size), counts)
        within = np.arange(numbers.size) - np.repeat(np.cumsum(counts) - counts, counts)
        return numbers, self.rows[np.repeat(starts, counts) + within]


class _Index:
    """The test rows, to be looked up by their question and by bands of min-hashes.

    Rows that agree in all min-hashes of one band are candidates. datasketch says how many bands there are of how many
    min-hashes; its own index takes kilobytes of dictionaries for each row.
    """

    def __init__(self, test: Sequence[Sketches], similarity: float) -> None:
        least = max(similarity - _MARGIN, 0.05)
        chosen = MinHashLSH(threshold=least, num_perm=_PERMUTATIONS, weights=_MISSES_WEIGH)
        self._shape = chosen.b, chosen.r
        self._least = similarity - _ERROR
        self._min_hashes = np.concatenate([chunk.min_hashes for chunk in test])
        self._by_question = _Sorted.of(np.concatenate([chunk.questions for chunk in test]))
        self._by_band = [_Sorted.of(keys) for keys in self._band_keys(self._min_hashes)]

    def _band_keys(self, min_hashes: npt.NDArray[np.uint32]) -> Iterator[npt.NDArray[np.uint64]]:
        """A key for each row, band by band."""
        num_bands, width = self._shape
        for band in range(num_bands):
            keys = np.zeros(len(min_hashes), dtype=np.uint64)
            for column in range(band * width, (band + 1) * width):
                keys = keys * np.uint64(0x9E3779B97F4A7C15) + min_hashes[:, column]
            yield keys

    def same_questions(self, questions: npt.NDArray[np.uint64]) -> Rows:
        """For each question a test row that asks the same, or -1."""
        found = np.full(questions.size, -1)
        numbers, rows = self._by_question.pairs(questions, 1)
        found[numbers] = rows
        return found

    def candidates(self, min_hashes: npt.NDArray[np.uint32]) -> dict[int, list[int]]:
        """Test rows that may be near duplicates of a row, the most similar by estimate, for rows that have any."""
        pairs = [
            index.pairs(keys, _MOST_ESTIMATED)
            for index, keys in zip(self._by_band, self._band_keys(min_hashes), strict=True)
        ]
        numbers, rows = np.unique(np.concatenate([np.stack(pair) for pair in pairs], axis=1), axis=1)
        estimates = np.mean(min_hashes[numbers] == self._min_hashes[rows], axis=1)
        order = np.flatnonzero(estimates >= self._least)
        order = order[np.argsort(-estimates[order], kind="stable")]
        found: dict[int, list[int]] = {}
        for number, row in zip(numbers[order].tolist(), rows[order].tolist(), strict=True):
            if len(best := found.setdefault(number, [])) < _MOST_COMPARED:
                best.append(row)
        return found


def _conversation(collected: Collected, row: int) -> Conversation:
    (line,) = collected.lines(np.array([row]))
    return parse_line(line).conversation


def normalised(texts: Iterable[str]) -> str:
    """Texts without differences of case, of white space, and of how Unicode writes the same letter."""
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", "\n".join(texts)).casefold()).strip()


def _question(conversation: Conversation) -> int:
    """A 64-bit digest of all that stands before the last answer."""
    said = (f"{message['role']}: {message['content']}" for message in conversation.messages[:-1])
    return int.from_bytes(hashlib.blake2b(normalised(said).encode(), digest_size=8).digest())


def _pieces(conversation: Conversation) -> npt.NDArray[np.uint32]:
    """Hashes of the distinct five-character pieces of a conversation, in ascending order."""
    text = normalised(message["content"] for message in conversation.messages)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    # A polynomial over the characters, modulo 2**32; a short text is one piece.
    hashes = np.zeros(max(codes.size - _PIECE + 1, 1), dtype=np.uint32)
    for offset in range(min(_PIECE, codes.size)):
        hashes = hashes * np.uint32(16_777_619) + codes[offset : offset + hashes.size]
    hashes.sort()  # np.unique takes several times as long on so few
    first = np.ones(hashes.size, dtype=bool)
    first[1:] = hashes[1:] != hashes[:-1]
    distinct: npt.NDArray[np.uint32] = hashes[first]
    return distinct


@cache
def _empty_sketch() -> MinHash:
    """Its copies share the permutations, which cost more to draw than to apply."""
    return MinHash(num_perm=_PERMUTATIONS, hashfunc=int)


def _min_hash(pieces: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    sketch = _empty_sketch().copy()
    for start in range(0, pieces.size, _PIECES_AT_ONCE):  # each takes a kilobyte while it is hashed
        sketch.update_batch(pieces[start : start + _PIECES_AT_ONCE].tolist())
    return np.asarray(sketch.hashvalues, dtype=np.uint32)


def _jaccard(one: npt.NDArray[np.uint32], other: npt.NDArray[np.uint32]) -> float:
    common = np.intersect1d(one, other, assume_unique=True).size
    return float(common / (one.size + other.size - common))
