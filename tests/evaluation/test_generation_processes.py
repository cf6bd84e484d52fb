"""Generation in processes of its own: killed in the middle, and on engines of two nodes."""

import json
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from evaluation.rows import read_rows, write_rows
from tests.evaluation import tiny_models

REPOSITORY = Path(__file__).parents[2]
SPOKEN = tiny_models.spoken_ids()
NUM_PROMPTS = 1500

GENERATE = """
import json, sys
from pathlib import Path
from evaluation.config import GenerationConfig, ModelSource
from evaluation.generate import generate
from launcher.config import ClusterConfig
from launcher.ray_cluster import ray_cluster

config = GenerationConfig(max_tokens=100, dtype="float32", cpu_cache_gib=0.1)
with ray_cluster(ClusterConfig()):
    counts = generate(config, Path(sys.argv[2]), {"base": ModelSource(path=sys.argv[1])})
print(json.dumps(counts["models"]["base"]))
"""

TWO_NODES = """
import json, os, sys
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else Ray looks for 127.0.0.1 at this machine's own address
import ray
from ray.cluster_utils import Cluster
from evaluation.vllm_cluster import EngineSpec, Request, complete, shares

os.environ["VLLM_HOST_IP"] = "127.0.0.1"
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "node_ip_address": "127.0.0.1"})
for _ in range(2):
    cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
cluster.wait_for_nodes()
ray.init(cluster.address, log_to_driver=False)
prompts = json.loads(sys.argv[2])
sampling = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
spec = EngineSpec(sys.argv[1], dtype="float32", cpu_cache_gib=0.1, engines=2)
answers = list(complete(spec, [Request(str(number), ids, sampling) for number, ids in enumerate(prompts)]))
found = {"keys": [answer.key for answer in answers], "shares": shares(answer.serial for answer in answers),
         "causes": [answer.cause for answer in answers if answer.cause]}
ray.shutdown()
cluster.shutdown()
print(json.dumps(found))
"""

BROKEN = """
import sys
from evaluation.errors import EvaluationError
from evaluation.vllm_cluster import EngineSpec, Request, complete
from launcher.config import ClusterConfig
from launcher.ray_cluster import ray_cluster

spec = EngineSpec(sys.argv[1], dtype="float32", cpu_cache_gib=0.1, engines=2)
with ray_cluster(ClusterConfig()):
    try:
        list(complete(spec, [Request("a", [1], {"max_tokens": 1}), Request("b", [1], {"max_tokens": 1})]))
    except EvaluationError as error:
        print(error)
"""


def prompt_ids(number: int) -> list[int]:
    return [1, *(SPOKEN[(number * step * 7 + step) % len(SPOKEN)] for step in range(1, 10 + number % 7))]


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


@pytest.mark.slow
def test_killed_in_the_middle_only_the_rest_is_generated(tmp_path):
    model = tiny_models.build(tmp_path / "model")
    write_rows(
        tmp_path / "data/test.jsonl",
        [
            {"id": f"r{number}", "category": None, "messages": [], "prompt": f"question {number}",
             "prompt_token_ids": prompt_ids(number), "reference": "answer"}
            for number in range(NUM_PROMPTS)
        ],
    )  # fmt: skip
    path = tmp_path / "responses/base.jsonl"
    process = start(GENERATE, model, tmp_path)
    deadline = time.monotonic() + 180
    while not path.exists() or path.read_bytes().count(b"\n") < NUM_PROMPTS // 10:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    kill_all(family)

    kept = read_rows(path, torn_end=True)
    assert NUM_PROMPTS // 10 <= len(kept) < NUM_PROMPTS * 9 // 10
    with path.open("ab") as file:
        file.write(b'{"id": "torn')
    again = start(GENERATE, model, tmp_path)
    answer, _ = again.communicate(timeout=240)
    counts = json.loads(answer.splitlines()[-1])
    assert (counts["generated"], counts["reused"]) == (NUM_PROMPTS, len(kept))
    # What the engines were asked the second time is what was missing, and nothing else.
    assert counts["rows_by_engine"] == [NUM_PROMPTS - len(kept)]
    rows = read_rows(path)
    assert Counter(row["id"] for row in rows) == Counter(f"r{number}" for number in range(NUM_PROMPTS))
    by_id = {row["id"]: row for row in rows}
    assert all(by_id[row["id"]] == row for row in kept)


@pytest.mark.slow
def test_engines_on_two_nodes_share_the_rows(tmp_path):
    model = tiny_models.build(tmp_path / "model")
    process = start(TWO_NODES, model, json.dumps([prompt_ids(number) for number in range(100)]))
    answer, _ = process.communicate(timeout=240)
    found = json.loads(answer.splitlines()[-1])
    assert found["causes"] == []
    assert sorted(found["keys"], key=int) == [str(number) for number in range(100)]
    assert found["shares"] == [50, 50]  # an engine takes a CPU, and each of the two nodes has one


@pytest.mark.slow
def test_engines_that_cannot_start_are_told_in_their_own_words(tmp_path):
    model = tiny_models.build(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    process = start(BROKEN, model)
    answer, _ = process.communicate(timeout=240)
    assert f"the vLLM engines for {model} failed" in answer
    assert "safetensor" in answer.casefold()
