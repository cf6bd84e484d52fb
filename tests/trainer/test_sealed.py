"""Bytes of tensors, on whatever device they are."""

import pytest
import torch
from torch import nn

from trainer import sealed
from trainer.export.stage import _digests


class OnGpu(torch.Tensor):
    """A tensor that refuses what a CUDA tensor refuses: its bytes are not the host's until it was copied there."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is torch.Tensor.numpy and isinstance(arguments[0], cls):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor")
        result = super().__torch_function__(function, types, arguments, options or {})
        return result.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else result


def on_gpu(tensor):
    return tensor.as_subclass(OnGpu)


def test_the_stand_in_refuses_as_a_gpu_does():
    with pytest.raises(TypeError, match="cuda:0"):
        on_gpu(torch.ones(2)).view(-1).numpy()


def test_weights_on_a_gpu_have_the_digests_of_the_same_on_the_cpu():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    expected = _digests(model, torch.bfloat16, trained_only=False)
    model.weight, model.bias = (nn.Parameter(on_gpu(weight.detach())) for weight in (model.weight, model.bias))
    assert _digests(model, torch.bfloat16, trained_only=False) == expected


def test_a_checkpoint_of_tensors_on_a_gpu_is_that_of_the_same_on_the_cpu(tmp_path):
    tensor = torch.arange(6.0).view(2, 3).t()  # not contiguous
    files = [sealed.write_tensors(tmp_path / name, {"x": one}) for name, one in (("a", tensor), ("b", on_gpu(tensor)))]
    assert files[0].sha256 == files[1].sha256
