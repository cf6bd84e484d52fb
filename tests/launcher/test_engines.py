"""Memory of vLLM's engines: by hand, against published figures, and against what a real engine on CPUs reports."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher import plan, ray_cluster
from launcher.config import RunConfig, load_config
from launcher.estimate import engines, known_models, weights
from launcher.estimate.engines import (
    CPU_STEP,
    GIB,
    GPU_STEP,
    LARGE_GPU_STEP,
    Settings,
    cache_bytes,
    engine_memory,
    longest_that_fits,
)
from launcher.estimate.known_models import known_config
from launcher.estimate.served import served_models
from launcher.estimate.shapes import Shape, read_shape, shape_named
from launcher.gpus import MIB
from launcher.ray_cluster import Resources

H100 = 81_559 * MIB
NODE = Resources(num_cpus=64, num_gpus=8, gpu_memory=H100, gpu_kind="NVIDIA H100 80GB HBM3")
# Numbers of parameters as the hub shows them for the published files; Qwen3's smallest there count tied weights twice.
PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "google/gemma-3-270m-it": 268_098_176,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
    "google/gemma-3-27b-it": 27_432_406_640,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "microsoft/phi-4": 14_659_507_200,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151_936,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
}
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 102_400,
    "max_position_embeddings": 163_840,
    "tie_word_embeddings": False,
}


def named(name: str) -> Shape:
    shape = shape_named(name)
    assert shape is not None
    return shape


def a_token(shape: Shape, **settings: Any) -> int:
    """Bytes of cache that one more token takes."""
    longer, shorter = (cache_bytes(shape.attention, Settings(length, **settings)) for length in (3200, 1600))
    assert longer is not None and shorter is not None
    return (longer - shorter) // 1600


@pytest.mark.parametrize(("name", "num_weights"), PUBLISHED.items(), ids=[name.partition("/")[2] for name in PUBLISHED])
def test_usual_models_have_their_published_weights(name: str, num_weights: int) -> None:
    assert named(name).num_weights == num_weights


def test_experts_and_latent_attention_are_counted() -> None:
    moe, deepseek = read_shape(QWEN3_MOE), read_shape(DEEPSEEK_V2_LITE)
    assert moe is not None and deepseek is not None
    assert moe.num_weights == 30_532_122_624  # as the hub shows Qwen3-30B-A3B
    assert deepseek.num_weights == 15_706_484_224  # DeepSeek-V2-Lite
    assert a_token(deepseek) == 27 * (512 + 64) * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED, ids=[name.partition("/")[2] for name in PUBLISHED])
def test_weights_are_those_that_transformers_builds(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = known_config(name)
    assert known is not None
    config = AutoConfig.for_model(**known)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    assert sum(weight.numel() for weight in model.parameters()) == named(name).num_weights


def test_cache_of_a_token_by_hand() -> None:
    assert a_token(named("meta-llama/Llama-3.1-8B")) == 128 * 1024
    assert a_token(named("Qwen/Qwen3-32B")) == 256 * 1024
    assert a_token(named("Qwen/Qwen3-32B"), tensor_parallel_size=2) == 128 * 1024
    # Of 4 key-value heads each of 8 GPUs keeps a whole one.
    assert a_token(named("Qwen/Qwen2.5-7B"), tensor_parallel_size=8) == 28 * 128 * 2 * 2
    assert a_token(named("meta-llama/Llama-3.1-8B"), element=4) == 256 * 1024


def test_a_window_bounds_the_cache() -> None:
    mistral = named("mistralai/Mistral-7B-v0.1")
    long, longer = (cache_bytes(mistral.attention, Settings(length, step_tokens=2048)) for length in (16_384, 32_768))
    assert long == longer
    gemma = named("google/gemma-3-27b-it")
    assert gemma.attention is not None
    assert [window is None for window in gemma.attention.windows].count(True) == 10  # of 62 layers


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("Qwen/Qwen3-32B-AWQ", 19.3), ("Qwen/Qwen2.5-72B-Instruct-AWQ", 41.6), ("Qwen/Qwen3-32B-FP8", 34.3)],
)
def test_quantized_weights_are_as_large_as_their_files(name: str, gigabytes: float) -> None:
    stored = named(name).stored_bytes
    assert stored is not None
    assert stored / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_files_say_how_large_quantized_weights_are(tmp_path: Path) -> None:
    known = known_config("Qwen/Qwen3-0.6B")
    assert known is not None
    (tmp_path / "config.json").write_text(json.dumps(known | {"quantization_config": {"quant_method": "fp8"}}))
    alone = named(str(tmp_path))
    assert alone.num_weights == PUBLISHED["Qwen/Qwen3-0.6B"]  # a config.json is enough
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [10, 10], "data_offsets": [0, 100]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert named(str(tmp_path)).stored_bytes == 100


def test_gemma_says_little_of_itself(tmp_path: Path) -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    vision = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model"}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}
    published = {"model_type": "gemma3", "text_config": text | {"sliding_window": 1024}, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert named(str(tmp_path)) == named("google/gemma-3-4b-it")


def test_what_is_not_understood_is_unknown() -> None:
    for name in ("owner/name", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct-1M"):
        assert shape_named(name) is None, name
    assert read_shape({"model_type": "gpt2", "n_embd": 768}) is None
    mixed = read_shape(DEEPSEEK_V2_LITE | {"mamba_d_state": 16})
    assert mixed is not None
    assert engine_memory(mixed, Settings(4096), on_gpu=True) is None


# --- what a run serves ----------------------------------------------------------------------------


@pytest.fixture
def eight_b(repository: Path) -> RunConfig:
    return load_config(repository / "configs/8b.yaml", [f"data.path={repository / 'README.md'}"])


def with_judge(config: RunConfig, **values: Any) -> RunConfig:
    return config.model_copy(update={"judge": config.judge.model_copy(update=values)})


def check(config: RunConfig, resources: Resources, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(ray_cluster, "local_resources", lambda: resources)
    return plan.problems(config)


ONE_GPU = {"tensor_parallel_size": 1, "max_model_len": None, "engines": 1}


def test_the_large_judge_fits_its_node(eight_b: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(eight_b, NODE, monkeypatch) == []
    judge, generation = eight_b.judge, eight_b.generation
    assert judge.type == "vllm"
    assert judge.engines * judge.tensor_parallel_size == generation.engines == 8


def test_a_judge_that_does_not_fit_is_refused(eight_b: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = check(with_judge(eight_b, **ONE_GPU), NODE, monkeypatch)
    assert problem.startswith("judge: an engine for Qwen/Qwen3-32B needs 76.6 GiB of each GPU (weights 61.0 GiB, one ")
    assert "one sequence of 40,960 tokens 10.0 GiB" in problem
    assert "has 69.5 GiB, judge.gpu_memory_share = 0.9 of 79.6 GiB" in problem
    assert "what fits: judge.tensor_parallel_size=2, or judge.max_model_len=11264" in problem


@pytest.mark.parametrize("model", ["Qwen/Qwen3-32B", "Qwen/Qwen2.5-72B-Instruct", "meta-llama/Llama-3.1-70B-Instruct"])
@pytest.mark.parametrize("gpu", [81_559, 40_960, 24_564])
def test_what_is_named_as_fitting_fits(
    model: str, gpu: int, eight_b: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Resources(64, 8, gpu_memory=gpu * MIB)
    small = {"method": "qlora"}
    config = RunConfig.model_validate(
        eight_b.model_dump(mode="json") | {"tuning": small, "deepspeed": {"stage": 2}, "data": {"path": "README.md"}}
    )
    monkeypatch.chdir(Path(__file__).parents[2])
    asked = with_judge(config, model=model, **ONE_GPU | {"engines": 8})
    problem = next(line for line in check(asked, node, monkeypatch) if line.startswith("judge: "))
    if "no setting that was tried fits" in problem:
        assert gpu == 24_564
        return
    for way in problem.partition("what fits: ")[2].split(", or "):
        values = {key: float(value) for key, value in re.findall(r"judge\.(\w+)=([\d.]+)", way)}
        assert values
        whole = {key: value if key == "gpu_memory_share" else int(value) for key, value in values.items()}
        changed = with_judge(asked, **whole)
        assert [line for line in check(changed, node, monkeypatch) if line.startswith("judge")] == [], way


def test_every_user_of_an_engine_is_checked(eight_b: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    large = "Qwen/Qwen2.5-72B-Instruct"
    tree = eight_b.model_dump(mode="json")
    tree["judge"] = {"type": "jury", "judges": [{"type": "vllm", "model": name} for name in (large, "Qwen/Qwen3-8B")]}
    tree["generation"]["models"] = {"rival": large}
    tree["cluster"]["gpu_memory_gib"] = 20
    found = check(RunConfig.model_validate(tree), NODE, monkeypatch)
    keys = [line.partition(" needs")[0] for line in found if " of each GPU" in line]
    assert keys == [
        "generation: an engine for base and tuned",
        "generation: an engine for rival",
        f"judge.judges.0: an engine for {large}",
        "judge.judges.1: an engine for Qwen/Qwen3-8B",
    ]


def test_exports_check_has_its_own_share(eight_b: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = eight_b.model_dump(mode="json") | {"export": {"gpu_memory_share": 0.2}}
    (problem,) = check(RunConfig.model_validate(tree), NODE, monkeypatch)
    assert problem.startswith("export: an engine for the check of the exported model needs 17.5 GiB")
    assert problem.endswith("what fits: export.gpu_memory_share=0.95")
    tree["export"] = {"gpu_memory_share": 0.2, "vllm_prompts": 0}
    assert check(RunConfig.model_validate(tree), NODE, monkeypatch) == []


def test_heads_must_divide(eight_b: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = check(with_judge(eight_b, tensor_parallel_size=3, engines=2), NODE, monkeypatch)
    assert problem == (
        "judge.tensor_parallel_size = 3 does not divide the 64 attention heads of Qwen/Qwen3-32B: take one of 1, 2, 4, "
        "8, 16"
    )


def test_an_adapter_is_served_beside_its_base(eight_b: RunConfig) -> None:
    tree = eight_b.model_dump(mode="json") | {"tuning": {"method": "lora", "rank": 16}}
    (served, *_), _ = served_models(RunConfig.model_validate(tree), ["generate"], on_gpu=True, gpu_memory=H100)
    memory = engine_memory(served.shape, served.settings, on_gpu=True)
    assert memory is not None
    assert memory.adapters == 2 * 41_943_040 * 2  # two slots in bf16


def test_plan_has_a_line_for_each_user(eight_b: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "local_resources", lambda: NODE)
    lines = plan.describe(eight_b, tmp_path).splitlines()
    assert "resources  this machine has 8 GPUs and 64 CPUs; GPU NVIDIA H100 80GB HBM3, 79.6 GiB" in lines
    judge = next(line for line in lines if line.startswith("engine     judge, Qwen/Qwen3-32B: needs 37.4 GiB of each"))
    assert judge.endswith("has 69.5 GiB, 0.9 of 79.6 GiB; 4 engines on 8 GPUs")
    assert [line.split(",")[0] for line in lines if line.startswith("engine")] == [
        "engine     generation",
        "engine     judge",
        "engine     export",
    ]
    unknown = plan.describe(with_judge(eight_b, model="owner/unknown"), tmp_path)
    assert "engine     judge (owner/unknown): the model's sizes are not known here" in unknown


def test_a_cache_on_cpus_must_hold_a_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.json").write_text("[]")
    tree = {
        "run": {"name": "small"},
        "model": {"name_or_path": "HuggingFaceTB/SmolLM2-1.7B-Instruct"},
        "data": {"path": str(tmp_path / "rows.json")},
        "tuning": {"method": "lora"},
    }
    (problem,) = check(RunConfig.model_validate(tree), Resources(num_cpus=2, num_gpus=0), monkeypatch)
    # 24 layers x 2 x 32 heads x 64 x 2 bytes = 192 KiB a token; 8,192 of them, and a block of each layer.
    assert problem == (
        "generation.cpu_cache_gib = 1: one sequence of 8,192 tokens for base and tuned needs 1.5 GiB; what fits: "
        "generation.cpu_cache_gib=1.6, or generation.max_model_len=5248"
    )
    for values in ({"cpu_cache_gib": 1.6}, {"max_model_len": 5248}):
        fits = RunConfig.model_validate(tree | {"generation": values})
        assert check(fits, Resources(num_cpus=2, num_gpus=0), monkeypatch) == []


def test_engines_on_cpus_share_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.json").write_text("[]")
    tree = {
        "run": {"name": "small"},
        "model": {"from_scratch": {}},
        "data": {"path": str(tmp_path / "rows.json")},
        "generation": {"engines": 4, "cpu_cache_gib": 3},
    }
    monkeypatch.setattr("launcher.estimate.fit.machine_memory", lambda _: 8 * GIB)
    (problem,) = check(RunConfig.model_validate(tree), Resources(num_cpus=4, num_gpus=0), monkeypatch)
    assert re.match(
        r"generation.engines = 4: .* takes about 4\.\d GiB of memory, and this machine has 8.0 GiB", problem
    )
    assert problem.endswith("what fits: generation.engines=1")


def test_steps_are_as_large_as_the_engines_own() -> None:
    from evaluation import vllm_cluster

    assert CPU_STEP[:2] == vllm_cluster._BATCH_CPU
    assert GPU_STEP[:2] == vllm_cluster._BATCH_GPU
    assert LARGE_GPU_STEP[:2] == vllm_cluster._BATCH_LARGE_GPU


def test_the_longest_context_is_searched() -> None:
    shape = named("Qwen/Qwen3-32B")
    longest = longest_that_fits(shape, Settings(40_960), 70 * GIB, on_gpu=True)
    fits, one_more = (engine_memory(shape, Settings(length), on_gpu=True) for length in (longest, longest + 1024))
    assert fits is not None and one_more is not None
    assert fits.total <= 70 * GIB < one_more.total
    assert longest_that_fits(shape, Settings(40_960), 10 * GIB, on_gpu=True) == 0


def test_the_examples_hold() -> None:
    assert sum(doctest.testmod(module).failed for module in (engines, known_models, weights)) == 0


# --- against a real engine ------------------------------------------------------------------------

ENGINE = """
import json, sys
from vllm import LLM
from vllm.v1.core import kv_cache_utils as cache

