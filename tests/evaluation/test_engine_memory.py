"""What vLLM's words about memory mean, by the words of the installed vLLM itself where it can be made to say them."""

from types import SimpleNamespace

import pytest

from evaluation.engine_memory import EngineSettings, last_words, memory_problem

GIB = 2**30
GPU = EngineSettings("generation", gpu_memory_share=0.9, tensor_parallel_size=1, max_model_len=8192, engines=8)
CPU = EngineSettings(
    "judge", gpu_memory_share=0.9, tensor_parallel_size=1, max_model_len=128, cpu_cache_gib=4.0, engines=2
)


def said_by_vllm(available: float, needed: float, fits: int) -> str:
    from vllm.v1.core.kv_cache_utils import _check_enough_kv_cache_memory

    with pytest.raises(ValueError) as error:
        _check_enough_kv_cache_memory(int(available * GIB), lambda: int(needed * GIB), 8192, lambda _: fits)
    return f"ValueError: {error.value}"


def test_a_cache_too_small_for_one_sequence() -> None:
    words = said_by_vllm(0.5, 1.0, 4096)
    assert memory_problem(GPU, words) == (
        "a sequence of 8192 tokens needs 1.0 GiB of key-value cache, and the engine has 0.5 GiB beside the model's "
        "weights. Set generation.max_model_len: 4096, or generation.tensor_parallel_size: 2, or "
        "generation.gpu_memory_share: 0.95"
    )
    assert (memory_problem(CPU, words) or "").endswith("Set judge.cpu_cache_gib: 1.01, or judge.max_model_len: 4096")
    assert "max_model_len" not in (memory_problem(GPU, said_by_vllm(0.5, 1.0, 0)) or "")


def test_weights_that_leave_no_cache() -> None:
    said = memory_problem(GPU, said_by_vllm(-1.0, 1.0, 0))
    assert said == (
        "the model's weights leave nothing of generation.gpu_memory_share = 0.9 for the key-value cache. Set "
        "generation.tensor_parallel_size: 2, or generation.gpu_memory_share: 0.95"
    )
    assert (memory_problem(CPU, said_by_vllm(-1.0, 1.0, 0)) or "").endswith("Set judge.cpu_cache_gib: 8")


def test_a_gpu_that_others_hold() -> None:
    from vllm.v1.worker.utils import request_memory

    snapshot = SimpleNamespace(total_memory=80 * GIB, free_memory=40 * GIB, device_="cuda:0")
    with pytest.raises(ValueError) as error:
        request_memory(snapshot, SimpleNamespace(gpu_memory_utilization=0.9))
    said = memory_problem(GPU, str(error.value))
    assert said == (
        "generation.gpu_memory_share = 0.9 is 72.0 GiB, and 40.0 of the GPU's 80.0 GiB are free: another process holds "
        "the rest (nvidia-smi lists it). Set generation.gpu_memory_share: 0.49"
    )


@pytest.mark.parametrize(
    ("settings", "words", "way_out"),
    [
        (
            GPU,
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB. GPU 0 has a total capacity of "
            "23.64 GiB of which 92.81 MiB is free. Including non-PyTorch memory, this process has 23.53 GiB in use.",
            "the engine ran out of the GPU's memory (CUDA out of memory. Tried to allocate 224.00 MiB.). Set "
            "generation.tensor_parallel_size: 2, or generation.max_model_len: 4096",
        ),
        (
            GPU,
            "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try "
            "lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.",
            "Set generation.gpu_memory_share: 0.85",
        ),
        (
            CPU,
            "ValueError: Available memory on node 0 (2.0/24.0 GiB) on kv cache allocation is less than requested "
            "memory for kv (4.0 GiB). Decrease --kv-cache-memory-bytes",
            "Set judge.cpu_cache_gib: 1.8, or judge.engines: 1",
        ),
        (
            CPU,
            "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.",
            "Set judge.cpu_cache_gib: 2, or judge.engines: 1",
        ),
    ],
)
def test_the_nearest_setting_is_named(settings: EngineSettings, words: str, way_out: str) -> None:
    assert (memory_problem(settings, words) or "").endswith(way_out)


def test_words_about_something_else_are_left_alone() -> None:
    assert memory_problem(GPU, "ValueError: The tokenizer class is not known") is None
    assert last_words("all is well") is None
