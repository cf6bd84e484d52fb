"""Memory of one rank by part, whether it fits, and the nearest setting that does.

The memory is that of the worst moment of training: the end of the backward pass, or the optimizer's step. Sources of
the counts: ZeRO (Rajbhandari et al., arXiv:1910.02054, section 3) for the shares of a rank, with what DeepSpeed 0.19.8
allocates beside them; Korthikanti et al. (arXiv:2205.05198) for what a layer keeps for its backward pass, counted
anew for the gated layers with root-mean-square norms that transformers runs.

Compared with ranks that ran on CPUs (tests/benchmarks/memory_estimate.py): what they needed, told over measured, was
0.97 to 1.08 over twelve shapes (full tuning and LoRA, recomputed activations, ZeRO 0, 2 and 3, one and two ranks, 512
and 32,000 words, packs of 256 to 1,024 tokens), with freed blocks of 512 KiB (six shapes: 1 MiB) and more given back.
As the trainer runs, the C library's allocator holds blocks below 4 MiB in gaps besides: seven of these held 0.92 to
1.37 times what was told, the most where matrices and activations are of just below 4 MiB; in the 720 steps of the
quickstart, whose packs differ in shape, a rank came to 1.6 times, for oneDNN keeps kernels for up to 1,024 shapes: with
ONEDNN_PRIMITIVE_CACHE_CAPACITY=16 and LRU_CACHE_CAPACITY=16 one worker stayed at 889 MiB, else it grew to 1,511. It has
not been compared on GPUs, whose allocator leaves other gaps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.config import RunConfig
from launcher.estimate.shapes import Shape, element_bytes, shape_of, trained_weights
from launcher.ray_cluster import Resources
from trainer.config import LoraTuning, QloraTuning

GIB = 2**30
# Measured: a rank on a CPU with torch, DeepSpeed and transformers loaded; a CUDA context with NCCL's buffers.
FRAMEWORK_BYTES = {"cpu": 700 * 2**20, "cuda": 1536 * 2**20}
# Held / told over the shapes that were measured: what a person is told beside the figure.
CPU_RANGE = (0.9, 1.6)
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
SUB_GROUP = 1_000_000_000  # DeepSpeed's sub_group_size: weights of a rank that one part of stage 3's step updates
FP32 = 4
# Adam's two moments, in bytes a weight.
MOMENTS = {"adamw": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at training's worst moment, by what holds them."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    logits: int
    framework: int

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        return sum(vars(self).values())


def memory_of(config: RunConfig, shape: Shape, *, on_gpu: bool, target_share: float = 1.0) -> Memory:
    """Memory of one rank while it trains.

    Args:
        config: the run's configuration.
        shape: the base model's sizes.
        on_gpu: whether the rank has a GPU; what is told is then the GPU's memory.
        target_share: target tokens of all places in the packs, from 0 to 1; only they have logits.

    Returns:
        Bytes by part.
    """
    training, stage = config.training, config.deepspeed.stage
    element = element_bytes(config)
    trained = trained_weights(config, shape)
    frozen = shape.num_weights - trained if config.tuning.method in ("full", "freeze") else shape.num_weights
    frozen_bytes = int(frozen * (0.55 if isinstance(config.tuning, QloraTuning) else element))
    share = training.num_workers if stage else 1
    masters = 0 if element == FP32 and stage == 0 else FP32
    # What is offloaded leaves a GPU; host_of says where it goes. On a CPU it stays.
    optimizer_stays = not on_gpu or config.deepspeed.offload_optimizer == "none"
    weights_stay = not on_gpu or config.deepspeed.offload_parameters == "none"
    weights = (trained * element + frozen_bytes) // (training.num_workers if stage == 3 else 1)
    activations = _activations(config, shape, element, on_gpu=on_gpu)
    logits = _logits(config, shape, element, target_share)
    buffers = _buffers(config, shape, trained, element, on_gpu=on_gpu)
    if stage == 0:  # filled behind the backward pass, when activations and logits are gone
        buffers = max(0, buffers - activations - logits)
    return Memory(
        weights=weights * weights_stay,
        gradients=_gradients(config, trained, element, on_gpu=on_gpu),
        optimizer=(masters + MOMENTS[training.optimizer]) * trained // share * optimizer_stays,
        buffers=buffers,
        activations=activations,
        logits=logits,
        framework=FRAMEWORK_BYTES["cuda" if on_gpu else "cpu"],
    )


def host_of(config: RunConfig, shape: Shape) -> int:
    """Memory of the host that one rank with a GPU takes for what is offloaded there, in bytes.

    Args:
        config: the run's configuration.
        shape: the base model's sizes.

    Returns:
        Master weights, moments and fp32 gradients, and the weights, as far as they are offloaded to `cpu`.
    """
    deepspeed, trained = config.deepspeed, trained_weights(config, shape)
    held = 0
    if deepspeed.offload_optimizer == "cpu":
        held += (2 * FP32 + MOMENTS[config.training.optimizer]) * trained
    if deepspeed.offload_parameters == "cpu":
        held += element_bytes(config) * shape.num_weights
    return held // config.training.num_workers


def _gradients(config: RunConfig, trained: int, element: int, *, on_gpu: bool) -> int:
    """Gradients that stay until the step, and the copy of them that the step makes, in bytes.

    Gradients of 16 bits that are summed in fp32 leave each backward pass as soon as they are added: at stage 1 to sums
    of all weights, at stages 2 and 3 to the rank's share; stage 3 copies that once for the step. With the optimizer
    offloaded, stage 3 has the sums on the host, while stages 1 and 2 leave them on the GPU. Gradients that are summed
    in their own format go to the host with the optimizer, and 16-bit ones get an fp32 copy in the step.
    """
    stage, num_workers = config.deepspeed.stage, config.training.num_workers
    offloaded = on_gpu and config.deepspeed.offload_optimizer != "none"
    if sums_in_fp32(config, element):
        share = FP32 * trained // num_workers
        # At stage 1 BF16_Optimizer reduces its sums in place; DeepSpeedZeroOptimizer cuts the share out of them.
        in_place = config.training.precision == "bf16" and config.deepspeed.offload_optimizer == "none"
        at_stage = {
            1: FP32 * trained + share * (not in_place),
            2: share,
            3: (share + min(share, FP32 * SUB_GROUP)) * (not offloaded),
        }
        return at_stage[stage]
    copy = FP32 * trained if element != FP32 else 0
    at_stage = {0: element * trained + copy, 1: element * trained + FP32 * trained // num_workers}
    return at_stage.get(stage, (element * trained + copy) // num_workers) * (not offloaded)


def sums_in_fp32(config: RunConfig, element: int) -> bool:
    """Whether gradients of 16 bits are summed over micro-batches and ranks in fp32."""
    return config.deepspeed.stage > 0 and element != FP32 and config.deepspeed.grad_accum_dtype == "fp32"


def _buffers(config: RunConfig, shape: Shape, trained: int, element: int, *, on_gpu: bool) -> int:
    """The bucket that gradients are reduced in, and, in stage 3, weights that are gathered for use.

    A GPU gives ZeRO's bucket whole; a CPU's pages are taken when they are first written, so it counts there as far as
    it is filled. Stage 0 copies its gradients into such a bucket to reduce them. Where gradients are summed in fp32,
    stages 2 and 3 copy a bucket to fp32 to reduce it; stage 3 also sorts it by ranks, in a second copy.
    """
    stage = config.deepspeed.stage
    asked = config.deepspeed.raw.get("zero_optimization", {})
    bucket = asked.get("reduce_bucket_size", config.deepspeed.bucket_elements)
    filled = int(bucket) if on_gpu and stage else min(int(bucket), trained)
    gathered = min(LIVE_PARAMETERS, shape.num_weights) if stage == 3 else 0
    copies = max(0, stage - 1) if sums_in_fp32(config, element) else 0
    return element * (filled + gathered) + FP32 * copies * min(filled, trained)


def _activations(config: RunConfig, shape: Shape, element: int, *, on_gpu: bool) -> int:
    """What the forward pass keeps for the backward pass.

    A layer keeps, for each token: of each norm its input in fp32, its output before and behind the weight; the query,
    key and value, the attention's output twice (as computed, and as the output projection reads it), and of the MLP
    its gate before and behind the activation, the other factor and the product. With checkpointing only the layer's
    input stays, and one layer is computed again. On CPUs attention computes in fp32.
    """
    training = config.training
    tokens = training.micro_batch_size * config.data.sequence_length
    attention = (2 * shape.hidden + 2 * shape.kv_width) * (element if on_gpu else FP32) + shape.hidden * element
    norms = 2 * shape.hidden * (FP32 + 2 * element)
    layer = norms + attention + 4 * shape.intermediate * element
    kept = (
        shape.num_layers * shape.hidden * element + layer
        if training.gradient_checkpointing
        else shape.num_layers * layer
    )
    ends = shape.hidden * (FP32 + 3 * element)  # the last norm, and the positions that predict
    return tokens * (kept + ends)


def _logits(config: RunConfig, shape: Shape, element: int, target_share: float) -> int:
    """One chunk's logits in the model's format, in fp32, the logarithms of their softmax, and a gradient of them."""
    tokens = config.training.micro_batch_size * config.data.sequence_length
    num_chunks = math.ceil(tokens * shape.vocab_size * FP32 / config.training.logits_bytes)
    return int(tokens * target_share / num_chunks) * shape.vocab_size * (element + 2 * FP32 + element)


def nearest_that_fits(config: RunConfig, shape: Shape, limit: int, *, on_gpu: bool) -> str | None:
    """The smallest change of settings that fits into a rank's memory, in words.

    Args:
        config: the run's configuration, which does not fit.
        shape: the base model's sizes.
        limit: memory of one rank, in bytes.
        on_gpu: whether that is a GPU's.

    Returns:
        The change; None if none of those tried fits.
    """
    for words, changed in _smaller(config):
        if memory_of(changed, shape, on_gpu=on_gpu).total <= limit:
            return words
    return None


def _smaller(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Changed configurations: first what changes only the layout, then more workers, then adapters."""
    now, words = config, list[str]()
    training, stage = config.training, config.deepspeed.stage
    steps: list[tuple[str, str, Any]] = []
    steps += [] if training.gradient_checkpointing else [("training", "gradient_checkpointing", True)]
    steps += [("training", "micro_batch_size", 1)] if training.micro_batch_size > 1 else []
    steps += [("deepspeed", "stage", larger) for larger in (2, 3) if larger > stage and training.num_workers > 1]
    for section, key, value in steps:
        now = now.model_copy(update={section: getattr(now, section).model_copy(update={key: value})})
        words = [word for word in words if not word.startswith(f"{section}.{key}=")]
        words.append(f"{section}.{key}={str(value).lower()}")
        yield " ".join(words), now
    for factor in (2, 4, 8):
        more = training.num_workers * factor
        if training.global_batch_size % (more * now.training.micro_batch_size):
            continue
        sharded = now.deepspeed.model_copy(update={"stage": max(stage, 3)})
        wider = now.training.model_copy(update={"num_workers": more})
        update = {"training": wider, "deepspeed": sharded}
        layout = [word for word in words if not word.startswith("deepspeed.stage=")]
        layout += [] if stage == 3 else ["deepspeed.stage=3"]
        yield " ".join([*layout, f"training.num_workers={more}"]), now.model_copy(update=update)
    for tuning in (LoraTuning(method="lora"), QloraTuning(method="qlora")):
        sharded = now.deepspeed.model_copy(update={"stage": min(now.deepspeed.stage, 2)})
        layout = [word for word in words if word != "deepspeed.stage=3"]
        update = {"tuning": tuning, "deepspeed": sharded}
        yield " ".join([*layout, f"tuning.method={tuning.method}"]), now.model_copy(update=update)


