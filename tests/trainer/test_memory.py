"""An allocation that fails, in the forms it has, ends as one error with what there was."""

import pickle

import pytest
import torch

from trainer.errors import NotEnoughMemoryError, TrainerError
from trainer.memory import is_out_of_memory, memory_errors


def test_pytorch_s_failed_allocation_is_reported_with_what_there_is(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(NotEnoughMemoryError) as caught, memory_errors("training"):
        torch.empty(5 * 10**13)
    words = str(caught.value)
    assert words.startswith("rank 3 ran out of memory while training: ")
    assert "you tried to allocate 200000000000000 bytes" in words
    assert "this process holds" in words
    assert "GiB there are free" in words
    assert str(pickle.loads(pickle.dumps(caught.value))) == words  # noqa: S301 - our own


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_every_form_of_it_is_recognized(error):
    assert is_out_of_memory(error)
    with pytest.raises(NotEnoughMemoryError), memory_errors("training"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("Connection closed by peer"), TrainerError("loss is nan")])
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, memory_errors("training"):
        raise error
    assert caught.value is error
