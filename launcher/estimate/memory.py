"""What a run will need, from its configuration alone: memory of one rank by part, checkpoints, network, steps.

The memory is that of the worst moment of training: the end of the backward pass, or the optimizer's step. Sources of
the counts: ZeRO (Rajbhandari et al., arXiv:1910.02054, section 3) for the shares of a rank, with what DeepSpeed 0.19.8
allocates beside them; Korthikanti et al. (arXiv:2205.05198) for what a layer keeps for its backward pass, counted
anew for the gated layers with root-mean-square norms that transformers runs. Nothing heavy is loaded.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from launcher.config import RunConfig
from launcher.run_directory import read_json
from trainer.config import FreezeTuning, FromScratch, FullTuning, LoraTuning, PromptTuning, QloraTuning

GIB = 2**30
# Measured: a rank on a CPU with torch, DeepSpeed and transformers loaded; a CUDA context with NCCL's buffers.
FRAMEWORK_BYTES = {"cpu": 700 * 2**20, "cuda": 1536 * 2**20}
# Measured over four runs of 60 million weights: what a CPU's allocator holds beyond the parts that are counted.
CPU_ALLOCATOR_SHARE = 0.18
REDUCE_BUCKET = 500_000_000  # DeepSpeed's default, in elements; taken whole whatever the model's size
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
FP32 = 4


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide its memory.

    Attributes:
        num_weights: all of them, embeddings included.
        hidden: width of the residual stream.
        intermediate: width of the gated MLP.
        num_layers: transformer layers.
        kv_width: width of the keys, and of the values.
        vocab_size: width of the logits.
    """

    num_weights: int
    hidden: int
    intermediate: int
    num_layers: int
    kv_width: int
    vocab_size: int


def shape_of(config: RunConfig, base: Path | None = None) -> Shape | None:
    """The base model's sizes, where its configuration is at hand.

    Args:
        config: the run's configuration.
        base: folder of a base model, where it is known; None looks at model.name_or_path.

    Returns:
        The sizes; None for a model on the hub that is not in the local cache, or one of an unknown form.
    """
    if config.model.from_scratch is not None:
        return _shape_from_scratch(config.model.from_scratch)
    name = config.model.name_or_path
    folder = base or (_model_folder(name, config.model.revision) if name else None)
    if folder is None or not (folder / "config.json").is_file():
        return None
    read = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    read = read.get("text_config", read)
    try:
        heads = read["num_attention_heads"]
        head_size = read.get("head_dim") or read["hidden_size"] // heads
        shape = Shape(
            num_weights=0,
            hidden=read["hidden_size"],
            intermediate=read["intermediate_size"],
            num_layers=read["num_hidden_layers"],
            kv_width=(read.get("num_key_value_heads") or heads) * head_size,
            vocab_size=read["vocab_size"],
        )
    except (KeyError, TypeError):
        return None
    counted = sum(_weights_in(file) for file in sorted(folder.glob("*.safetensors")))
    num_weights = counted or _count(shape, heads * head_size, tied=bool(read.get("tie_word_embeddings")))
    return Shape(**{**vars(shape), "num_weights": num_weights})