asked = json.loads(sys.argv[1])
llm = LLM(
    model=asked["model"], skip_tokenizer_init=True, load_format="dummy", enforce_eager=True, disable_log_stats=True,
    kv_cache_memory_bytes=asked["cache"], max_model_len=asked["max_model_len"], max_num_batched_tokens=4096,
    max_num_seqs=256, trust_remote_code=False,
)
config = llm.llm_engine.vllm_config
specs = llm.llm_engine.engine_core.engine_core.model_executor.get_kv_cache_specs()[0]
groups = cache.get_kv_cache_groups(config, dict(specs))
print(json.dumps({
    "blocks": config.cache_config.num_gpu_blocks,
    "block": config.cache_config.block_size,
    "needs": cache._max_memory_usage_bytes_from_groups(config, groups),
}))
"""
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
KINDS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
WINDOWED = TINY | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 8,
    "head_dim": 32,
    "sliding_window": 512,
    "layer_types": KINDS * 2,
    "query_pre_attn_scalar": 32,
}


@pytest.mark.slow
@pytest.mark.parametrize("config", [TINY, WINDOWED], ids=["grouped heads", "windows"])
def test_a_real_engine_needs_what_is_told(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = {"model": str(tmp_path), "cache": 256 * MIB, "max_model_len": 32_768}
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ENGINE, json.dumps(asked)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    said = json.loads(answer.stdout.splitlines()[-1])
    sequences, step_tokens, block = CPU_STEP
    settings = Settings(32_768, sequences=sequences, step_tokens=step_tokens, block=block, steps_under_way=1)
    shape = named(str(tmp_path))
    told = cache_bytes(shape.attention, settings)
    assert told is not None
    print(f"needs {said['needs']:,} bytes; told {told:,}; {said['blocks']} blocks of {said['block']} tokens")
    a_block_of_each_layer = config["num_hidden_layers"] * block * 2 * 2 * 32 * 2
    assert said["block"] == block
    assert told == said["needs"] + a_block_of_each_layer
    if config is TINY:  # with one kind of layer, blocks are tokens
        assert said["blocks"] * block == 256 * MIB // a_token(shape)
