"""The prepare stage: files of instructions -> packed shards, the test set, a tokenizer and a summary.

Rows pass through one at a time: they are collected into one checked file, split, compared for leaks, then rendered,
tokenized and packed. What stays in memory is about a hundred bytes for each row, and a kilobyte for each test row.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trainer.config import DataConfig, TrainerConfig
from trainer.data.collect import Collected, Rejected, collect, parse_line
from trainer.data.conversation import BadRowError
from trainer.data.encode import Settings, encode_chunk, encode_test_chunk
from trainer.data.fingerprint import fingerprint, tokenizer_digest
from trainer.data.names import is_hub_id, missing
from trainer.data.new_tokens import write_new_tokens
from trainer.data.renderer import Renderer
from trainer.data.shards import IGNORE, PackedSplit, SplitWriter
from trainer.data.splits import Rows, assign_splits, repeat_by_weight
from trainer.data.spread import ChunkMap, LocalMap, chunked
from trainer.data.templates import input_separator
from trainer.data.tokenizer import (
    load_tokenizer,
    scratch_special_tokens,
    scratch_tokenizer,
    tokenizer_place,
    train_tokenizer,
)
from trainer.errors import TrainerError

if TYPE_CHECKING:  # rows are read and checked before these are loaded: transformers takes seconds, with torch many more
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from trainer.data.leaks import Leaks

_ROWS_FOR_ONE_PROCESS = 20_000


def prepare(config: TrainerConfig, run_dir: Path, *, map_chunks: ChunkMap | None = None) -> dict[str, Any]:
    """Write run_dir/data, and run_dir/base for a model from scratch.

    Everything is written beside its place and moved there at the end: a killed run leaves nothing half done. Where the
    same input has been prepared before, in this folder or in data.cache, that is taken.

    Args:
        config: its model, data and seed are used.
        run_dir: the run's folder.
        map_chunks: renders and tokenizes chunks of rows elsewhere; None means in this machine's processes.

    Returns:
        The summary that also lies in data/summary.json.

    Raises:
        TrainerError: the data, or what the configuration says about it, cannot be used.
    """
    data = _pinned(config.data)
    config = config.model_copy(update={"data": data})
    digest = fingerprint(config, data)
    stored = data.cache / digest if data.cache and _is_fixed(config) else None
    if _is_fixed(config):
        if (found := _summary_of(run_dir, digest, config)) is not None:
            return found
        if stored and (found := _summary_of(stored, digest, config)) is not None:
            _copy(stored, run_dir)
            return found
    folder = run_dir / "data.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    summary = _prepare(config, folder, run_dir, map_chunks) | {"fingerprint": digest}
    written = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "summary.json").write_text(written + "\n", encoding="utf-8")
    _replace(folder, run_dir / "data")
    if stored:
        _copy(run_dir, stored)
    return summary


def _pinned(data: DataConfig) -> DataConfig:
    """The data section with every hub source at a commit; every other source must be there."""
    for path in (*data.local_paths, *(Path(s.path) for s in data.all_sources if not is_hub_id(s.path))):
        if not path.exists():
            raise TrainerError(f"data: {missing(path)}")
    if not any(is_hub_id(source.path) for source in data.all_sources):
        return data
    from trainer.data.hub import pin  # loads the datasets library

    sources = tuple(pin(source) if is_hub_id(source.path) else source for source in data.all_sources)
    return data.model_copy(update={"path": None, "sources": sources})


def _is_fixed(config: TrainerConfig) -> bool:
    """Whether the base's tokenizer cannot change under the same name: what a branch on the hub holds, can."""
    model = config.model
    local = model.name_or_path is None or Path(model.name_or_path).is_dir()
    if local:
        return True
    from trainer.hub import is_commit  # loads the hub's client

    return is_commit(model.revision)


def _summary_of(folder: Path, digest: str, config: TrainerConfig) -> dict[str, Any] | None:
    """The summary of a folder whose data has this fingerprint and whose base is there where one is needed."""
    path = folder / "data" / "summary.json"
    if not path.exists() or (config.model.from_scratch and not (folder / "base" / "config.json").exists()):
        return None
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary if summary.get("fingerprint") == digest else None


