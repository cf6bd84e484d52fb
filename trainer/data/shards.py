"""Packs on disk: flat arrays that every rank maps into memory and reads lazily.

A split is a folder. Rows stand one after the other in two arrays of tokens; a plan says which rows make which pack.

    input_ids.npy     int32 [num_tokens]      token ids of all rows, one after the other
    labels.npy        int32 [num_tokens]      the same id where the token is a target, else -100; never shifted
    row_offsets.npy   int64 [num_rows + 1]    row r is tokens row_offsets[r] .. row_offsets[r + 1]
    row_target_tokens.npy int64 [num_rows]    targets of each row
    row_ids.npy       uint8 [num_bytes]       the rows' ids in UTF-8, one after the other
    row_id_offsets.npy int64 [num_rows + 1]
    pack_rows.npy     int64 [num_rows]        row numbers, pack by pack
    pack_offsets.npy  int64 [num_packs + 1]   pack p holds pack_rows[pack_offsets[p] : pack_offsets[p + 1]]
    pack_tokens.npy, pack_target_tokens.npy, pack_costs.npy   int64 [num_packs]; a cost is the sum of squared lengths
    index.json        format version, sequence_length, packing, pad_token_id and counts; written last

The first token of a row is never a target: nothing stands before it to predict it from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.packing import plan_packs
from trainer.errors import TrainerError

FORMAT = 1
IGNORE = -100  # the label that torch's cross entropy leaves out
_ARRAYS = (
    "input_ids",
    "labels",
    "row_offsets",
    "row_ids",
    "row_id_offsets",
    "pack_rows",
    "pack_offsets",
    "pack_tokens",
    "pack_target_tokens",
    "pack_costs",
)


class NpyWriter:
    """An .npy file that grows: one dimension, appended to, its header rewritten at the end.

    numpy pads the header so that a longer shape fits into the same bytes.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self.size = 0
        self._write_header()
        self._data_start = self._file.tell()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: npt.ArrayLike) -> None:
        """Write these values after those already there."""
        array = np.asarray(values, dtype=self._dtype)
        self._file.write(array.tobytes())
        self.size += array.size

    def close(self) -> None:
        """Put the true length into the header and close the file."""
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._data_start:
            raise TrainerError(f"{self._file.name}: the .npy header changed its size; the file is unusable")
        self._file.close()


