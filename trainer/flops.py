"""How much of the hardware's arithmetic a step used: model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from trainer.model import causal_lm
from trainer.tuning import num_weights

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Dense 16-bit tensor-core rates from the data sheets, by a part of the GPU's name; the first that fits counts."""


def peak_flops(device: torch.device, dtype: torch.dtype, table: dict[str, float] = PEAK_TFLOPS) -> float:
    """What one rank's device can do at most, in floating-point operations a second.

    Args:
        device: Where the model is.
        dtype: What is computed with; the table holds 16-bit rates only.
        table: Known rates, in 1e12 a second.

    Returns:
        The maker's rate where the table knows the device, else the rate of a large matrix product, measured now.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, rate in table.items():
            if part in name:
                return rate * 1e12
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few large matrix products on this device with this rank's threads.

    Args:
        device: Where to measure.
        dtype: What is computed with.

    Returns:
        Floating-point operations a second.
    """
    size = 8192 if device.type == "cuda" else 768
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        synchronise(device)
        began = time.perf_counter()
        left @ right
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def synchronise(device: torch.device) -> None:
    """Wait for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Arithmetic:
    """What a model costs, and what the devices of all ranks can do."""

    flops_per_token: float
    """Operations of training for each token, forward and backward, without attention."""
    flops_per_square: float
    """The same of attention, for each unit of the sum of squared document lengths."""
    peak_flops: float
    """Operations a second of all ranks together."""

    def utilisation(self, num_tokens: int, squared_lengths: float, seconds: float) -> float:
        """Share of the peak that a step reached.

        Args:
            num_tokens: Of the step, all ranks, padding not counted.
            squared_lengths: Sum over the step's documents.
            seconds: The step's time.

        Returns:
            0 to 1; more only where the peak was measured badly.
        """
        needed = self.flops_per_token * num_tokens + self.flops_per_square * squared_lengths
        return needed / seconds / self.peak_flops


def arithmetic_of(model: nn.Module, device: torch.device, dtype: torch.dtype, world_size: int) -> Arithmetic:
    """Count the operations of training in the model's own terms: recomputation is not counted.

    A weight of a matrix product costs 2 operations a token forward, 2 to pass the gradient on, and 2 more for its own
    gradient where it is trained. Causal attention has half the square of a document's length in pairs; each costs, for
    both products of a layer, 4 x width operations forward and twice that backward.

    Args:
        model: With requires_grad set; its embedding looks up and multiplies nothing.
        device: Where it is.
        dtype: What is computed with.
        world_size: Ranks, one such device each.

    Returns:
        The counts.
    """
    network = causal_lm(model)
    # Around a layer of which single rows are trained, PEFT's wrapper would compute the whole weight anew.
    embedding, head = (
        getattr(module, "original_module", module).weight
        for module in (network.get_input_embeddings(), network.get_output_embeddings())
    )
    tied = head is embedding
    products = [weight for weight in model.parameters() if is_matrix(weight) and (tied or weight is not embedding)]
    per_token = sum(num_weights(weight) * (6.0 if weight.requires_grad else 4.0) for weight in products)
    config = network.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_square = 6.0 * config.num_hidden_layers * config.num_attention_heads * head_size
    return Arithmetic(per_token, per_square, peak_flops(device, dtype) * world_size)


def is_matrix(weight: nn.Parameter) -> bool:
    """Whether a parameter takes part in matrix products, also when 4 bits or ZeRO-3 hide its shape."""
    return hasattr(weight, "quant_state") or len(getattr(weight, "ds_shape", weight.shape)) > 1