def _copy(source: Path, target: Path) -> None:
    """Put another folder's base and data into this one, data last; the same disk holds the bytes only once."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(one, other)

    target.mkdir(parents=True, exist_ok=True)
    for name in ("base", "data"):
        if (source / name).exists():
            unfinished = target / f"{name}.partial"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(source / name, unfinished, copy_function=link)
            _replace(unfinished, target / name)


def _replace(unfinished: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)
    unfinished.replace(final)


def _prepare(config: TrainerConfig, folder: Path, run_dir: Path, map_chunks: ChunkMap | None) -> dict[str, Any]:
    """Write the folder, and run_dir/base for a model from scratch; return the summary."""
    data = config.data
    place = check_base(config)
    rejected = Rejected(folder / "rejected.jsonl", skip=data.on_bad_row == "skip")
    collected = collect(data, config.seed, folder / "rows.jsonl", rejected)
    base_tokenizer = load_tokenizer(config.model, data, place) if place else None
    with LocalMap(_num_processes(data, collected.num_rows)) as on_this_machine:
        preparation = Preparation(config, folder, collected, rejected, map_chunks or on_this_machine)
        splits, leaks = preparation.split()
        tokenizer = preparation.learn_tokenizer(splits["train"]) if base_tokenizer is None else base_tokenizer
        tokenizer.save_pretrained(folder / "tokenizer")
        write_new_tokens(config.model, tokenizer, folder)
        summary = preparation.write(splits, tokenizer)
    collected.path.unlink()
    if config.model.from_scratch:
        _build_base(config, tokenizer, run_dir)
    return summary | {"leaks": leaks.as_json()}


def check_base(config: TrainerConfig) -> Path | None:
    """Refuse a base that can't be; the folder of its tokenizer, or None for one from scratch. Loads no library."""
    data, scratch = config.data, config.model.from_scratch
    if scratch is None:
        return tokenizer_place(config.model)
    if data.sequence_length > scratch.max_position_embeddings:
        raise TrainerError(
            f"data.sequence_length is {data.sequence_length}, model.from_scratch.max_position_embeddings only "
            f"{scratch.max_position_embeddings}: lower the one or raise the other"
        )
    scratch_special_tokens(data.template)
    return None


def _num_processes(data: DataConfig, num_rows: int) -> int:
    """Processes for so many rows: a few thousand are done before another process has started."""
    return data.num_processes or (len(os.sched_getaffinity(0)) if num_rows > _ROWS_FOR_ONE_PROCESS else 1)


def _build_base(config: TrainerConfig, tokenizer: PreTrainedTokenizerBase, run_dir: Path) -> None:
    from trainer.scratch import build_from_scratch  # loads torch and the model classes

    assert config.model.from_scratch is not None  # noqa: S101 - the caller asked
    unfinished = run_dir / "base.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    build_from_scratch(config.model.from_scratch, tokenizer, config.seed, unfinished)
    _replace(unfinished, run_dir / "base")


