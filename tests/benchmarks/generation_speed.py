"""Tokens a second of the generation stage's engine over Ray Data, beside plain `vllm.LLM.generate`; loading left out.

Both answer the same prompts greedily with the same random model, `cpus` threads for the model each, in turns, with an
engine of their own each time. Plain vLLM is measured from the call to its end, and over Ray Data from the moment when
the engine is ready to the last completion, which is written to a file as the stage does. Plain vLLM runs as it does
by default on a CPU, with engine and worker in processes of their own, and once more all in one process.

    python tests/benchmarks/generation_speed.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

KINDS = ("ray", "plain", "plain in one process")


def prompts(num: int) -> list[list[int]]:
    """Write prompts of 41 to 121 tokens."""
    lengths = [40 + number * 37 % 81 for number in range(num)]
    return [[1, *(5 + (number * 7919 + step * 104729) % 270 for step in range(length))] for number, length in
            enumerate(lengths)]  # fmt: skip


def build_model(folder: Path, hidden: int, layers: int) -> str:
    """Write a random Llama that says anything but a stop token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.evaluation import tiny_models

    fast = tiny_models.tokenizer()
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=512, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[:5] = 0
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def plain(model: str, options: argparse.Namespace) -> tuple[int, float]:
    """Measure vLLM on its own; tokens and seconds."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**30, disable_log_stats=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=options.max_tokens, ignore_eos=True)
    asked = [{"prompt_token_ids": ids} for ids in prompts(options.rows)]
    started = time.perf_counter()
    outputs = llm.generate(asked, sampling, use_tqdm=False)
    wall_s = time.perf_counter() - started
    return sum(len(output.outputs[0].token_ids) for output in outputs), wall_s


def over_ray(model: str, options: argparse.Namespace) -> tuple[int, float]:
    """Measure the product; tokens and seconds."""
    import ray
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    from evaluation import vllm_cluster
    from evaluation.rows import append_rows

    ready: list[float] = []
    start = ActorPoolMapOperator.start

    def start_and_look_at_the_clock(self: Any, *args: Any) -> None:
        self.data_context.wait_for_min_actors_s = 300  # no row is sent before the engine is ready
        start(self, *args)
        ready.append(time.perf_counter())

    ActorPoolMapOperator.start = start_and_look_at_the_clock
    ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    spec = vllm_cluster.EngineSpec(model, dtype="float32", cpu_cache_gib=1.0, cpus=options.cpus)
    sampling = {"temperature": 0.0, "max_tokens": options.max_tokens, "ignore_eos": True}
    asked = [vllm_cluster.Request(str(number), ids, sampling) for number, ids in enumerate(prompts(options.rows))]
    num_tokens = 0
    with tempfile.TemporaryDirectory() as folder:
        for completion in vllm_cluster.complete(spec, asked):
            assert completion.text is not None, completion.cause
            append_rows(Path(folder) / "responses.jsonl", [{"key": completion.key, "response": completion.text}])
            num_tokens += len(completion.token_ids)
        wall_s = time.perf_counter() - ready[0]
    ray.shutdown()
    return num_tokens, wall_s


def measure(kind: str, model: str, options: argparse.Namespace) -> float:
    """Measure one kind in a process of its own; tokens a second."""
    command = [sys.executable, __file__, "--kind", kind, "--model", model]
    command += [f"--{name}={getattr(options, name)}" for name in ("rows", "cpus")]
    command += ["--max-tokens", str(options.max_tokens)]
    threads = {"OMP_NUM_THREADS": str(options.cpus), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    one = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if kind == KINDS[2] else {}
    environment = os.environ | threads | one | {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    # vLLM's own processes print as well.
    (found,) = (line for line in answer.stdout.splitlines() if line.startswith("measured "))
    num_tokens, wall_s = json.loads(found.removeprefix("measured "))
    print(f"{kind}: {num_tokens} tokens in {wall_s:.2f} s, {num_tokens / wall_s:.0f} tokens/s", flush=True)
    return float(num_tokens / wall_s)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--cpus", type=int, default=1, help="threads of the model")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(
            "\nmeasured", json.dumps((over_ray if options.kind == "ray" else plain)(options.model, options)), flush=True
        )
        return
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(Path(folder), options.hidden, options.layers)
        for _ in range(options.rounds):
            for kind in (*KINDS, *KINDS[::-1]):  # forth and back, so that a machine that drifts favours none
                speeds[kind].append(measure(kind, model, options))
    medians = {kind: statistics.median(of_kind) for kind, of_kind in speeds.items()}
    result = {
        "rows": options.rows, "max_tokens": options.max_tokens, "tokens_per_s": speeds, "median_tokens_per_s": medians,
        "ratio": {kind: medians["ray"] / medians[kind] for kind in KINDS[1:]},
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
