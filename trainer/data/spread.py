"""Work on chunks of rows, spread over the processes of this machine.

The outcomes come in the order of the chunks, and only the chunks in flight are held.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from types import TracebackType
from typing import Protocol, Self, TypeVar

from trainer.errors import TrainerError

CHUNK_ROWS = 500
_CHUNK_BYTES = 8 << 20
_CHUNKS_AHEAD = 4  # a process has so many chunks waiting, so that memory stays flat

Chunk = TypeVar("Chunk")


class ChunkMap(Protocol):
    """Applies a function to chunks, anywhere, and gives the outcomes in the order of the chunks."""

    def __call__(self, function: Callable[[Sequence[bytes]], Chunk], chunks: Iterator[list[bytes]]) -> Iterator[Chunk]:
        """Apply the function to each chunk."""


def chunked(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Cut lines into chunks of some hundred, or of fewer where lines are long."""
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        chunk.append(line)
        size += len(line)
        if len(chunk) == CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class LocalMap:
    """A ChunkMap over processes of this machine, which start at its first use and end with the `with` block."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, function: Callable[[Sequence[bytes]], Chunk], chunks: Iterator[list[bytes]]) -> Iterator[Chunk]:
        """Apply a function to each chunk; with one process, or one chunk, in this process.

        Args:
            function: can be pickled.
            chunks: its argument.

        Yields:
            The outcomes, in the order of the chunks.

        Raises:
            TrainerError: a process was killed.
        """
        first = list(islice(chunks, 2))
        if self._num_processes == 1 or len(first) == 1:
            yield from map(function, chain(first, chunks))
            return
        if self._pool is None:
            # Spawned, not forked: the tokenizer's threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._num_processes, context, initializer=one_thread)
        waiting: deque[Future[Chunk]] = deque()
        try:
            for chunk in chain(first, chunks):
                waiting.append(self._pool.submit(function, chunk))
                if len(waiting) > self._num_processes * _CHUNKS_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise TrainerError(
                f"one of {self._num_processes} processes that tokenize was killed, most likely for want of memory: set "
                "data.num_processes lower"
            ) from error


def one_thread() -> None:
    """Let tokenizers use one thread in this process: there is a process for every core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
