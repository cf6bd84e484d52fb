"""Folders that are either whole or not there: tensor files, their hashes, and a seal written last.

A folder is filled under a name with `.partial` in it. Every file is flushed to disk and hashed while it is written;
then comes `seal.json` (what is in the folder, and the size and SHA-256 of every file), then one rename. Whoever finds
`<name>` with a seal that holds true may trust every byte. Nothing here knows of models, engines or ranks.

Tensors are kept as safetensors: a JSON header and raw bytes, so that reading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import TrainerError

SEAL = "seal.json"
PARTIAL = ".partial"
REMOVED = ".removed"

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class SealedFile:
    """One file of a sealed folder.

    Attributes:
        name: Its name inside the folder.
        num_bytes: Its size.
        sha256: Hexadecimal digest of its bytes.
    """

    name: str
    num_bytes: int
    sha256: str


def num_tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes that the tensors take on disk, headers left out."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> SealedFile:
    """Write tensors as one safetensors file, flush it to disk, and hash it on the way.

    safetensors' own writer builds the whole file in memory first; this one holds one tensor at a time on the host, and
    no copy at all of those that lie there already.

    Args:
        path: File to write.
        tensors: Name to tensor; float32, bfloat16, float64, int64 or uint8, on any device.

    Returns:
        Name, size and hash of the file.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants its data aligned to 8 bytes
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            file.write(block)
            digest.update(block)
        for tensor in tensors.values():
            if tensor.numel():
                data = tensor_bytes(tensor)
                for offset in range(0, len(data), _CHUNK_BYTES):  # written and hashed while still in the cache
                    block_view = data[offset : offset + _CHUNK_BYTES]
                    file.write(block_view)
                    digest.update(block_view)
        file.flush()
        os.fsync(file.fileno())
    return SealedFile(path.name, path.stat().st_size, digest.hexdigest())


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's elements in row-major order, copied to the host where it is on a GPU.

    Args:
        tensor: Of any dtype and device, with at least one element.

    Returns:
        A view of host memory.
    """
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, so that files made or renamed in it outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(partial: Path, final: Path, content: dict[str, Any], files: list[SealedFile]) -> None:
    """Write the seal into a filled folder and give the folder its name.

    Args:
        partial: The filled folder.
        final: Its name from now on, beside it; must not exist.
        content: What a reader has to know; JSON-able.
        files: Every other file of the folder.
    """
    body = {"content": content, "files": [asdict(file) for file in files]}
    with (partial / SEAL).open("w", encoding="utf-8") as file:
        file.write(json.dumps({"sha256": _digest_of_json(body), **body}, ensure_ascii=False, indent=1))
        file.flush()
        os.fsync(file.fileno())
    flush_folder(partial)
    partial.rename(final)
    flush_folder(final.parent)


def _digest_of_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_seal(folder: Path) -> tuple[dict[str, Any], list[SealedFile]]:
    """What the seal says of a folder.

    Args:
        folder: A sealed folder.

    Returns:
        The content given to `seal`, and the folder's files.

    Raises:
        TrainerError: There is no seal, or it is not as it was written.
    """
    path = folder / SEAL
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        claimed = written.pop("sha256")
        if claimed != _digest_of_json(written):
            raise TrainerError(f"{path}: its text does not match its own SHA-256, so it was changed or damaged")
        return written["content"], [SealedFile(**entry) for entry in written["files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainerError(f"{path}: unreadable seal ({type(error).__name__}: {error})") from error


def verify(folder: Path, file: SealedFile) -> str | None:
    """Compare one file with its seal.

    Args:
        folder: The sealed folder.
        file: What the seal says of the file.

    Returns:
        What is wrong with it; None when every byte is as it was written.
    """
    path = folder / file.name
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        if size != file.num_bytes:
            return f"{path} has {size:,} bytes, {file.num_bytes:,} were written"
        with path.open("rb") as opened:
            while block := opened.read(_CHUNK_BYTES):
                digest.update(block)
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if digest.hexdigest() != file.sha256:
        return f"{path} has another SHA-256 than when it was written: its content was changed or damaged"
    return None


def remove(folder: Path) -> None:
    """Delete a folder that has a seal, so that a crash half-way leaves no folder that looks whole.

    Args:
        folder: The sealed folder; it loses its name first and its files then.
    """
    doomed = folder.with_name(folder.name + REMOVED)
    folder.rename(doomed)
    remove_tree(doomed)


def remove_tree(folder: Path) -> None:
    """Delete a flat folder and its files; one that is not there, or that somebody else is deleting too, is fine."""
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
        folder.rmdir()
