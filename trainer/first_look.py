"""What the prepare stage would refuse, seen within seconds: the first rows, the template and the tokenizer.

The stage's own code reads, renders and tokenizes the first rows of each source into a temporary folder. torch is not
loaded, and transformers only where the rows can be read.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainer.config import DataConfig, FileSplit, RatioSplit, SourceConfig, TrainerConfig
from trainer.data.collect import Collected, FirstRows, Rejected, collect
from trainer.data.fields import unknown_lines
from trainer.data.names import is_hub_id, near
from trainer.data.splits import assign_splits
from trainer.data.spread import LocalMap
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import TrainerError
from trainer.prepare import Preparation, Tally, check_base

_ROWS = 100
_BYTES = 8 << 20  # of a source, as text
_SECONDS = 1.0  # CPU time of reading a source
_TEST_ROWS = 20
_ANY_LENGTH = 1 << 30  # tokens


def first_look(config: TrainerConfig, base: Path | None) -> dict[str, list[str]]:
    """Look at what prepare would read first.

    Args:
        config: Of the trainer; its local sources exist.
        base: The base model's folder, in place or in the hub's cache; None where it is from scratch or not here.

    Returns:
        `problems`, which prepare would refuse, and `notes`, which a person should know; a line for each.
    """
    look = _Look(config)
    with tempfile.TemporaryDirectory(prefix="first-look-") as folder:
        try:
            collected = look.rows(Path(folder))
            if not look.problems:
                look.text(Path(folder), collected, base)
        except TrainerError as error:
            look.problems.append(str(error))
    return {"problems": list(dict.fromkeys(look.problems)), "notes": list(dict.fromkeys(look.notes))}


@dataclass
class _Look:
    """What has been seen."""

    config: TrainerConfig
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_complete: bool = True
    """Whether all rows were looked at."""
    num_rows: int = 0
    """Rows that were looked at."""

    def rows(self, folder: Path) -> Collected | None:
        """Read the first rows of each source that is here, and split them where they are all."""
        data, seed = self.config.data, self.config.seed
        here = [source for source in data.all_sources if not is_hub_id(source.path)]
        for source in data.all_sources:
            if source not in here:
                self.is_complete = False
                self.notes.append(
                    f"{source.path} is taken as a hub id: prepare downloads its rows, they were not looked at"
                    + near(Path(source.path))
                )
        apart, together = (Rejected(folder / "rejected.jsonl", skip=True) for _ in range(2))
        readable = [read for source in here if (read := self._source(source, folder, apart))]
        if self.problems or not readable:
            self._bad_rows(apart)
            return None
        collected = _collect(_with_sources(data, readable), seed, folder, together, _first_rows())
        # Together they may repeat an id; of a source without a usable row they have none.
        self._bad_rows(max(apart, together, key=lambda rejected: rejected.counts["bad row"]))
        of = "all" if self.is_complete else "the first"
        forms = ", ".join(dict.fromkeys(collected.formats))
        self.notes.append(f"{of} {self.num_rows:,} rows were looked at: {forms}")
        self.notes += collected.notes
        if data.unknown_fields != "ignore":
            self.notes += unknown_lines(collected.fields.unknown)
        self.notes += [f"{count:,} of them: {reason}" for reason, count in collected.fields.noticed.items()]
        if self.is_complete and not self.problems:
            assign_splits(collected, data.split, seed)
        return collected

    def _source(self, source: SourceConfig, folder: Path, rejected: Rejected) -> SourceConfig | None:
        """Look at one source by itself, so that each one's problem is found.

        Args:
            source: One that is here.
            folder: Temporary.
            rejected: Takes its bad rows.

        Returns:
            The source, without the number of rows that its first ones need not reach; None where no row was usable.
        """
        data = self.config.data
        whole = source.model_copy(update={"num_rows": None})
        if source != data.all_sources[0] and isinstance(data.split, FileSplit):
            data = data.model_copy(update={"split": RatioSplit()})  # its files: with the first source
        first, before = _first_rows(), rejected.counts["bad row"]
        try:
            _collect(_with_sources(data, [whole]), self.config.seed, folder, rejected, first)
        except TrainerError as error:
            has_bad_rows = rejected.counts["bad row"] > before  # which are reported by themselves
            if not (first.has_more and has_bad_rows):
                self.problems.append(str(error).partition(":\n")[0] if has_bad_rows else str(error))
            source = None
        self.num_rows += first.num_rows
        self.is_complete = self.is_complete and not first.has_more
        return whole if first.has_more and source else source

    def _bad_rows(self, rejected: Rejected) -> None:
        number = rejected.counts["bad row"]
        if not number:
            return
        of = f"{number:,} of the {'' if self.is_complete else 'first '}{self.num_rows:,} rows"
        if self.config.data.on_bad_row == "skip":
            self.notes.append(f"{of} cannot be used and will be left out:{rejected.listed()}")
        else:
            way_out = "fix them"
            if number < self.num_rows or not self.is_complete:
                way_out += ", or set data.on_bad_row: skip to leave such rows out"
            self.problems.append(f"data: {of} cannot be used ({way_out}):{rejected.listed()}")

    def text(self, folder: Path, collected: Collected | None, base: Path | None) -> None:
        """Render and tokenize the rows with the tokenizer that can be had without torch."""
        model, data = self.config.model, self.config.data
        if model.from_scratch is not None:
            check_base(self.config)
            # The tokenizer of a few rows makes other lengths than that of all.
            data = data.model_copy(update={"sequence_length": _ANY_LENGTH})
        elif base is None:
            self.notes.append(
                f"{model.name_or_path} is taken as a hub id: it is not in this machine's cache, its chat template and "
                f"tokenizer were not looked at{near(Path(str(model.name_or_path)))}"
            )
            return
        elif not _is_plain(base):
            self.notes.append(f"the tokenizer of {model.name_or_path} is read by prepare alone: it was not looked at")
            return
        rejected = Rejected(folder / "rejected.jsonl", skip=True)
        tokenizer = None if base is None else load_tokenizer(model, data, base, with_torch=False)
        if collected is None:
            return
        rows, tally = np.arange(collected.num_rows), Tally()
        config = self.config.model_copy(update={"data": data})
        with LocalMap(1) as here:
            preparation = Preparation(config, folder, collected, rejected, here)
            tokenizer = tokenizer or preparation.learn_tokenizer(rows)
            tokenizer.save_pretrained(folder / "tokenizer")
            settings = preparation.settings()
            preparation.encode(settings, "train", rows, tally)
            if not rejected.counts["bad row"]:  # test rows are the same rows, which are counted once
                preparation.write_test(settings, rows[:_TEST_ROWS], Tally())
        self._bad_rows(rejected)
        self._report(tally, collected.num_rows)

    def _report(self, tally: Tally, num_rows: int) -> None:
        length = self.config.data.sequence_length
        if self.is_complete and not self.problems and tally.dropped.total() == num_rows:
            self.problems.append(f"data: every row would be left out ({dict(tally.dropped)})")
        self.notes += [f"{count:,} of them would be dropped: {reason}" for reason, count in tally.dropped.items()]
        self.notes += [f"{count:,} of them would be cut: {reason}" for reason, count in tally.truncated.items()]
        self.notes += [f"{count:,} of them: {reason}" for reason, count in (+tally.noticed).items()]
        if tally.longest > length and self.config.model.from_scratch is None:
            self.notes.append(f"the longest of them has {tally.longest:,} tokens, data.sequence_length is {length:,}")


def _first_rows() -> FirstRows:
    return FirstRows(rows=_ROWS, num_bytes=_BYTES, seconds=_SECONDS)


def _collect(data: DataConfig, seed: int, folder: Path, rejected: Rejected, first: FirstRows) -> Collected:
    return collect(data, seed, folder / "rows.jsonl", rejected, first)


def _with_sources(data: DataConfig, sources: list[SourceConfig]) -> DataConfig:
    return data.model_copy(update={"path": None, "sources": tuple(sources)})


def _all_of(source: SourceConfig) -> SourceConfig:
    """The source without its limit, which its first rows need not reach."""
    return source.model_copy(update={"num_rows": None})


def _is_plain(base: Path) -> bool:
    """Whether two files say all of a tokenizer; to others a class of transformers adds, which loads torch."""
    try:
        described = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (base / "tokenizer.json").is_file() and bool(described.get("eos_token"))
