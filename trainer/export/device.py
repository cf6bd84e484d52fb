"""How export uses the GPUs: one use after another, each of which leaves them free for the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.child import run_in_child
from trainer.config import ExportConfig
from trainer.errors import TrainerError
from trainer.export.check import device_of_the_gate
from trainer.model import causal_lm


@dataclass(frozen=True)
class DeviceUse:
    """What is done around each use of the GPUs: the trained model's, vLLM's, the written folder's.

    vLLM compares the free memory of the whole GPU with its share when it starts, and a process keeps its CUDA context
    as long as it lives. So each use is a process of its own where there is a GPU. A CPU's memory is free again without.

    Attributes:
        claim: Called before each use; raises where the GPUs are not free.
        explain: What vLLM's last words mean for the settings; None where they are not about memory.
        apart: Whether each use is a process of its own; None is where there is a GPU.
    """

    claim: Callable[[], None] = lambda: None
    explain: Callable[[str], str | None] = lambda words: None
    apart: bool | None = None

    def call(self, function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 - what the function returns
        """Call a function that uses the GPUs.

        Args:
            function: Of a module.
            *arguments: Can be pickled.

        Returns:
            What it returns.
        """
        self.claim()
        if torch.cuda.is_available() if self.apart is None else self.apart:
            return run_in_child(f"{function.__module__}:{function.__name__}", *arguments)
        return function(*arguments)


@contextmanager
def memory_in_words(export: ExportConfig) -> Iterator[None]:
    """Turn a GPU's want of memory into an error with the setting that helps.

    Args:
        export: The section.

    Yields:
        Nothing.

    Raises:
        TrainerError: The GPU's memory did not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = str(error).strip().splitlines()[0]
        more = 2 * export.tensor_parallel_size
        raise TrainerError(
            f"export ran out of the GPU's memory: {words}. export.tensor_parallel_size is "
            f"{export.tensor_parallel_size}; with {more} the model is spread over {more} GPUs of a node"
        ) from None


def placed(model: Any, num_gpus: int) -> Any:  # noqa: ANN401 - transformers' or PEFT's
    """The model on the device that it is measured on, spread over several GPUs where one does not hold it.

    Args:
        model: Of transformers or PEFT, on the CPU or (4-bit weights) where it was loaded.
        num_gpus: How many of this process's GPUs may hold a part.

    Returns:
        The model; its inputs go to, and its outputs come from, the device of its first parameter.
    """
    if num_gpus == 1 or not torch.cuda.is_available():
        return model.to(device_of_the_gate())
    if len(set(getattr(causal_lm(model), "hf_device_map", {}).values())) > 1:
        return model  # spread when it was loaded
    from accelerate import dispatch_model
    from accelerate.utils import get_max_memory

    memory = {device: num_bytes for device, num_bytes in get_max_memory().items() if device in range(num_gpus)}
    return dispatch_model(model, device_map_of(model, memory))


def device_map_of(model: nn.Module, memory: Mapping[int | str, int]) -> dict[str, int | str]:
    """Which device holds which part of a model, in even shares; no layer is cut.

    Args:
        model: Of transformers or PEFT.
        memory: Bytes that each device can hold.

    Returns:
        A device for each module by name.

    Raises:
        TrainerError: The devices do not hold it.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(getattr(causal_lm(model), "_no_split_modules", None) or [])
    even = get_balanced_memory(model, max_memory=dict(memory), no_split_module_classes=whole)
    places: dict[str, int | str] = infer_auto_device_map(model, max_memory=even, no_split_module_classes=whole)
    if left := [name for name, device in places.items() if device in ("cpu", "disk") and device not in memory]:
        held = sum(memory.values()) / 2**30
        raise TrainerError(
            f"the exported model does not fit the {len(memory)} GPUs of export.tensor_parallel_size, which have "
            f"{held:.1f} GiB free ({len(left)} of its parts are left over): raise it"
        )
    return places