@dataclass(frozen=True)
class Preparation:
    """One run of the stage, after the rows were collected; its methods are the steps."""

    config: TrainerConfig
    folder: Path
    collected: Collected
    rejected: Rejected
    map_chunks: ChunkMap

    def split(self) -> tuple[dict[str, Rows], Leaks]:
        """The rows of each split, train rows as often as they are seen in an epoch; and what test rows they repeat."""
        from trainer.data.leaks import find_leaks  # loads scipy

        data, seed = self.config.data, self.config.seed
        splits = assign_splits(self.collected, data.split, seed)
        splits["test"] = splits["test"][: data.max_test_rows]
        leaks = find_leaks(self.collected, splits["train"], splits["test"], data.leak_similarity, self.map_chunks)
        found = np.array(sorted(leaks.exact + leaks.near), dtype=np.int64)
        if found.size and data.leaks == "fail":
            raise TrainerError(
                f"{found.size} train rows repeat {len(leaks.test_rows)} test rows ({len(leaks.exact)} the question, "
                f"the others nearly all): {json.dumps(leaks.examples[0], ensure_ascii=False)}. Take them out, or set "
                "data.leaks: drop"
            )
        if data.leaks == "drop":
            splits["train"] = np.setdiff1d(splits["train"], found)
        weights = [source.weight for source in data.all_sources]
        splits["train"] = repeat_by_weight(splits["train"], self.collected.sources, weights, seed)
        return splits, leaks

    def learn_tokenizer(self, train: Rows) -> PreTrainedTokenizerBase:
        """A tokenizer of the train rows; rows that the template refuses are told when they are tokenized."""
        data, scratch = self.config.data, self.config.model.from_scratch
        assert scratch is not None  # noqa: S101 - the caller asked
        renderer = Renderer(
            scratch_tokenizer(data.template), data.train_on, data.special_tokens, data.thinking, data.left_out
        )

        def texts() -> Iterator[str]:
            for line in self.collected.lines(np.unique(train)):
                with suppress(BadRowError):
                    for segment in renderer.segments(parse_line(line).conversation):
                        yield segment.text.replace(renderer.stop_token, "")

        return train_tokenizer(texts(), data.template, scratch.vocab_size, self.config.model.new_tokens)

    def settings(self) -> Settings:
        """All that decides what a row becomes, once the tokenizer has been saved."""
        data = self.config.data
        return Settings(
            tokenizer=str(self.folder / "tokenizer"),
            tokenizer_digest=tokenizer_digest(self.folder / "tokenizer"),
            train_on=data.train_on,
            sequence_length=data.sequence_length,
            overlong=data.overlong,
            audit=data.audit,
            special_tokens=data.special_tokens,
            thinking=data.thinking,
            left_out=data.left_out,
            input_separator=input_separator(data.template),
        )

    def write(self, splits: dict[str, Rows], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Write the shards and the test set; return the summary."""
        data, settings = self.config.data, self.settings()
        tally = Tally()
        writers = {name: self.encode(settings, name, splits[name], tally) for name in ("train", "validation")}
        num_test = self.write_test(settings, splits["test"], tally)
        self.rejected.check()
        dropped = dict(tally.dropped + self.rejected.counts)
        counts = {
            name: writer.finish(
                sequence_length=data.sequence_length,
                packing=data.packing,
                pad_token_id=tokenizer.pad_token_id,
                seed=self.config.seed,
            )
            for name, writer in writers.items()
        } | {"test": {"rows": num_test}}
        if empty := [name for name, split in counts.items() if not split["rows"]]:
            raise TrainerError(f"every {empty[0]} row was left out ({dropped})")
        return {
            **self._asked(),
            "vocab_size": len(tokenizer),
            "stop_token": tokenizer.eos_token,
            "splits": counts,
            "longest_row_tokens": tally.longest,
            "dropped": dropped,
            "truncated": dict(tally.truncated),
            "noticed": dict(+(tally.noticed + self.collected.fields.noticed)),
            "unknown_fields": self.collected.fields.unknown if data.unknown_fields != "ignore" else {},
            "test_prompts_a_chat_api_tokenizes_otherwise": tally.asked_otherwise,
        }

    def _asked(self) -> dict[str, Any]:
        """The summary's part that tells what was read and how."""
        data, formats = self.config.data, self.collected.formats
        return {
            "format": ", ".join(dict.fromkeys(formats)),
            "template": data.template,
            "template_name": data.template_name,
            "template_kwargs": data.template_kwargs,
            "thinking": data.thinking.model_dump(),
            "train_on": data.train_on,
            "special_tokens": data.special_tokens,
            "sequence_length": data.sequence_length,
            "audited": data.audit,
            "notes": list(self.collected.notes),
            "sources": [
                {"path": source.path, "format": form, "revision": source.revision}
                for source, form in zip(data.all_sources, formats, strict=False)
            ],
        }

    def encode(self, settings: Settings, name: str, rows: Rows, tally: Tally) -> SplitWriter:
        """Write the tokens of a split; its packs are planned when the writer finishes."""
        writer = SplitWriter(self.folder / name)
        lines = chunked(self.collected.lines(np.sort(rows)))
        for chunk in self.map_chunks(partial(encode_chunk, settings), lines):
            for error in chunk.bad:
                self.rejected.add(error)
            tally.longest = max(tally.longest, chunk.longest)
            tally.dropped.update(chunk.dropped)
            tally.truncated.update(chunk.truncated)
            tally.noticed.update(chunk.noticed)
            writer.add_rows(chunk.row_ids, chunk.rows)
        return writer

    def write_test(self, settings: Settings, rows: Rows, tally: Tally) -> int:
        """Write test.jsonl; returns its rows."""
        num_rows = 0
        lines = chunked(self.collected.lines(np.sort(rows)))
        with (self.folder / "test.jsonl").open("w", encoding="utf-8") as file:
            for chunk in self.map_chunks(partial(encode_test_chunk, settings), lines):
                for error in chunk.bad:
                    self.rejected.add(error)
                tally.noticed.update(chunk.noticed)
                tally.asked_otherwise += chunk.num_asked_otherwise
                file.writelines(chunk.lines)
                num_rows += len(chunk.lines)
        return num_rows


@dataclass
class Tally:
    """What became of rows, counted by reason."""

    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    asked_otherwise: int = 0


def show(config: TrainerConfig, run_dir: Path, n: int, console: Console) -> None:
    """Print rows of the prepared train split: what carries loss plain, what is masked dim.

    Args:
        config: of the run.
        run_dir: a run whose data has been prepared.
        n: rows printed, the first ones.
        console: printed to.

    Raises:
        TrainerError: the data has not been prepared.
    """
    from transformers import PreTrainedTokenizerFast

    split = PackedSplit.open(run_dir / "data" / "train")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run_dir / "data" / "tokenizer")
    for row in range(min(n, split.num_rows)):
        input_ids, labels = split.row_tokens(row)
        num_targets = int(np.count_nonzero(labels != IGNORE))
        console.rule(f"{split.row_id(row)}: {input_ids.size} tokens, {num_targets} targets")
        console.print(_as_text(tokenizer, input_ids, labels, bracketed=not console.is_terminal))
    styles = "plain: trained on; dim: masked; reversed: special token"
    legend = styles if console.is_terminal else "⟦trained on⟧, the rest is masked"
    console.print(f"{legend} (data.train_on: {config.data.train_on})")


