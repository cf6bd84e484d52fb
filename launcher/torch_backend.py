"""Ray Train's process group of torch, without torch in the process that asks for it.

`ray.train.torch` loads torch where a TorchTrainer is made. This configuration is the same to Ray Train, and loads its
TorchConfig only in the actors that it is carried to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from ray.train.backend import Backend, BackendConfig


@dataclass
class ProcessGroup(BackendConfig):
    """How the workers' process group is made.

    Attributes:
        backend: nccl or gloo.
        timeout_s: longest wait of one collective, in seconds.
    """

    backend: str
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> type[Backend]:
        """Called where the trainer is made, and in the controller."""
        return _TorchBackend

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        """What a worker's function runs in."""
        return _on_the_workers_device


@contextmanager
def _on_the_workers_device() -> Iterator[None]:
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield


class _TorchBackend(Backend):
    """Hands over to Ray Train's own backend, in the controller."""

    share_cuda_visible_devices = True  # as Ray Train's: a worker sees the GPUs of all workers of its node

    def on_start(self, worker_group: Any, backend_config: Any) -> None:  # noqa: ANN401 - Ray's, untyped
        config = _torch_config(backend_config)
        config.backend_cls().on_start(worker_group, config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:  # noqa: ANN401
        config = _torch_config(backend_config)
        config.backend_cls().on_shutdown(worker_group, config)


def _torch_config(group: ProcessGroup) -> Any:  # noqa: ANN401
    from ray.train.torch.config import TorchConfig

    return TorchConfig(backend=group.backend, timeout_s=group.timeout_s)
