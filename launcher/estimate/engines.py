"""Memory of a vLLM engine by part, against the share of a GPU (or of the machine) that it is given.

vLLM 0.32 loads the weights, runs one step of its largest size to see what activations take, estimates its CUDA graphs,
and gives the rest of its share to the key-value cache; it refuses to start where one sequence of max_model_len tokens
does not fit there (vllm/v1/worker/gpu_worker.py, determine_available_memory; vllm/v1/core/kv_cache_utils.py). A CPU
engine's cache is a fixed size, generation.cpu_cache_gib. The cache's size was compared with real CPU engines;
activations and overheads on GPUs are reckoned from the sources and have not been compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from launcher.estimate.shapes import Attention, Shape, adapter_weights

GIB = 2**30
MIB = 2**20
# What CUDA gives of the memory that nvidia-smi reports, at least: 14.6 of 15.0 GiB on a T4, 79.1 of 79.6 on an H100.
CUDA_SHARE = 0.97
# Sequences at a time, tokens in one step, tokens in a block of the cache: evaluation's settings, and vLLM's blocks.
CPU_STEP = (256, 4096, 128)
GPU_STEP = (256, 8192, 16)
LARGE_GPU_STEP = (1024, 16_384, 16)
LARGE_GPU = 70 * GIB
# Beside torch's own: libraries' workspaces, and with several GPUs NCCL's and vLLM's buffers for reductions.
LIBRARIES = 512 * MIB
BETWEEN_GPUS = 512 * MIB
GRAPHS = GIB  # CUDA graphs of all batch sizes; none where an engine runs eagerly
CPU_PROCESS = 1400 * MIB  # a process with torch and vLLM loaded
_FP32 = 4


@dataclass(frozen=True)
class Settings:
    """How an engine is run.

    Attributes:
        max_model_len: Longest sequence, in tokens.
        tensor_parallel_size: GPUs, or CPU processes, of one engine.
        element: Bytes of a weight or a key as it is computed with.
        sequences: Sequences at a time.
        step_tokens: Tokens in one step.
        block: Tokens in a block of the cache.
        adapters: Slots for LoRA adapters.
        adapter_rank: Rank of these.
        eager: Whether it does without CUDA graphs.
        steps_under_way: Steps that are planned and not yet done; vLLM plans one ahead on GPUs.
    """

    max_model_len: int
    tensor_parallel_size: int = 1
    element: int = 2
    sequences: int = GPU_STEP[0]
    step_tokens: int = GPU_STEP[1]
    block: int = GPU_STEP[2]
    adapters: int = 0
    adapter_rank: int = 0
    eager: bool = False
    steps_under_way: int = 2


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one GPU of an engine, or of one engine on CPUs, by what holds them."""

    weights: int
    cache: int
    activations: int
    adapters: int
    overhead: int

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        return sum(vars(self).values())


def engine_memory(shape: Shape, settings: Settings, *, on_gpu: bool) -> EngineMemory | None:
    """Memory of one engine with a cache for one sequence of its longest. Pure.

    >>> attention = Attention(64, 8, 128, windows=(None,) * 64)
    >>> qwen3_32b = Shape(32_762_123_264, 5120, 25_600, 64, 1024, 151_936, attention)
    >>> memory = engine_memory(qwen3_32b, Settings(40_960), on_gpu=True)
    >>> round(memory.weights / GIB), round(memory.cache / GIB)
    (61, 10)

    Args:
        shape: The model's sizes.
        settings: How the engine is run.
        on_gpu: Whether it has GPUs; on CPUs the cache counts apart, as its size is given.

    Returns:
        Bytes by part; None where what the model keeps for a token is not known.
    """
    cache = cache_bytes(shape.attention, settings)
    if cache is None:
        return None
    size = settings.tensor_parallel_size
    stored = shape.stored_bytes if shape.stored_bytes is not None else shape.num_weights * settings.element
    adapters = settings.adapters * adapter_weights(shape, settings.adapter_rank) * settings.element
    overhead = CPU_PROCESS
    if on_gpu:
        overhead = LIBRARIES + (BETWEEN_GPUS if size > 1 else 0) + (0 if settings.eager else GRAPHS)
    return EngineMemory(
        weights=stored // size,
        cache=cache,
        activations=_activations(shape, settings),
        adapters=adapters // size,
        overhead=overhead,
    )


def cache_bytes(attention: Attention | None, settings: Settings) -> int | None:
    """Key-value cache for one sequence of the longest, on each GPU of an engine. Pure.

    A layer keeps a key and a value of each of its heads for each token: 128 KiB a token in Llama 3.1 8B, in bf16. With
    tensor parallelism each GPU keeps its share of the heads, one at least. A layer with a sliding window keeps the
    window and the tokens of the steps under way.

    >>> llama_8b = Attention(32, 8, 128, windows=(None,) * 32)
    >>> (cache_bytes(llama_8b, Settings(8192)) - cache_bytes(llama_8b, Settings(4096))) // 4096 // 1024
    128

    Args:
        attention: What the model keeps for a token; None where that is not known.
        settings: How the engine is run.

    Returns:
        Bytes, with one block that vLLM holds back; None where it is not known.
    """
    if attention is None:
        return None
    heads = max(1, attention.num_kv_heads // settings.tensor_parallel_size)
    width = attention.latent or 2 * heads * attention.head_size
    whole = math.ceil(settings.max_model_len / settings.block)
    blocks = 0
    for window in attention.windows:
        kept = None if window is None else window - 1 + settings.steps_under_way * settings.step_tokens
        if kept is None or kept >= settings.max_model_len:
            blocks += whole + (window is not None)
        else:
            blocks += math.ceil(kept / settings.block) + 1
    return (blocks + len(attention.windows)) * settings.block * width * settings.element


def _activations(shape: Shape, settings: Settings) -> int:
    """The largest step: the residual stream twice, and an MLP or an attention beside it; then the logits.

    Of the logits there are the model's own, a copy in fp32 and what sampling draws from.
    """
    size = settings.tensor_parallel_size
    attention = shape.attention
    query = attention.num_heads * attention.head_size if attention else shape.hidden
    inner = max(3 * shape.intermediate, 2 * query + 2 * shape.kv_width) // size
    step = settings.step_tokens * (2 * shape.hidden + inner) * settings.element
    logits = settings.sequences * shape.vocab_size * (settings.element + 2 * _FP32)
    return step + logits


def longest_that_fits(shape: Shape, settings: Settings, limit: int, *, on_gpu: bool) -> int:
    """The largest max_model_len, in steps of 1,024 tokens, with which an engine fits.

    Args:
        shape: The model's sizes.
        settings: How the engine is run, with a max_model_len that does not fit.
        limit: Bytes that it may take.
        on_gpu: Whether it has GPUs.

    Returns:
        Tokens; 0 where none fits.
    """
    low, high = 0, settings.max_model_len // 1024
    while low < high:
        middle = (low + high + 1) // 2
        memory = engine_memory(shape, replace(settings, max_model_len=1024 * middle), on_gpu=on_gpu)
        low, high = (middle, high) if memory is not None and memory.total <= limit else (low, middle - 1)
    return 1024 * low
