"""An engine's last words, and what they mean where they are about memory: the nearest setting that fits.

The patterns are those of vLLM 0.32 (vllm/v1/core/kv_cache_utils.py, vllm/v1/worker/), of PyTorch's allocator, and of
Ray's memory monitor. Loads nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

_MOST_SHARE = 0.95  # more leaves too little for what vLLM does not count
_GIB = r"([\d.]+)"


@dataclass(frozen=True)
class EngineSettings:
    """The settings that decide whether an engine fits, and what they are called.

    Attributes:
        section: Of the configuration, for example generation.
        gpu_memory_share: Share of each GPU's memory.
        tensor_parallel_size: GPUs of one engine.
        max_model_len: Longest prompt plus response, in tokens; None where no key sets it.
        cpu_cache_gib: Key-value cache on a CPU, in GiB; None where no key sets it.
        engines: Engines beside each other; None where no key sets it.
    """

    section: str
    gpu_memory_share: float
    tensor_parallel_size: int
    max_model_len: int | None = None
    cpu_cache_gib: float | None = None
    engines: int | None = None


def memory_problem(settings: EngineSettings, words: str) -> str | None:
    """The want of memory that an engine ended with, and the nearest setting that fits. Pure.

    >>> settings = EngineSettings("judge", gpu_memory_share=0.9, tensor_parallel_size=1)
    >>> memory_problem(settings, "ValueError: No available memory for the cache blocks. Try increasing")
    "the model's weights leave nothing of judge.gpu_memory_share = 0.9 for the key-value cache. Set \
judge.tensor_parallel_size: 2, or judge.gpu_memory_share: 0.95"

    Args:
        settings: Of the engine.
        words: What it printed, or raised.

    Returns:
        Cause and way out; None where the words are about something else.
    """
    for pattern, explain in _EXPLAINED:
        if found := re.search(pattern, words, re.DOTALL):
            cause, ways = explain(settings, found)
            return f"{cause}. Set {', or '.join(ways)}" if ways else cause
    return None


def last_words(printed: str) -> str | None:
    """The last error in what an engine printed; what only follows from an earlier one is passed over. Pure.

    >>> last_words("ValueError: no room\\nRuntimeError: Engine core initialization failed. See root cause above.")
    'ValueError: no room'

    Args:
        printed: Text of its log.

    Returns:
        One line; None where there is no error in it.
    """
    lines = re.findall(r"(\w*(?:Error|Exception): .+)", printed)
    lines = [line for line in lines if not re.match(r"EngineDeadError|ActorDiedError|.*See root cause", line)]
    return lines[-1].strip()[:500] if lines else None


Explained = tuple[str, list[str]]


def _cache_too_small(settings: EngineSettings, found: re.Match[str]) -> Explained:
    length, needed, there, fits = found.groups()
    cause = (
        f"a sequence of {length} tokens needs {needed} GiB of key-value cache, and the engine has {there} GiB beside "
        "the model's weights"
    )
    ways = []
    if fits is not None and settings.max_model_len is not None:
        ways.append(f"{settings.section}.max_model_len: {fits}")
    if settings.cpu_cache_gib is not None:
        return cause, [f"{settings.section}.cpu_cache_gib: {_up(float(needed))}", *ways]
    return cause, [*ways, *_more_memory(settings)]


def _no_cache(settings: EngineSettings, _found: re.Match[str]) -> Explained:
    if settings.cpu_cache_gib is not None:
        cause = f"{settings.section}.cpu_cache_gib = {settings.cpu_cache_gib:g} does not hold one block of the cache"
        return cause, [f"{settings.section}.cpu_cache_gib: {max(1.0, 2 * settings.cpu_cache_gib):g}"]
    share = f"{settings.section}.gpu_memory_share = {settings.gpu_memory_share:g}"
    return f"the model's weights leave nothing of {share} for the key-value cache", _more_memory(settings)


def _gpu_taken(settings: EngineSettings, found: re.Match[str]) -> Explained:
    free, total, asked = found.groups()
    share = math.floor(100 * float(free) / float(total) - 0.5) / 100
    cause = (
        f"{settings.section}.gpu_memory_share = {settings.gpu_memory_share:g} is {asked} GiB, and {free} of the GPU's "
        f"{total} GiB are free: another process holds the rest (nvidia-smi lists it)"
    )
    return cause, [f"{settings.section}.gpu_memory_share: {share:g}"] if share >= 0.1 else []


def _allocation(settings: EngineSettings, found: re.Match[str]) -> Explained:
    ways = [f"{settings.section}.tensor_parallel_size: {2 * settings.tensor_parallel_size}"]
    if settings.max_model_len is not None:
        ways.append(f"{settings.section}.max_model_len: {settings.max_model_len // 2}")
    return f"the engine ran out of the GPU's memory ({found[0].strip()})", ways


def _warm_up(settings: EngineSettings, _found: re.Match[str]) -> Explained:
    lower = f"{settings.section}.gpu_memory_share: {max(0.05, settings.gpu_memory_share - 0.05):.2g}"
    return "the engine ran out of the GPU's memory beside its share of it, when it warmed up", [lower]


def _host_taken(settings: EngineSettings, found: re.Match[str]) -> Explained:
    free, asked = found.groups()
    cause = f"the engine's key-value cache needs {asked} GiB of the machine's memory, and {free} GiB are available"
    return cause, _less_host_memory(settings, math.floor(10 * 0.9 * float(free)) / 10)


def _host_full(settings: EngineSettings, _found: re.Match[str]) -> Explained:
    cause = "the machine's memory was full, and Ray killed the engine"
    return cause, _less_host_memory(settings, (settings.cpu_cache_gib or 0) / 2)


def _more_memory(settings: EngineSettings) -> list[str]:
    ways = [f"{settings.section}.tensor_parallel_size: {2 * settings.tensor_parallel_size}"]
    if settings.gpu_memory_share < _MOST_SHARE:
        ways.append(f"{settings.section}.gpu_memory_share: {_MOST_SHARE:g}")
    return ways


def _less_host_memory(settings: EngineSettings, cache_gib: float) -> list[str]:
    ways = []
    if settings.cpu_cache_gib is not None and 0 < cache_gib < settings.cpu_cache_gib:
        ways.append(f"{settings.section}.cpu_cache_gib: {cache_gib:g}")
    if (settings.engines or 1) > 1:
        ways.append(f"{settings.section}.engines: {(settings.engines or 1) - 1}")
    return ways


def _up(gib: float) -> str:
    """Half a step of vLLM's two decimals more, rounded up: its own number may have been rounded down."""
    return f"{math.ceil(100 * (gib + 0.005)) / 100:g}"


_EXPLAINED: tuple[tuple[str, Callable[[EngineSettings, re.Match[str]], Explained]], ...] = (
    (
        rf"max seq len \((\d+)\), \({_GIB} GiB KV cache is needed.*?available KV cache memory \({_GIB} GiB\)"
        r"(?:\. Based on the available memory, the estimated maximum model length is (\d+))?",
        _cache_too_small,
    ),
    (r"No available memory for the cache blocks|not enough GPU memory available to serve even a single", _no_cache),
    (
        rf"Free memory on device \S+ \({_GIB}/{_GIB} GiB\) on startup is less than desired GPU memory utilization "
        rf"\([\d.]+, {_GIB} GiB\)",
        _gpu_taken,
    ),
    (r"CUDA out of memory occurred when warming up", _warm_up),
    (r"CUDA out of memory\. Tried to allocate [^\n]*?\.(?= |\n|$)", _allocation),
    (
        rf"Available memory on node \S+ \({_GIB}/[\d.]+ GiB\) on kv cache allocation is less than requested memory for "
        rf"kv \({_GIB}(?:/[\d.]+)? GiB\)",
        _host_taken,
    ),
    (r"due to the node running low on memory|OutOfMemoryError: Task was killed", _host_full),
)
