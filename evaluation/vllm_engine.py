"""Ray Data's engine actor, which waits for its GPUs before it starts, and says why it did not start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

from evaluation.engine_memory import EngineSettings, last_words, memory_problem
from evaluation.errors import EvaluationError
from evaluation.gpu import wait_until_free


class Engine(vLLMEngineStageUDF):
    """One engine, in the actor that Ray Data made for it.

    Args:
        settings: What decides whether it fits; for messages.
        **arguments: Of Ray Data's own.

    Raises:
        EvaluationError: Its GPUs did not become free, or it did not start, with its last words.
    """

    def __init__(self, *, settings: EngineSettings, **arguments: Any) -> None:  # noqa: ANN401 - Ray Data's
        if settings.cpu_cache_gib is None:
            wait_until_free(settings.gpu_memory_share, f"{settings.section}.gpu_memory_share")
        logs = {path: path.stat().st_size for path in _logs()}
        try:
            super().__init__(**arguments)
        except Exception as error:
            printed = "\n".join(_text_after(path, size) for path, size in logs.items())
            words = f"{printed}\n{type(error).__name__}: {error}"
            raise EvaluationError(memory_problem(settings, words) or last_words(words) or words.strip()) from error


def _logs() -> list[Path]:
    """The files that this process, and the processes that it starts, print to."""
    places = {Path(f"/proc/self/fd/{number}").readlink() for number in (1, 2)}
    return [path for path in sorted(places) if path.is_file()]


def _text_after(path: Path, size: int) -> str:
    with path.open("rb") as file:
        file.seek(size)
        return file.read().decode("utf-8", errors="replace")
