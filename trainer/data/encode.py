"""Chunks of collected rows -> token ids and labels, checked and fitted.

A chunk's outcome depends on the chunk and the settings alone, so shards have the same bytes however the work is spread.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from trainer.config import LeftOut, ThinkingConfig
from trainer.data.collect import Line, parse_line
from trainer.data.conversation import BadRowError, Conversation
from trainer.data.renderer import Renderer, Segment, Written
from trainer.data.shards import IGNORE
from trainer.data.templates import SpecialTokens, TrainOn
from trainer.data.tokens import EncodedRow, Encoder
from trainer.errors import TrainerError


@dataclass(frozen=True)
class Settings:
    """All that decides what a row becomes; hashable, and small enough to be sent along with every chunk."""

    tokenizer: str
    """Folder of the tokenizer, its template and stop token set."""
    tokenizer_digest: str
    """Tells it from another that stood in the same folder before."""
    train_on: TrainOn
    sequence_length: int
    overlong: Literal["drop", "truncate_response", "truncate_left", "fail"]
    audit: bool
    special_tokens: SpecialTokens = "refuse"
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    left_out: LeftOut = "refuse"
    input_separator: str = "\n\n"
    """The text between an Alpaca row's instruction and its input; written into test rows."""


@dataclass
class EncodedChunk:
    """The rows of a chunk that are kept, and what became of the others."""

    row_ids: list[str] = field(default_factory=list)
    rows: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = field(default_factory=list)
    """Token ids and labels of each."""
    longest: int = 0
    """Tokens of the longest row, before any cut."""
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    """Rows that are kept as they are, and that a person should know of."""
    bad: list[BadRowError] = field(default_factory=list)


@dataclass
class TestChunk:
    """Lines of test.jsonl."""

    lines: list[str] = field(default_factory=list)
    noticed: Counter[str] = field(default_factory=Counter)
    bad: list[BadRowError] = field(default_factory=list)
    num_asked_otherwise: int = 0
    """Rows whose prompt, tokenized as one text as a chat API does it, has other ids than in training."""


_AS_TEXT = "the text spells a special token, tokenized as ordinary letters"


@lru_cache(maxsize=2)
def _tools(settings: Settings) -> tuple[Renderer, Encoder]:
    """A process loads the tokenizer once."""
    from transformers import PreTrainedTokenizerFast  # rows are read and checked before it is loaded

    tokenizer = PreTrainedTokenizerFast.from_pretrained(settings.tokenizer)
    renderer = Renderer(tokenizer, settings.train_on, settings.special_tokens, settings.thinking, settings.left_out)
    return renderer, Encoder(tokenizer)


def encode_chunk(settings: Settings, lines: Sequence[bytes]) -> EncodedChunk:
    """Render, tokenize, mask, check and fit the rows of a chunk.

    Args:
        settings: what decides what a row becomes.
        lines: of the collected file.

    Returns:
        The rows to train on, and counts of the others by reason.

    Raises:
        TrainerError: the audit failed, or a row is too long and may be neither dropped nor cut.
    """
    _, encoder = _tools(settings)
    chunk = EncodedChunk()
    kept, written = _rendered(settings, lines, chunk)
    segments = [one.segments for one in written]
    encoded = encoder.encode(segments)
    if settings.audit:
        audit(kept, segments, encoded, settings)
    chunk.longest = max((row.input_ids.size for row in encoded), default=0)
    for line, row in zip(kept, encoded, strict=True):
        fitted, reason = fit(row, settings, f"{line.file}, row {line.row}")
        if reason is not None:
            (chunk.dropped if fitted is None else chunk.truncated)[reason] += 1
        if fitted is not None:
            chunk.row_ids.append(line.conversation.id)
            chunk.rows.append((row.input_ids[fitted], row.labels[fitted]))
    return chunk


def _rendered(
    settings: Settings, lines: Sequence[bytes], chunk: EncodedChunk | TestChunk
) -> tuple[list[Line], list[Written]]:
    """The rows that the template can write, and their text; notes in the chunk what is to be told of rows."""
    renderer, _ = _tools(settings)
    kept, written = [], []
    for line in map(parse_line, lines):
        try:
            written.append(renderer.written(line.conversation))
            kept.append(line)
        except BadRowError as error:
            chunk.bad.append(error.at(line.file, line.row))
            continue
        chunk.noticed.update(written[-1].notes)
        chunk.noticed[_AS_TEXT] += any(segment.cuts for segment in written[-1].segments)
        for mark in renderer.turn_marks:
            spelled = any(mark in message["content"] for message in line.conversation.messages)
            chunk.noticed[f"the text holds {mark!r}, which the template writes between turns"] += spelled
    return kept, written