def _as_text(
    tokenizer: PreTrainedTokenizerBase,
    input_ids: npt.NDArray[np.int32],
    labels: npt.NDArray[np.int32],
    *,
    bracketed: bool,
) -> Text:
    """The row's text with a style for each token; control characters are written as escapes.

    Where there are no styles, as in a file, targets stand in brackets.
    """
    from rich.text import Text

    special = np.isin(input_ids, [*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids])
    masked = labels == IGNORE
    # Runs of one style are decoded together: a character may be several tokens.
    edges = np.flatnonzero((np.diff(special) != 0) | (np.diff(masked) != 0)) + 1
    text = Text()
    was_masked = True
    for run in np.split(np.arange(input_ids.size), edges):
        is_masked = bool(masked[run[0]])
        if bracketed and is_masked != was_masked:
            text.append("⟧" if is_masked else "⟦")
        was_masked = is_masked
        style = ("dim " if is_masked else "") + ("reverse" if special[run[0]] else "")
        text.append(_escaped(str(tokenizer.decode(input_ids[run]))), style=style.strip())
    return text.append("⟧") if bracketed and not was_masked else text


def _escaped(text: str) -> str:
    """Newlines stay, and are shown; what else could move the cursor or hide text is written as an escape."""
    return "".join(
        "\\n\n" if char == "\n" else char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )
