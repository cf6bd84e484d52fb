"""A real vLLM server on loopback: as the api judge, killed in the middle and back; and as a model under test."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from evaluation.config import ApiJudge, ApiModel, GenerationConfig
from evaluation.errors import EvaluationError
from evaluation.generate import generate
from evaluation.judge import judge
from evaluation.rows import Row, read_rows, write_rows
from tests.evaluation import tiny_models
from tests.evaluation.test_judge import write_responses

NUM_ROWS = 40


class Server:
    """vLLM's server with a tiny model, as its own process group."""

    def __init__(self, model: Path) -> None:
        self._model = model
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def __enter__(self) -> "Server":
        # What `vllm serve` runs; that command itself asks for a package named vllm, which the CPU build is not.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self._model]
        command += ["--served-model-name", "judge"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        command += ["--kv-cache-memory-bytes", str(100 * 2**20), "--disable-uvicorn-access-log"]
        # Else a model that says anything fills its budget with white space.
        command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
        environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1",
                                    "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip
        self._process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 150
        while not self._is_healthy():
            assert time.monotonic() < deadline and self._process.poll() is None
            time.sleep(0.5)
        return self

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __exit__(self, *_: object) -> None:
        self.kill()


@pytest.mark.slow
def test_a_server_that_is_killed_in_the_middle_and_comes_back(tmp_path):
    model = tiny_models.build(tmp_path / "model", max_positions=2048)
    write_responses(tmp_path, num=NUM_ROWS, tuned=lambda n: f"cat{n} naps{n}")
    scores = tmp_path / "scores/tuned.jsonl"

    with Server(model) as server:
        # A random model: it cannot pass the self-test, and at this temperature it says something new each time.
        config = ApiJudge(
            type="api", base_url=f"http://127.0.0.1:{server.port}/v1", model="judge", api_key_env=None, self_test=False,
            concurrency=4, temperature=1.0, max_tokens=32, repeats=5, max_retries=1, timeout_s=20, min_scored=0.5,
        )  # fmt: skip

        def kill_at_a_quarter() -> None:
            while not scores.exists() or scores.read_bytes().count(b"\n") < NUM_ROWS * 5 // 4:
                time.sleep(0.01)
            server.kill()

        killer = threading.Thread(target=kill_at_a_quarter)
        killer.start()
        with pytest.raises(EvaluationError, match="requests in a row failed"):
            judge(config, ["tuned"], tmp_path)
        killer.join()
        kept = [row for row in read_rows(scores, torn_end=True) if row["state"] == "scored"]
        assert len(kept) >= NUM_ROWS * 5 // 8

        server.__enter__()
        result = judge(config, ["tuned"], tmp_path)
        answers = generate_at(server, tmp_path / "under test")
    rows = read_rows(scores)
    assert result["models"]["tuned"]["reused"] == len(kept)
    assert Counter((row["id"], row["repeat"]) for row in rows) == Counter(
        (f"r{n}", r) for n in range(NUM_ROWS) for r in range(5)
    )
    assert {row["state"] for row in rows} <= {"scored", "judge_failed"}
    assert all(0 <= row["score"] <= 100 and row["num_prompt_tokens"] > 100 for row in rows if row["state"] == "scored")
    # The same server answers the training prompt as the model's own logits do.
    llama, tokenizer = LlamaForCausalLM.from_pretrained(model), tiny_models.tokenizer()
    for row in answers:
        ids = tokenizer(row["prompt"])["input_ids"]
        expected = tiny_models.greedy(llama, ids, 12)
        assert row["response"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert (row["num_prompt_tokens"], row["num_response_tokens"]) == (len(ids), len(expected))


def generate_at(server: Server, run_dir: Path) -> list[Row]:
    prompts = [f"Below is a task. Number {number}" for number in range(6)]
    test_set = [
        {"id": f"r{number}", "messages": [], "prompt": prompt, "prompt_token_ids": [1], "reference": "x"}
        for number, prompt in enumerate(prompts)
    ]
    write_rows(run_dir / "data/test.jsonl", test_set)
    source = ApiModel(
        type="api", base_url=f"http://127.0.0.1:{server.port}/v1", model="judge", api_key_env=None, prompt="trained"
    )
    generate(GenerationConfig(max_tokens=12, models={"served": source}), run_dir, {})
    return read_rows(run_dir / "responses/served.jsonl")
