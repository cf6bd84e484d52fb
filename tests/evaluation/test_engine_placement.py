"""Engines of several GPUs on a Ray cluster whose GPUs are logical: Ray places them as real ones, a stand-in answers."""

import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import ray
from ray.llm._internal.batch.stages.base import StatefulStageUDF

from evaluation import vllm_engine
from evaluation.errors import EvaluationError
from evaluation.vllm_cluster import EngineSpec, Request, complete
from tests.evaluation import tiny_models

_LIMIT_S = 120


class StandIn(StatefulStageUDF):
    """Takes the arguments of Ray Data's vLLM actor, and answers with the executor and the GPUs that it was given."""

    def __init__(self, data_column: str, expected_input_keys: list[str], engine_kwargs: dict[str, Any], **_: Any):
        super().__init__(data_column, expected_input_keys)
        self._text = f"{engine_kwargs['distributed_executor_backend']} {len(ray.get_gpu_ids())}"

    async def udf(self, batch: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        for row in batch:
            yield {
                self.IDX_IN_BATCH_COLUMN: row[self.IDX_IN_BATCH_COLUMN],
                "generated_text": self._text,
                "generated_tokens": [5],
                "logprobs": None,
                "request_id": 0,
                "__inference_error__": "",
            }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.build(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture(scope="module", autouse=True)
def four_gpus():
    ray.init(num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def answers(spec: EngineSpec) -> list[str | None]:
    """All texts; a wait for resources that never come is a failure, not a hang."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append([answer.text for answer in complete(spec, [Request("a", [1], {}), Request("b", [1], {})])])
        except BaseException as error:  # noqa: BLE001 - raised below
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_LIMIT_S)
    assert found, f"no answer after {_LIMIT_S} s: {ray.available_resources()} are free"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@pytest.mark.slow
def test_the_next_model_gets_the_gpus_of_the_last(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "Engine", StandIn)
    spec = EngineSpec(model, engines=2, tensor_parallel_size=2)
    assert answers(spec) == ["mp 2", "mp 2"]
    assert not [group for group in ray.util.placement_group_table().values() if group["state"] == "CREATED"]
    assert answers(EngineSpec(model, engines=1, tensor_parallel_size=4)) == ["mp 4", "mp 4"]


def test_an_engine_larger_than_a_node_is_refused(model: str) -> None:
    with pytest.raises(EvaluationError, match=r"generation\.tensor_parallel_size = 8 needs 8 GPUs of one node.*to 4"):
        next(complete(EngineSpec(model, tensor_parallel_size=8), [Request("a", [1], {})]))
