"""Files, folders and hub data sets -> rows, one at a time, in a fixed order. Memory does not grow with the file.

What a file is, is known from its first bytes, not from its name. Bytes that are not text in its encoding are read as
lone surrogates, so that one broken row is one bad row and not a broken file.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pyarrow as pa

from trainer.config import SourceConfig
from trainer.data.cells import undo_struct_of_lists
from trainer.data.json_rows import Note, read_json
from trainer.data.names import SUFFIXES, SUFFIXES_IN_WORDS, files_of, in_short, is_hub_id, missing, selected
from trainer.data.tables import read_arrow, read_csv, read_parquet
from trainer.errors import TrainerError

_HEAD_BYTES = 512
_UNPACK: dict[bytes, Callable[[io.BufferedReader], object]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda raw: pa.CompressedInputStream(pa.PythonFile(raw), "zstd"),
    b"\x04\x22\x4d\x18": lambda raw: pa.CompressedInputStream(pa.PythonFile(raw), "lz4"),
}
_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
# First bytes, in small letters, of what holds no rows that can be read; what it is, and the way out.
_REFUSED = (
    (b"version https://git-lfs", "a pointer of Git LFS, without the data: fetch it with: git lfs pull"),
    (b"pk\x03\x04", "a zip archive or an Excel workbook: unpack it, or save its sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook: save its sheet as CSV"),
    (b"<!doctype html", "a web page, perhaps the login or error page of a download: download the file again"),
    (b"<html", "a web page, perhaps the login or error page of a download: download the file again"),
    (b"<?xml", "XML: convert it to JSONL"),
    (b"sqlite format 3", "an SQLite database: export its table as CSV"),
    (b"\x89hdf", "HDF5: convert it to Parquet"),
    (b"orc", "ORC: convert it to Parquet"),
    (b"obj\x01", "Avro: convert it to Parquet"),
    (b"fea1", "Feather of version 1: write it again with pandas' to_feather or to_parquet"),
    (b"%pdf", "a PDF document"),
    *((b"\x80" + bytes([n]), "a Python pickle, which can run code: convert it to Parquet") for n in (2, 3, 4, 5)),
)

Row = tuple[str, int, object]
"""The file, the row's number in it from 1, and the row; the row is a BadRowError where it could not be read."""


def read_source(source: SourceConfig, note: Note = lambda _: None) -> Iterator[Row]:
    """Read the rows of a source, of all splits that its hub_split selects.

    Args:
        source: Its path is a file, a folder or a hub id.
        note: Takes a line about what is not read of it.

    Yields:
        Rows, files in the order of their names.

    Raises:
        TrainerError: There is nothing to read, or it cannot be read at all.
    """
    path = Path(source.path)
    if path.exists():
        for file in source_files(path, source.hub_split, note):
            for number, row in enumerate(_read_file(file, note), start=1):
                if isinstance(row, dict):
                    undo_struct_of_lists(row)
                yield str(file), number, row
    elif is_hub_id(source.path):
        from trainer.data.hub import read_hub

        yield from read_hub(source)
    else:
        raise TrainerError(f"data: {missing(path)}")


def splits_of(source: SourceConfig) -> list[str]:
    """Return the splits that a source holds.

    Args:
        source: Its path is a file, a folder or a hub id; hub_split does not matter.

    Returns:
        Their names in a folder or hub data set, "" for files whose names say none; nothing for a single file.

    Raises:
        TrainerError: The hub does not give the data set, or the folder's lists can't be read.
    """
    path = Path(source.path)
    if path.is_dir():
        return list(files_of(path).splits)
    if path.exists() or not is_hub_id(source.path):
        return []
    from trainer.data.hub import hub_splits

    return hub_splits(source)


def source_files(path: Path, split: str | None = None, note: Note = lambda _: None) -> list[Path]:
    """List the files of rows at a path: itself, or those in the folder and below it, in the order of their names.

    Args:
        path: A file or a folder.
        split: Selects files of a folder, as hub_split does; None takes all.
        note: Takes a line about files that are left out.

    Returns:
        At least one file.

    Raises:
        TrainerError: The file is none of rows, the folder holds none, or has no such split.
    """
    if path.is_file():
        if split is not None:
            raise TrainerError(f"data: {path} is one file and holds no split {split!r}: remove the source's hub_split")
        if not path.name.lower().endswith(SUFFIXES):
            _check_unknown(path)
        return [path]
    found = files_of(path)
    if not found.files:
        held = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
        raise TrainerError(
            f"data: the folder {path} holds no file of rows ({SUFFIXES_IN_WORDS}); it holds "
            + (in_short(held) if held else "nothing")
        )
    if found.left_out:
        note(f"{path}: not read, as their names end like no file of rows: {in_short(found.left_out)}")
    names = selected(list(found.splits), split, str(path))
    return sorted(file for name in names for file in found.splits[name])


def _read_file(path: Path, note: Note) -> Iterator[object]:
    try:
        with path.open("rb") as raw, _unpacked(raw) as file:
            head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
            _refuse(path, head)
            if head.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM)):
                # What was compressed as a whole is read whole; else memory holds a part.
                table = pa.memory_map(str(path)) if file is raw else pa.BufferReader(file.read())
                if head.startswith(_PARQUET):
                    yield from read_parquet(table, path)
                else:
                    yield from read_arrow(table, path, is_stream=head.startswith(_ARROW_STREAM))
            else:
                yield from _read_text(path, file, head, note)
    except (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise TrainerError(f"{path} cannot be read: {error}. It may be cut off: write or download it again") from error


def _read_text(path: Path, file: io.BufferedReader, head: bytes, note: Note) -> Iterator[object]:
    is_table = any(suffix.lower() in (".csv", ".tsv") for suffix in path.suffixes)
    encoding = json.detect_encoding(head)
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    with io.TextIOWrapper(file, encoding, "surrogateescape", newline="" if is_table else "\n") as text:
        yield from read_csv(text, path) if is_table else read_json(text, path, note)


def _unpacked(raw: io.BufferedReader) -> io.BufferedReader:
    """A file's bytes, unpacked where it is compressed, whatever its name says."""
    head = raw.peek(8)
    for magic, unpack in _UNPACK.items():
        if head.startswith(magic):
            return io.BufferedReader(cast(io.RawIOBase, unpack(raw)))
    return raw


def _check_unknown(path: Path) -> None:
    """Refuse a file whose name ends like no file of rows, but for one that begins as rows do."""
    with path.open("rb") as raw, _unpacked(raw) as file:
        head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    _refuse(path, head)
    if head.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM)):
        return
    text = head.decode(json.detect_encoding(head), "replace").lstrip("\ufeff \t\r\n")
    if not text.startswith(("{", "[")):
        raise TrainerError(
            f"data: {path} is no file of rows: its name ends in none of {SUFFIXES_IN_WORDS}, and it begins with "
            f"{text[:40]!r}, which is no JSON"
        )


def _refuse(path: Path, head: bytes) -> None:
    """Refuse what is known to hold no rows that can be read."""
    start = head.lstrip(b"\xef\xbb\xbf \r\n").lower()
    for magic, words in _REFUSED:
        if start.startswith(magic):
            raise TrainerError(f"data: {path} is {words}")
    if head[257:262] == b"ustar":
        raise TrainerError(f"data: {path} is a tar archive: unpack it, and give the folder")
