"""A rank that runs out of memory: recognized in whatever form it comes, and reported in words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.errors import NotEnoughMemoryError

# What allocators say that raise no class of their own: PyTorch's on the CPU (c10/core/impl/alloc_cpu.cpp), CUDA's and
# NCCL's outside PyTorch's allocator, cuBLAS, and the C++ library.
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that an allocation failed.

    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory")), is_out_of_memory(RuntimeError("peer closed"))
    (True, False)

    Args:
        error: What was raised.

    Returns:
        The answer.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """A part whose failed allocations end as one kind of error.

    Args:
        what: What is being done, for the message.

    Yields:
        Nothing.

    Raises:
        NotEnoughMemoryError: An allocation failed; with what was requested and what this rank and its machine hold.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        rank = os.environ.get("RANK", "0")
        raise NotEnoughMemoryError(f"rank {rank} ran out of memory while {what}: {said}; {held()}") from error


def held() -> str:
    """What this process holds, and what its machine has left, in words."""
    own, machine = _sizes(Path("/proc/self/status")), _sizes(Path("/proc/meminfo"))
    parts = [f"this process holds {_gib(own.get('VmRSS', 0))} of the host's memory"]
    if "MemAvailable" in machine:
        parts.append(f"{_gib(machine['MemAvailable'])} of {_gib(machine['MemTotal'])} there are free")
    if torch.cuda.is_available():
        allocated, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        parts.append(f"PyTorch holds {_gib(allocated)} (at most {_gib(peak)}) of its GPU's {_gib(total)}")
    return ", ".join(parts)


def _sizes(table: Path) -> dict[str, int]:
    """The sizes in a table of /proc whose lines read `Name: 123 kB`, in bytes."""
    try:
        rows = [line.split() for line in table.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"