def _shape_from_scratch(sizes: FromScratch) -> Shape:
    kv_width = sizes.num_kv_heads * (sizes.hidden_size // sizes.num_heads)
    shape = Shape(0, sizes.hidden_size, sizes.intermediate_size, sizes.num_layers, kv_width, sizes.vocab_size)
    return Shape(**{**vars(shape), "num_weights": _count(shape, sizes.hidden_size, tied=True)})


def _count(shape: Shape, query_width: int, *, tied: bool) -> int:
    """Weights of a Llama-like decoder; biases are left out."""
    attention = 2 * shape.hidden * query_width + 2 * shape.hidden * shape.kv_width
    layer = attention + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    return shape.num_layers * layer + shape.hidden + (1 if tied else 2) * shape.vocab_size * shape.hidden


def _weights_in(file: Path) -> int:
    """Number of weights in a safetensors file, from its header."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _model_folder(name: str, revision: str | None) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at training's worst moment, by what holds them."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    logits: int
    allocator: int
    framework: int

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        return sum(vars(self).values())


def trained_weights(config: RunConfig, shape: Shape) -> int:
    """How many weights the optimizer moves. LoRA's are counted on all linear layers."""
    match config.tuning:
        case FullTuning():
            return shape.num_weights
        case LoraTuning() | QloraTuning() as lora:
            widths = [(shape.hidden, shape.hidden)] * 2 + [(shape.hidden, shape.kv_width)] * 2
            widths += [(shape.hidden, shape.intermediate)] * 3
            return shape.num_layers * sum(lora.rank * (rows + columns) for rows, columns in widths)
        case PromptTuning(num_tokens=num_tokens):
            return num_tokens * shape.hidden
        case FreezeTuning(last_layers=last_layers, head=head, names=names):
            if names:  # which weights these are, only the model itself tells: count the most
                return shape.num_weights
            layer = (shape.num_weights - shape.vocab_size * shape.hidden) // max(1, shape.num_layers)
            return min(shape.num_weights, last_layers * layer + head * shape.vocab_size * shape.hidden)


def memory_of(config: RunConfig, shape: Shape, *, on_gpu: bool) -> Memory:
    """Memory of one rank while it trains.

    Args:
        config: the run's configuration.
        shape: the base model's sizes.
        on_gpu: whether the rank has a GPU; what is told is then the GPU's memory.

    Returns:
        Bytes by part.
    """
    training, stage = config.training, config.deepspeed.stage
    element = 4 if training.precision == "fp32" else 2
    trained = trained_weights(config, shape)
    frozen = shape.num_weights - trained if config.tuning.method in ("full", "freeze") else shape.num_weights
    frozen_bytes = int(frozen * (0.55 if isinstance(config.tuning, QloraTuning) else element))
    share = training.num_workers if stage else 1
    masters = 0 if element == FP32 and stage == 0 else FP32
    moment = 1 if training.optimizer.endswith("8bit") else FP32
    weights = (trained * element + frozen_bytes) // (training.num_workers if stage == 3 else 1)
    activations, logits = _activations(config, shape, element, on_gpu=on_gpu)
    parts = {
        "weights": weights,
        "gradients": _gradients(trained, element, stage, training.num_workers),
        "optimizer": (masters + 2 * moment) * trained // share,
        "buffers": _buffers(config, shape, trained, element, on_gpu=on_gpu),
        "activations": activations,
        "logits": logits,
    }
    allocator = 0 if on_gpu else int(CPU_ALLOCATOR_SHARE * sum(parts.values()))
    return Memory(**parts, allocator=allocator, framework=FRAMEWORK_BYTES["cuda" if on_gpu else "cpu"])


def _gradients(trained: int, element: int, stage: int, num_workers: int) -> int:
    """Gradients that stay until the step, and their fp32 copy that the step makes where they are 16 bits."""
    full = element * trained + (FP32 * trained if element != FP32 else 0)
    match stage:
        case 0:
            return full
        case 1:
            return element * trained + FP32 * trained // num_workers
        case _:
            return full // num_workers


def _buffers(config: RunConfig, shape: Shape, trained: int, element: int, *, on_gpu: bool) -> int:
    """The bucket that gradients are reduced in, and, in stage 3, weights that are gathered for use.

    A GPU gives ZeRO's bucket whole; a CPU's pages are taken when they are first written, so it counts there as far as
    it is filled. Stage 0 copies its gradients into such a bucket to reduce them.
    """
    stage = config.deepspeed.stage
    bucket = config.deepspeed.raw.get("zero_optimization", {}).get("reduce_bucket_size", REDUCE_BUCKET)
    filled = int(bucket) if on_gpu and stage else min(int(bucket), trained)
    gathered = min(LIVE_PARAMETERS, shape.num_weights) if stage == 3 else 0
    return element * (filled + gathered)


def _activations(config: RunConfig, shape: Shape, element: int, *, on_gpu: bool) -> tuple[int, int]:
    """What the forward pass keeps for the backward pass, and the logits of one chunk with their gradients.

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
    # Logits in the model's format, in fp32, the logarithms of their softmax, and the gradient of one of them.
    chunk = min(training.logits_bytes, tokens * shape.vocab_size * FP32)
    return tokens * (kept + ends), chunk * (element + 2 * FP32 + element) // FP32


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
    element = 4 if training.precision == "fp32" else 2
    trained = trained_weights(config, shape)
    ring = (training.num_workers - 1) / training.num_workers
    accumulation = training.global_batch_size // (training.num_workers * training.micro_batch_size)
    match stage:
        case 0 | 1:
            elements = 2 * trained
        case 2:  # gradients are reduced after every micro-batch, weights gathered once
            elements = trained * (accumulation + 1)
        case 3:  # weights are gathered forward and backward in every micro-batch
            elements = (2 * shape.num_weights + trained) * accumulation
    merged = config.tuning.method in ("full", "freeze") or config.export.merge
    return Traffic(
        network=int(elements * element * ring),
        checkpoint=3 * FP32 * trained,
        export=(shape.num_weights if merged else trained) * 2,
    )


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


# --- what a person reads --------------------------------------------------------------------------


def limit_of(config: RunConfig, *, on_gpu: bool) -> int | None:
    """Memory that one rank may take, in bytes; None where that is not known here.

    Args:
        config: the run's configuration; cluster.gpu_memory_gib names it.
        on_gpu: whether ranks have GPUs.

    Returns:
        The configured size of a GPU, or what the driver says of this machine's; on this machine's CPUs a rank's equal
        share of the memory.
    """
    local = config.cluster.address == "local"
    if on_gpu:
        named = config.cluster.gpu_memory_gib
        return int(named * GIB) if named else _smallest_gpu_here() if local else None
    if not local:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // config.training.num_workers


def _smallest_gpu_here() -> int | None:
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        return min(int(line) for line in answer.stdout.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def problems(config: RunConfig, *, on_gpu: bool) -> list[str]:
    """What cannot fit into memory, with the nearest setting that can.

    Args:
        config: the run's configuration.
        on_gpu: whether ranks have GPUs.

    Returns:
        One line, or none where it fits or nothing is known.
    """
    shape, limit = shape_of(config), limit_of(config, on_gpu=on_gpu)
    if shape is None or limit is None:
        return []
    memory = memory_of(config, shape, on_gpu=on_gpu)
    if memory.total <= limit:
        return []
    kind = "GPU" if on_gpu else "worker on this machine"
    way_out = nearest_that_fits(config, shape, limit, on_gpu=on_gpu)
    said = f"the nearest setting that fits: {way_out}" if way_out else "no setting that was tried fits"
    return [
        f"training needs about {_gib(memory.total)} for each {kind}, which has {_gib(limit)} ({_parts(memory)}); {said}"
    ]


def describe(
    config: RunConfig, run_dir: Path, *, on_gpu: bool, tokens_per_s: float | None = None, price: float | None = None
) -> list[str]:
    """Memory, steps, time, sizes and network, as lines for a person.

    Args:
        config: the run's configuration.
        run_dir: the run's folder: counts come from its data, the speed from its metrics.
        on_gpu: whether ranks have GPUs.
        tokens_per_s: speed of all ranks together; None takes what this run has measured.
        price: of one GPU for an hour; None tells no cost.

    Returns:
        The lines.
    """
    shape = shape_of(config, run_dir / "base" if (run_dir / "base").is_dir() else None)
    lines = []
    if shape is None:
        lines.append(f"memory     unknown: {config.model.name_or_path} is not on this machine, or of an unknown form")
    else:
        memory, traffic = memory_of(config, shape, on_gpu=on_gpu), traffic_of(config, shape)
        lines += [
            f"weights    {shape.num_weights:,}, of which {trained_weights(config, shape):,} are trained",
            f"memory     {_gib(memory.total)} for each rank: {_parts(memory)}",
            f"disk       {_gib(traffic.checkpoint)} each checkpoint, up to {config.training.keep_checkpoints + 2} at a "
            f"time; {_gib(traffic.export)} the exported model",
            *_copies(config, traffic),
            f"network    {_gib(traffic.network)} sent by each rank in an optimizer step",
        ]
    return lines + _steps(config, run_dir, on_gpu=on_gpu, tokens_per_s=tokens_per_s, price=price)


def _copies(config: RunConfig, traffic: Traffic) -> list[str]:
    """What a checkpoint takes of the hosts' memory while it is written."""
    if not config.training.checkpoint_in_background:
        return []
    each = traffic.checkpoint // config.training.num_workers
    return [
        f"host       {_gib(each)} of memory for each rank while a checkpoint is written; "
        "training.checkpoint_in_background: false does without"
    ]


def _steps(
    config: RunConfig, run_dir: Path, *, on_gpu: bool, tokens_per_s: float | None, price: float | None
) -> list[str]:
    summary = read_json(run_dir / "data" / "summary.json")
    if summary is None:
        return ["steps      known when the data is prepared: launcher prepare"]
    training, train = config.training, summary["splits"]["train"]
    each = math.ceil(train["packs"] / training.global_batch_size)
    num_steps = max(1, math.ceil(training.num_epochs * each))
    num_steps = min(num_steps, training.max_steps or num_steps)
    tokens = round(train["tokens"] * num_steps / each)
    lines = [f"steps      {num_steps:,} over {train['packs']:,} packs an epoch, {tokens:,} tokens in all"]
    speed = tokens_per_s or _measured(run_dir / "metrics.jsonl")
    if speed:
        hours = tokens / speed / 3600
        cost = f", {hours * training.num_workers * price:,.2f} at {price:g} an hour" if price else ""
        unit = "GPU" if on_gpu else "worker"
        lines.append(
            f"time       {hours:,.2f} hours of training at {speed:,.0f} tokens/s: "
            f"{hours * training.num_workers:,.2f} {unit} hours{cost}"
        )
    return lines


def _measured(path: Path) -> float | None:
    """Median speed of the training steps so far, in tokens a second over all ranks."""
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    speeds = [row["tokens_per_s"] for row in rows if row["kind"] == "train"]
    return median(speeds) if speeds else None


def _parts(memory: Memory) -> str:
    parts = sorted(vars(memory).items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts if size >= 0.005 * memory.total)


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= 0.95 * GIB else f"{size / 2**20:,.0f} MiB" if size else "0"