class SplitWriter:
    """Writes one split: rows as they come, the plan of packs and the index at the end."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._input_ids = NpyWriter(folder / "input_ids.npy", np.int32)
        self._labels = NpyWriter(folder / "labels.npy", np.int32)
        self._target_tokens = NpyWriter(folder / "row_target_tokens.npy", np.int64)
        self._row_offsets = NpyWriter(folder / "row_offsets.npy", np.int64)
        self._row_ids = NpyWriter(folder / "row_ids.npy", np.uint8)
        self._row_id_offsets = NpyWriter(folder / "row_id_offsets.npy", np.int64)
        self._row_offsets.append([0])
        self._row_id_offsets.append([0])

    def add_row(self, row_id: str, input_ids: npt.ArrayLike, labels: npt.ArrayLike) -> None:
        """Append one row.

        Args:
            row_id: the row's id in its source.
            input_ids: token ids, shape [length].
            labels: the same id where the token is a target, else -100, shape [length].
        """
        row = np.asarray(input_ids, dtype=np.int32), np.asarray(labels, dtype=np.int32)
        self.add_rows([row_id], [row])

    def add_rows(
        self, row_ids: Sequence[str], rows: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]
    ) -> None:
        """Append many rows: the id, and the token ids and labels of each; see `add_row`."""
        if not rows:
            return
        sizes = np.array([input_ids.size for input_ids, _ in rows])
        ends = np.cumsum(sizes)
        labels = np.concatenate([labels for _, labels in rows])
        labels[ends - sizes] = IGNORE
        targets = np.add.reduceat((labels != IGNORE).astype(np.int64), ends - sizes)
        names = [row_id.encode() for row_id in row_ids]
        self._row_offsets.append(self._input_ids.size + ends)
        self._row_id_offsets.append(self._row_ids.size + np.cumsum([len(name) for name in names]))
        self._input_ids.append(np.concatenate([input_ids for input_ids, _ in rows]))
        self._labels.append(labels)
        self._target_tokens.append(targets)
        self._row_ids.append(np.frombuffer(b"".join(names), dtype=np.uint8))

    def close(self) -> None:
        """Write the headers and close the files of tokens and rows."""
        for writer in (
            self._input_ids,
            self._labels,
            self._target_tokens,
            self._row_offsets,
            self._row_ids,
            self._row_id_offsets,
        ):
            writer.close()

    def finish(self, *, sequence_length: int, packing: bool, pad_token_id: int, seed: int) -> dict[str, Any]:
        """Plan the packs, write the index last, and return the split's counts.

        Args:
            sequence_length: tokens that a pack holds.
            packing: False makes each row a pack of its own.
            pad_token_id: fills what is left of a sequence.
            seed: of the order among rows of equal length.

        Returns:
            rows, tokens, target_tokens, packs and utilisation: the share of the packs' room that is filled, null
            without packing (then a batch is as wide as its longest row) and for a split without rows.
        """
        self.close()
        lengths = np.diff(np.load(self._folder / "row_offsets.npy"))
        plan = plan_packs(lengths, sequence_length, seed=seed) if packing else np.arange(lengths.size)
        num_packs = int(plan.max()) + 1 if plan.size else 0
        pack_sizes = np.bincount(plan, minlength=num_packs)
        targets = np.load(self._folder / "row_target_tokens.npy")
        self._save("pack_rows", np.argsort(plan, kind="stable"))
        self._save("pack_offsets", np.concatenate([[0], np.cumsum(pack_sizes)]))
        self._save("pack_tokens", np.bincount(plan, weights=lengths, minlength=num_packs))
        self._save("pack_target_tokens", np.bincount(plan, weights=targets, minlength=num_packs))
        self._save("pack_costs", np.bincount(plan, weights=lengths.astype(np.float64) ** 2, minlength=num_packs))
        counts = {
            "rows": int(lengths.size),
            "tokens": int(lengths.sum()),
            "target_tokens": int(targets.sum()),
            "packs": num_packs,
            "utilisation": float(lengths.sum() / (num_packs * sequence_length)) if packing and num_packs else None,
        }
        index = {"format": FORMAT, "sequence_length": sequence_length, "packing": packing, "pad_token_id": pad_token_id}
        temporary = self._folder / "index.json.tmp"
        temporary.write_text(json.dumps({**index, **counts}, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self._folder / "index.json")
        return counts

    def _save(self, name: str, values: npt.NDArray[Any]) -> None:
        np.save(self._folder / f"{name}.npy", values.astype(np.int64))


@dataclass(frozen=True)
class PackedSplit:
    """A split opened for reading: mapped into memory, so a rank reads only the rows that it trains on."""

    folder: Path
    sequence_length: int
    packing: bool
    pad_token_id: int
    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    row_offsets: npt.NDArray[np.int64]
    row_ids: npt.NDArray[np.uint8]
    row_id_offsets: npt.NDArray[np.int64]
    pack_rows: npt.NDArray[np.int64]
    pack_offsets: npt.NDArray[np.int64]
    pack_tokens: npt.NDArray[np.int64]
    pack_target_tokens: npt.NDArray[np.int64]
    pack_costs: npt.NDArray[np.int64]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> PackedSplit:
        """Map a split that the prepare stage wrote.

        Args:
            folder: such as run_dir / "data" / "train".

        Returns:
            The split, its tokens unread.

        Raises:
            TrainerError: the folder is incomplete or of another format.
        """
        folder = Path(folder)
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TrainerError(f"{folder} holds no prepared split (no index.json): run the prepare stage") from None
        if index.get("format") != FORMAT:
            raise TrainerError(f"{folder} has format {index.get('format')}, this version reads {FORMAT}: prepare again")
        missing = [name for name in _ARRAYS if not (folder / f"{name}.npy").exists()]
        if missing:
            raise TrainerError(f"{folder} lacks {', '.join(missing)}: run the prepare stage again")
        return cls(
            folder=folder,
            sequence_length=index["sequence_length"],
            packing=index["packing"],
            pad_token_id=index["pad_token_id"],
            # Plain views of the mapped files: slices of np.memmap itself are many times slower.
            **{
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
                for name in _ARRAYS
            },
        )

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return self.row_offsets.size - 1

    @property
    def num_packs(self) -> int:
        """Packs of the split."""
        return self.pack_offsets.size - 1

    def num_target_tokens(self, pack: int) -> int:
        """Tokens of this pack that carry loss."""
        return int(self.pack_target_tokens[pack])

    def rows(self, pack: int) -> npt.NDArray[np.int64]:
        """Numbers of the rows in this pack, in the order in which they stand."""
        return self.pack_rows[self.pack_offsets[pack] : self.pack_offsets[pack + 1]]

    def row_tokens(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Token ids and labels of one row, each of shape [length]."""
        tokens = slice(int(self.row_offsets[row]), int(self.row_offsets[row + 1]))
        return self.input_ids[tokens], self.labels[tokens]

    def row_id(self, row: int) -> str:
        """The id that the row has in its source."""
        return self.row_ids[self.row_id_offsets[row] : self.row_id_offsets[row + 1]].tobytes().decode()
