"""Whether each engine fits into what it is given, and the nearest settings with which it does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from launcher.estimate.engines import (
    CUDA_SHARE,
    GIB,
    EngineMemory,
    cache_bytes,
    engine_memory,
    longest_that_fits,
)
from launcher.estimate.memory import in_gib, machine_memory
from launcher.estimate.served import Served
from launcher.placement import counted
from launcher.ray_cluster import Resources

# vLLM's default is 0.92; a little is left to CUDA's context and to what vLLM does not count.
LARGEST_SHARE = 0.95
USUAL_GPUS_OF_A_NODE = 8


def problems(resources: Resources, served: Sequence[Served], gpu_memory: int | None, *, on_gpu: bool) -> list[str]:
    """Engines that do not fit, each with the nearest settings that do.

    Args:
        resources: What there is.
        served: The engines.
        gpu_memory: Memory of one GPU, in bytes; None where it is not known.
        on_gpu: Whether the engines have GPUs.

    Returns:
        A line for each.
    """
    found = [line for one in served if (line := _heads_problem(one)) is not None]
    if found or not on_gpu:
        return found + [line for one in served if not on_gpu for line in _cpu_problems(one, resources)]
    for one in served:
        needs = _memory(one, on_gpu=True)
        if gpu_memory is None or needs.total <= _has(one, gpu_memory):
            continue
        found.append(
            f"{one.key}: an engine for {one.what} needs {in_gib(needs.total)} of each GPU ({_parts(one, needs)}) and "
            f"has {in_gib(_has(one, gpu_memory))}, {one.key}.gpu_memory_share = {one.share:g} of {in_gib(gpu_memory)}; "
            f"{_way_out(one, gpu_memory, resources)}"
        )
    return found


def _heads_problem(one: Served) -> str | None:
    heads, size = _heads(one), one.settings.tensor_parallel_size
    if heads % size == 0:
        return None
    possible = ", ".join(str(divisor) for divisor in range(1, 17) if heads % divisor == 0)
    return (
        f"{one.key}.tensor_parallel_size = {size} does not divide the {heads} attention heads of {one.what}: take one "
        f"of {possible}"
    )


def _heads(one: Served) -> int:
    return one.shape.attention.num_heads if one.shape.attention else 1


def _has(one: Served, gpu_memory: int) -> int:
    return int(one.share * CUDA_SHARE * gpu_memory)


def _memory(one: Served, *, on_gpu: bool) -> EngineMemory:
    memory = engine_memory(one.shape, one.settings, on_gpu=on_gpu)
    assert memory is not None  # noqa: S101 - served_models keeps only models whose cache is known
    return memory


def _way_out(one: Served, gpu_memory: int, resources: Resources) -> str:
    """Settings that were computed to fit: the whole context on more GPUs or a larger share, and a shorter context."""
    most = max((node.num_gpus for node in resources.by_node), default=0) or USUAL_GPUS_OF_A_NODE
    own = one.settings.tensor_parallel_size
    sizes = [own, *(size for power in range(1, 7) if own < (size := 2**power) <= most and _heads(one) % size == 0)]
    whole = [
        changed
        for size in sizes
        for share in (one.share, max(one.share, LARGEST_SHARE))
        if _fits(changed := _changed(one, size, share, one.settings.max_model_len, resources), gpu_memory)
    ]
    shorter = [
        changed
        for size in sizes
        if (length := _longest(_changed(one, size, one.share, one.settings.max_model_len, resources), gpu_memory))
        and length >= one.least_len > 0
        for changed in [_changed(one, size, one.share, length, resources)]
    ]
    if whole and shorter and shorter[0].settings.tensor_parallel_size >= whole[0].settings.tensor_parallel_size:
        shorter = []
    ways = [_in_settings(one, way) for way in (*whole[:1], *shorter[:1])]
    return (
        f"what fits: {', or '.join(ways)}" if ways else "no setting that was tried fits: take a smaller model, or one "
        "with quantized weights, or larger GPUs"
    )  # fmt: skip


def _changed(one: Served, size: int, share: float, length: int, resources: Resources) -> Served:
    """The same with other settings, and as many engines as still find GPUs."""
    engines = max(1, min(one.engines, resources.num_gpus // size)) if resources.num_gpus else one.engines
    settings = replace(one.settings, tensor_parallel_size=size, max_model_len=length)
    return replace(one, settings=settings, share=share, engines=engines)


def _fits(one: Served, gpu_memory: int) -> bool:
    return _memory(one, on_gpu=True).total <= _has(one, gpu_memory)


def _longest(one: Served, gpu_memory: int) -> int:
    return longest_that_fits(one.shape, one.settings, _has(one, gpu_memory), on_gpu=True)


def _in_settings(old: Served, new: Served) -> str:
    """What differs, as settings."""
    pairs = [
        ("tensor_parallel_size", old.settings.tensor_parallel_size, new.settings.tensor_parallel_size),
        ("engines", old.engines, new.engines),
        ("max_model_len", old.settings.max_model_len, new.settings.max_model_len),
        ("gpu_memory_share", old.share, new.share),
    ]
    return " ".join(f"{old.key}.{key}={after:g}" for key, before, after in pairs if before != after)


def _cpu_problems(one: Served, resources: Resources) -> Iterator[str]:
    """A cache that holds no whole sequence, and engines that together need more than the machine has."""
    needs = cache_bytes(one.shape.attention, one.settings) or 0
    if needs > one.cpu_cache:
        fits = _cached_tokens(one)
        shorter = f", or {one.key}.max_model_len={fits}" if fits else ""
        yield (
            f"{one.key}.cpu_cache_gib = {one.cpu_cache / GIB:g}: one sequence of {one.settings.max_model_len:,} tokens "
            f"for {one.what} needs {in_gib(needs)}; what fits: "
            f"{one.key}.cpu_cache_gib={math.ceil(10 * needs / GIB) / 10:g}{shorter}"
        )
    machine, each = machine_memory(resources), _cpu_total(one)
    if machine is not None and one.engines * each > machine:
        fewer = machine // each
        way_out = f"what fits: {one.key}.engines={fewer}" if fewer else "take a smaller model, or a larger machine"
        yield (
            f"{one.key}.engines = {one.engines}: an engine for {one.what} takes about {in_gib(each)} of memory, and "
            f"this machine has {in_gib(machine)}; {way_out}"
        )


def _cached_tokens(one: Served) -> int:
    """The longest sequence that the cache on CPUs holds, in tokens."""
    block = one.settings.block
    lengths = range(one.settings.max_model_len // block * block, 0, -block)
    for length in lengths:
        needs = cache_bytes(one.shape.attention, replace(one.settings, max_model_len=length))
        if needs is not None and needs <= one.cpu_cache:
            return length
    return 0


def _cpu_total(one: Served) -> int:
    memory = _memory(one, on_gpu=False)
    return memory.total - memory.cache + one.cpu_cache


def describe(resources: Resources, served: Sequence[Served], gpu_memory: int | None, *, on_gpu: bool) -> list[str]:
    """What each engine needs, and what it has.

    Args:
        resources: What there is.
        served: The engines.
        gpu_memory: Memory of one GPU, in bytes; None where it is not known.
        on_gpu: Whether the engines have GPUs.

    Returns:
        A line for each.
    """
    return [
        f"engine     {one.key}, {one.what}: {_on_gpus(one, resources, gpu_memory) if on_gpu else _on_cpus(one)}"
        for one in served
    ]


def _on_cpus(one: Served) -> str:
    cache = cache_bytes(one.shape.attention, one.settings) or 0
    return (
        f"{_count(one)} with about {in_gib(_cpu_total(one))} of memory each; one sequence of "
        f"{one.settings.max_model_len:,} tokens needs {in_gib(cache)} of its cache of {in_gib(one.cpu_cache)}"
    )


def _on_gpus(one: Served, resources: Resources, gpu_memory: int | None) -> str:
    memory, size = _memory(one, on_gpu=True), one.settings.tensor_parallel_size
    has = "what a GPU has is not known: cluster.gpu_memory_gib names it"
    if gpu_memory is not None:
        has = f"has {in_gib(_has(one, gpu_memory))}, {one.share:g} of {in_gib(gpu_memory)}"
    uses = f"{_count(one)} on {counted(one.engines * size, 'GPU')}"
    if resources.num_gpus > one.engines * size:
        uses += f" of {resources.num_gpus}"
    return f"needs {in_gib(memory.total)} of each GPU ({_parts(one, memory)}), {has}; {uses}"


def _count(one: Served) -> str:
    return counted(one.engines, "engine")


def _parts(one: Served, memory: EngineMemory) -> str:
    parts = {
        "weights": memory.weights,
        f"one sequence of {one.settings.max_model_len:,} tokens": memory.cache,
        "activations": memory.activations,
        "adapters": memory.adapters,
        "libraries and graphs": memory.overhead,
    }
    return ", ".join(f"{name} {in_gib(size)}" for name, size in parts.items() if size)