def encode_test_chunk(settings: Settings, lines: Sequence[bytes]) -> TestChunk:
    """Lines of test.jsonl: what the models are asked, and the answer they are compared with.

    Args:
        settings: as for training.
        lines: of the collected file.

    Returns:
        One JSON line for each row; its prompt_token_ids are those that the row's training sequence starts with.
    """
    renderer, encoder = _tools(settings)
    chunk = TestChunk()
    kept, written = _rendered(settings, lines, chunk)
    for line, text, row in zip(kept, written, encoder.encode([one.segments for one in written]), strict=True):
        prompt_ids = row.input_ids[: row.num_prompt_tokens].tolist()
        chunk.num_asked_otherwise += encoder.prompt_ids(text.prompt) != prompt_ids
        fields = {
            "id": line.conversation.id,
            "category": line.conversation.category,
            "messages": line.conversation.messages[:-1],
            "prompt": text.prompt,
            "prompt_token_ids": prompt_ids,
            "question": _question(line.conversation),
            "input_separator": settings.input_separator,
        }
        fields |= renderer.test_fields(line.conversation, text)
        chunk.lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    return chunk


def _question(conversation: Conversation) -> str:
    """What the user said, without the system message and the answers: answers made elsewhere are joined by it."""
    return "\n\n".join(message["content"] for message in conversation.messages if message["role"] == "user")


def fit(row: EncodedRow, settings: Settings, where: str) -> tuple[npt.NDArray[np.int64] | None, str | None]:
    """Apply data.overlong to one row.

    Args:
        row: as tokenized.
        settings: its sequence_length is the limit.
        where: the row's place, for the message.

    Returns:
        Positions of the tokens that are kept, or None when the row is dropped; and the reason, or None when the row
        fits as it is. A cut on the left keeps the first token, which may be the begin token.

    Raises:
        TrainerError: the row is too long and data.overlong is fail.
    """
    length, limit = row.input_ids.size, settings.sequence_length
    if length <= limit:
        return np.arange(length), None
    match settings.overlong:
        case "fail":
            raise TrainerError(
                f"{where} has {length} tokens, data.sequence_length is {limit}: raise it, or let data.overlong drop or "
                "cut such rows"
            )
        case "drop":
            return None, "longer than sequence_length"
        case "truncate_response":
            kept = np.arange(limit)
        case "truncate_left":
            kept = np.concatenate([[0], np.arange(length - limit + 1, length)])
    if not np.any(row.labels[kept[1:]] != IGNORE):
        return None, "no target token left after the cut"
    return kept, settings.overlong


def audit(
    lines: Sequence[Line], segments: Sequence[Sequence[Segment]], rows: Sequence[EncodedRow], settings: Settings
) -> None:
    """Check that the ids say what the text says, and that each turn is learned up to its stop token and no further.

    Args:
        lines: for messages.
        segments: of each row.
        rows: the ids and labels that were made of them.
        settings: the tokenizer's folder.

    Raises:
        TrainerError: names the first row that fails, what is wrong, and the way out.
    """
    renderer, encoder = _tools(settings)
    decoded = encoder.decode([row.input_ids for row in rows])
    for line, row_segments, row, text in zip(lines, segments, rows, decoded, strict=True):
        where = f"audit: {line.file}, row {line.row}"
        if not np.any(row.labels[1:] != IGNORE):
            raise TrainerError(f"{where}: no token is a target, so nothing would be learned from the row: take it out")
        written = "".join(segment.text for segment in row_segments)
        if text != written and not _same_letters(text, written, renderer.special):
            at = next((i for i, (a, b) in enumerate(zip(text, written, strict=False)) if a != b), 0)
            raise TrainerError(
                f"{where}: the token ids say something else than the text, from character {at}: "
                f"{text[at : at + 40]!r} instead of {written[at : at + 40]!r}; the tokenizer loses text: choose "
                "another base model, or set data.audit: false if this is meant"
            )
        _check_turns(row_segments, row, renderer, where)


def _check_turns(segments: Sequence[Segment], row: EncodedRow, renderer: Renderer, where: str) -> None:
    """Refuse a turn that does not end with its stop token, or has it inside."""
    ends = np.cumsum(row.segment_tokens)
    first = 0
    for number, segment in enumerate(segments):
        if not segment.in_turn:
            first = number + 1
        if not segment.in_turn or (number + 1 < len(segments) and segments[number + 1].in_turn):
            continue
        turn = row.input_ids[ends[first] - row.segment_tokens[first] : ends[number]]
        stop = next((stop for stop in renderer.writer.ends.all if segment.text.endswith(stop)), renderer.stop_token)
        stop_id = renderer.tokenizer.convert_tokens_to_ids(stop)
        learned = any(part.is_target for part in segments[first : number + 1])
        if learned and (turn[-1] != stop_id or np.count_nonzero(turn == stop_id) != 1):
            raise TrainerError(
                f"{where}: an assistant turn does not end with the one token {stop!r} ({stop_id}), or has it inside, "
                "so the model would not learn to stop: choose another data.template"
            )


def _same_letters(decoded: str, written: str, special: re.Pattern[str]) -> bool:
    """Whether two texts differ only in how Unicode writes a letter, or in the space that SentencePiece puts first.

    It puts one where a text starts, and older tokenizers of the kind also after each special token.
    """
    after_special = re.compile(f"(^|{special.pattern}) +")
    one, other = (after_special.sub(r"\1", unicodedata.normalize("NFC", text)) for text in (decoded, written))
    return one == other