def gpu_memory_of(config: RunConfig, resources: Resources) -> int | None:
    """Memory of one GPU, in bytes: cluster.gpu_memory_gib, else as it is known of these resources."""
    named = config.cluster.gpu_memory_gib
    return int(named * GIB) if named else resources.gpu_memory


def machine_memory(resources: Resources) -> int | None:
    """Memory of this machine, in bytes; None where a run takes place elsewhere."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if resources.is_here else None


def rank_memory(config: RunConfig, resources: Resources, *, on_gpu: bool) -> int | None:
    """Memory that one rank may take, in bytes: its GPU's, or an equal share of this machine's; None if unknown."""
    if on_gpu:
        return gpu_memory_of(config, resources)
    machine = machine_memory(resources)
    return machine and machine // config.training.num_workers


def problems(config: RunConfig, resources: Resources, *, on_gpu: bool) -> list[str]:
    """What cannot fit into memory, with the nearest setting that can.

    Args:
        config: the run's configuration.
        resources: what there is.
        on_gpu: whether ranks have GPUs.

    Returns:
        One line, or none where it fits or nothing is known.
    """
    shape, limit = shape_of(config), rank_memory(config, resources, on_gpu=on_gpu)
    if shape is None or limit is None:
        return []
    memory = memory_of(config, shape, on_gpu=on_gpu)
    if memory.total <= limit:
        return []
    kind = "GPU" if on_gpu else "worker on this machine"
    way_out = nearest_that_fits(config, shape, limit, on_gpu=on_gpu)
    said = f"the nearest setting that fits: {way_out}" if way_out else "no setting that was tried fits"
    needs = f"training needs about {in_gib(memory.total)} for each {kind}, which has {in_gib(limit)}"
    return [f"{needs} ({parts_of(memory)}); {said}"]


def parts_of(memory: Memory) -> str:
    parts = sorted(vars(memory).items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {in_gib(size)}" for name, size in parts if size >= 0.005 * memory.total)


def in_gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= 0.95 * GIB else f"{size / 2**20:,.0f} MiB" if size else "0"
