"""Rendering and tokenizing chunks of rows over a Ray cluster, for data that keep one machine busy too long."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trainer.data.spread import Chunk, one_thread

# Enough that no worker waits for the driver to read on, few enough that memory stays flat.
CHUNKS_AHEAD_OF_A_CPU = 2


def map_on_ray(function: Callable[[Sequence[bytes]], Chunk], chunks: Iterator[list[bytes]]) -> Iterator[Chunk]:
    """Apply a function to chunks on the connected Ray cluster; a trainer.data.spread.ChunkMap.

    The rows are read here and stream through: only the chunks in flight are held, and the outcomes come in the order of
    the chunks, so the shards hold the same bytes as when one machine does it.

    Args:
        function: can be pickled.
        chunks: its argument.

    Yields:
        The outcomes, in the order of the chunks.
    """
    import ray

    work: Any = ray.remote(num_cpus=1, max_retries=3)(_work)
    shared = ray.put(function)
    most = CHUNKS_AHEAD_OF_A_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[Any] = deque()
    for chunk in chunks:
        waiting.append(work.remote(shared, chunk))
        if len(waiting) > most:
            yield ray.get(waiting.popleft())
    while waiting:
        yield ray.get(waiting.popleft())


def _work(function: Callable[[Sequence[bytes]], Chunk], chunk: Sequence[bytes]) -> Chunk:
    one_thread()
    return function(chunk)
