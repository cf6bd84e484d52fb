"""Bytes that a run sends between ranks, and writes."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config import RunConfig
from launcher.estimate.memory import sums_in_fp32
from launcher.estimate.shapes import Shape, element_bytes, trained_weights

FP32 = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step, and the bytes of what is written."""

    network: int
    checkpoint: int
    export: int


def traffic_of(config: RunConfig, shape: Shape) -> Traffic:
    """Network bytes of a step by stage (ring collectives), checkpoint and export sizes.

    A reduction or a gathering of n bytes over W ranks sends n (W - 1) / W from each; an all-reduce is both.

    Args:
        config: the run's configuration.
        shape: the base model's sizes.

    Returns:
        The bytes.
    """
    training, stage = config.training, config.deepspeed.stage
    element = element_bytes(config)
    trained = trained_weights(config, shape)
    ring = (training.num_workers - 1) / training.num_workers
    accumulation = training.global_batch_size // (training.num_workers * training.micro_batch_size)
    in_fp32 = sums_in_fp32(config, element)
    reduced = trained * (FP32 if in_fp32 else element)
    match stage:
        case 0:
            sent = 2 * reduced
        case 1:  # sums in fp32 are whole on every rank: an all-reduce, where others are reduced to their owners
            sent = reduced * (2 if in_fp32 else 1) + trained * element
        case 2:  # gradients are reduced after every micro-batch, weights gathered once
            sent = reduced * accumulation + trained * element
        case 3:  # weights are gathered forward and backward in every micro-batch
            sent = (2 * shape.num_weights * element + reduced) * accumulation
    merged = config.tuning.method in ("full", "freeze") or config.export.merge
    return Traffic(
        network=int(sent * ring),
        checkpoint=3 * FP32 * trained,
        export=(shape.num_weights if merged else trained) * 2,
    )
