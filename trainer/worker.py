"""One rank from configuration to finished. It knows nothing of what started it.

The rank's place in the world comes from torch.distributed's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT), which torchrun and Ray Train set alike; without them the process is a world of its own.

    torchrun --nproc-per-node 2 -m trainer.worker CONFIG.yaml --run-dir DIR
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from transformers.integrations import HfDeepSpeedConfig

from trainer import checkpoint
from trainer.attempt import Attempt
from trainer.base_files import base_digests
from trainer.config import TrainerConfig, TrainingConfig, load_trainer_config
from trainer.data.batches import Batches
from trainer.data.new_tokens import read_new_tokens
from trainer.data.shards import PackedSplit
from trainer.devices import device_problems, refuse_small_disk
from trainer.errors import Preempted, TrainerError
from trainer.export.folder import read_tokenizer
from trainer.export.rehearsal import rehearse
from trainer.failures import StepGuard, Watchdog, this_process
from trainer.flops import arithmetic_of
from trainer.isolation import prove_forward, prove_isolation
from trainer.loop import Found, Run
from trainer.loop import train as run_loop
from trainer.loss import num_loss_chunks
from trainer.loss_scale import LossScale
from trainer.memory import memory_errors
from trainer.metrics import METRICS, StepTrace, append, cut_after, validation_losses
from trainer.model import (
    base_folder,
    causal_lm,
    load_base,
    return_freed_memory,
    return_the_loss,
    use_liger_kernels,
)
from trainer.new_rows import add_rows, gather_beside_rows
from trainer.stopping import RESUME_ME, clear_stop, stop_on_signals
from trainer.trackers import log_row, open_trackers
from trainer.tuning import apply_tuning, optimizer_for, parameter_counts, quantization
from trainer.zero import deepspeed_dict

SHOWN = (
    *("kind", "step", "max_steps", "loss", "lr", "grad_norm", "tokens_per_s_per_device", "mfu", "memory_bytes"),
    *("padding_share", "loss_scale", "eta_s", "stalled_s", "write_s", "cause"),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def train(
    config: TrainerConfig, run_dir: Path, *, on_step: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Train one rank's share, going on from the newest complete checkpoint of the run.

    Args:
        config: What is asked.
        run_dir: Holds data/, gets checkpoints/ and metrics.jsonl.
        on_step: Called on every rank with each row of the metrics.

    Returns:
        Counts for the stage's record, equal on every rank.

    Raises:
        TrainerError: Something the user can fix, in words; NotEnoughMemoryError where an allocation failed.
        Preempted: The run was asked to stop, and everything is saved.
    """
    began = time.perf_counter()
    with memory_errors("training"):
        found = join(config, run_dir)
        return fit(config, found, on_step) | {"wall_s": time.perf_counter() - began}


def fit(config: TrainerConfig, found: Found, on_step: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
    """Build the engine, restore the newest checkpoint, and train to the end.

    Args:
        config: What is requested.
        found: Rank, world, device, folder.
        on_step: Called on every rank with each row of the metrics.

    Returns:
        Counts for the stage's record, equal on every rank.
    """
    if found.rank == 0:
        rehearse_export(config, found.run_dir)
    engine = build_engine(config, found)
    attempt = Attempt.begin(found.run_dir) if found.rank == 0 else None
    frozen = any(not parameter.requires_grad for parameter in engine.module.parameters())
    base = base_digests(config.model, found.run_dir, weights=frozen) if found.rank == 0 else None
    arithmetic = arithmetic_of(engine.module, found.device, DTYPES[config.training.precision], found.world_size)
    # The last thing before the loop that draws random numbers: from here on the generators are the interrupted run's.
    progress = checkpoint.restore(engine, found.run_dir, base) or checkpoint.Progress(0, 0, 0, 0)
    progress = replace(progress, loss_scale=first_loss_scale(config.training, progress.loss_scale))
    losses = earlier_losses(progress.step, found)
    with ExitStack() as closing:
        tell = teller(config, found, attempt, on_step, closing)
        run = Run(
            engine=engine,
            config=config.training,
            train_batches=batches_of(config, found, "train"),
            validation_batches=batches_of(config, found, "validation"),
            found=found,
            tell=tell,
            guard=StepGuard(engine),
            validation_losses=losses,
            arithmetic=arithmetic,
            trace=StepTrace(found.run_dir, found.rank),
            saver=saver_of(config.training, engine, found, attempt, base, tell),
            beat=closing.enter_context(watchdog(config.training, found)).beat,
        )
        closing.callback(run.trace.stop)
        end = run_loop(run, progress)
    return counts(run, progress, end)


def saver_of(
    training: TrainingConfig,
    engine: Any,  # noqa: ANN401 - DeepSpeed is not typed
    found: Found,
    attempt: Attempt | None,
    base: dict[str, str] | None,
    tell: Callable[[dict[str, Any]], None],
) -> checkpoint.Saver:
    """What writes this run's checkpoints."""
    keep, in_background = training.keep_checkpoints, training.checkpoint_in_background
    return checkpoint.Saver(
        engine, found.run_dir, keep=keep, attempt=attempt, base=base, in_background=in_background, tell=tell
    )


def rehearse_export(config: TrainerConfig, run_dir: Path) -> None:
    """Refuse a base whose tuned weights could not be exported, before its weights are loaded; print what is fixed.

    Args:
        config: What is requested.
        run_dir: The run; data that was written without a tokenizer is trained on, and can't be exported at all.
    """
    if (run_dir / "data" / "tokenizer").is_dir():
        for note in rehearse(config, run_dir, read_tokenizer(run_dir)):
            print(f"export: {note}", flush=True)


def first_loss_scale(training: TrainingConfig, restored: LossScale | None) -> LossScale | None:
    """The loss scale to go on with.

    Args:
        training: Precision, and the scale of a fresh start.
        restored: A checkpoint's.

    Returns:
        None where the precision is not fp16.
    """
    if training.precision != "fp16":
        return None
    return restored or LossScale(2.0**training.loss_scale_power)


def watchdog(training: TrainingConfig, found: Found) -> Watchdog:
    """What ends this process when the loop stands still; it knows the processes of all ranks."""
    peers: list[Any] = [None] * found.world_size
    dist.all_gather_object(peers, this_process(found.rank))
    return Watchdog(found.run_dir, found.rank, peers, training.hang_timeout_s)


def teller(
    config: TrainerConfig,
    found: Found,
    attempt: Attempt | None,
    on_step: Callable[[dict[str, Any]], None] | None,
    closing: ExitStack,
) -> Callable[[dict[str, Any]], None]:
    """Where rows of the metrics go: metrics.jsonl and trackers from rank 0, and to whoever started the worker.

    Args:
        config: Which trackers.
        found: Rank and folder.
        attempt: Who owns the run, on rank 0.
        on_step: Gets each row on every rank.
        closing: Closes the trackers, and forgets a request to stop, when the loop has ended.

    Returns:
        What takes a row.
    """
    trackers = open_trackers(config, found.run_dir) if found.rank == 0 else []
    if attempt is not None:
        closing.callback(_forget_stop, attempt, found.run_dir)
    for tracker in trackers:
        closing.callback(tracker.close)

    def tell(row: dict[str, Any]) -> None:
        if attempt is not None:
            attempt.check()  # each step's row comes before its checkpoint
            append(found.run_dir / METRICS, row)
        log_row(trackers, row)
        if on_step is not None:
            on_step(row)

    return tell


def _forget_stop(attempt: Attempt, run_dir: Path) -> None:
    """The request was carried out; one that stands there after a later attempt has begun is meant for that one."""
    if attempt.owns_the_run():
        clear_stop(run_dir)


def counts(run: Run, begin: checkpoint.Progress, end: checkpoint.Progress) -> dict[str, Any]:
    """What the stage's record says of the training.

    Args:
        run: What was trained.
        begin: Where it went on.
        end: Where it ended.

    Returns:
        JSON-able, equal on every rank.
    """
    return {
        "steps": end.step,
        "max_steps": run.max_steps,
        "resumed_at_step": begin.step,
        "total_tokens": end.total_tokens,
        "skipped_steps": end.num_skipped,
        "loss_scale_overflows": end.loss_scale.num_overflows if end.loss_scale else 0,
        "world_size": run.found.world_size,
        "device": str(run.found.device),
        "attention": causal_lm(run.engine.module).config._attn_implementation,
        **parameter_counts(run.engine.module),
    }


def join(config: TrainerConfig, run_dir: Path) -> Found:
    """Take this rank's place in the world: device, threads, process group, seeds.

    Args:
        config: Threads and seed.
        run_dir: The run's folder.

    Returns:
        What was found.

    Raises:
        TrainerError: This machine can't do what is asked.
    """
    device = take_device()
    if problems := device_problems(
        config.model,
        config.training,
        config.deepspeed,
        on_gpu=device.type == "cuda",
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
    ):
        raise TrainerError("\n".join(problems))
    torch.set_num_threads(config.training.threads_per_worker)
    transformers.utils.logging.disable_progress_bar()
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 warns about at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        set_accelerator(CPU_Accelerator())
        # DeepSpeed would compile a shared-memory op (g++, 20 s) that only its inference all-reduce uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    join_group("nccl" if device.type == "cuda" else "gloo", timedelta(seconds=config.training.collective_timeout_s))
    return Found(dist.get_rank(), dist.get_world_size(), device, run_dir)


def take_device() -> torch.device:
    """Take the GPU that this rank's LOCAL_RANK names, or the one it was left; the CPU where there is none.

    Where each process sees one GPU alone (`srun --gpus-per-task=1`), its index is 0 whatever the rank on the node.
    DeepSpeed, accelerate and PyTorch's NCCL set-up read the index from LOCAL_RANK, so the variable is set to it.

    Returns:
        The device, which is PyTorch's current one from here on.

    Raises:
        TrainerError: This machine has more ranks than the GPUs that they see.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    index = 0 if num_gpus == 1 else local_rank
    if index >= num_gpus:
        raise TrainerError(
            f"rank {local_rank} of this machine finds {num_gpus} GPUs: start as many ranks as there are GPUs, or give "
            "each rank one of its own"
        )
    os.environ["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def join_group(backend: str, timeout: timedelta) -> None:
    """Make the process group, or take the one that exists, and DeepSpeed's beside it.

    Args:
        backend: nccl or gloo.
        timeout: Longest time of a collective operation.
    """
    if not dist.is_initialized() and "RANK" not in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")  # the one variable that DeepSpeed reads even then
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def set_group_timeouts(timeout: timedelta) -> None:
    """Give every process group of this process a timeout.

    ZeRO's collectives run in groups that DeepSpeed (0.19.8, utils/groups.py) makes without one, which leaves them
    PyTorch's default (2.13): ten minutes for NCCL, which would abort before a longer hang_timeout_s is over.

    Args:
        timeout: Longest time of a collective operation.
    """
    groups = dist.distributed_c10d
    for group in groups._world.pg_map:
        groups._set_pg_timeout(timeout, group)


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators.

    Args:
        seed: Not negative.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_engine(config: TrainerConfig, found: Found) -> Any:  # noqa: ANN401 - DeepSpeed is not typed
    """Base weights, tuning method and optimizer inside DeepSpeed's engine; packs proven apart.

    Args:
        config: What is asked.
        found: Rank, world, device, folder.

    Returns:
        The engine; called with a micro-batch it gives its summed loss.
    """
    settings = deepspeed_dict(config.training, config.deepspeed, found.world_size)
    dtype = DTYPES[config.training.precision]
    # While this object lives, transformers reads weights into ZeRO-3's parts: no rank keeps the whole model.
    sharded_loading = HfDeepSpeedConfig(settings) if config.deepspeed.stage == 3 else None
    length = config.data.sequence_length
    return_freed_memory(1 << 20)
    base = load_base(config.model, found.run_dir, dtype, found.device, length, quantization(config.tuning, dtype))
    new_tokens = read_new_tokens(config.model, found.run_dir)
    add_rows(base, new_tokens)
    return_freed_memory(4 << 20)  # training's blocks are made anew in each step
    if config.training.liger_kernels:
        use_liger_kernels(base)
    if config.training.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    seed_generators(config.seed)  # adapters begin alike on every rank
    place = base_folder(config.model, found.run_dir)
    tokenizer = str(found.run_dir / "data" / "tokenizer")
    if new_tokens or config.model.adapter:
        sharded_loading = None  # while it lives, PEFT gathers rows on GPUs only; those of new tokens are whole here
    model = apply_tuning(
        base, config.tuning, place, tokenizer, adapter=config.model.adapter, new_tokens=tuple(new_tokens)
    )
    del sharded_loading
    if config.deepspeed.stage == 3:
        gather_beside_rows(model)
    counted = parameter_counts(model)
    trained, every = (counted[name] // found.world_size for name in ("num_trained_parameters", "num_parameters"))
    refuse_small_disk(config.deepspeed, trained, every, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    most_tokens = config.training.micro_batch_size * length
    return_the_loss(
        model, num_loss_chunks(most_tokens, base.config.get_text_config().vocab_size, config.training.logits_bytes)
    )
    offloaded = config.deepspeed.offload_optimizer != "none"
    optimizer = optimizer_for(model, config.training, offloaded=offloaded)
    engine, *_ = deepspeed.initialize(model=model.to(found.device), optimizer=optimizer, config=settings)
    set_group_timeouts(timedelta(seconds=config.training.collective_timeout_s))
    engine.basic_optimizer.state.clear()  # ZeRO 0 in bf16 has taken a step already, with gradients of 0 at a rate of 0
    prove_forward(engine.module)
    if config.data.packing:
        prove_isolation(engine.module)
    seed_generators(config.seed + 1 + found.rank)  # ranks drop out different units
    return engine


def batches_of(config: TrainerConfig, found: Found, split: str) -> Batches:
    """This rank's batches of a split; a validation step is one forward pass of each rank.

    Args:
        config: Batch sizes and seed.
        found: Rank, world, folder.
        split: train or validation.

    Returns:
        The batches.
    """
    micro_batch_size = config.training.micro_batch_size
    return Batches(
        PackedSplit.open(found.run_dir / "data" / split),
        seed=config.seed,
        global_batch_size=config.training.global_batch_size
        if split == "train"
        else micro_batch_size * found.world_size,
        micro_batch_size=micro_batch_size,
        rank=found.rank,
        world_size=found.world_size,
    )


def earlier_losses(step: int, found: Found) -> list[float]:
    """Cut the metrics behind the step that the run goes on from, and read what was validated before.

    Args:
        step: Steps taken; 0 for a fresh start, which leaves no row.
        found: Rank and folder.

    Returns:
        Validation losses up to that step, equal on every rank.
    """
    metrics = found.run_dir / METRICS
    losses: list[Any] = [None]
    if found.rank == 0:
        cut_after(metrics, step if step else -1)
        losses = [validation_losses(metrics)]
    dist.broadcast_object_list(losses)
    return list(losses[0])


def print_row(row: dict[str, Any]) -> None:
    """One line for a row of the metrics, from the first rank."""
    if dist.get_rank():
        return
    if row["kind"] == "train":
        row = row | {"eta_s": (row["max_steps"] - row["step"]) * row["step_s"]}
    values = {name: row[name] for name in SHOWN if row.get(name) is not None}
    print(*(f"{name} {value:.4g}" if isinstance(value, float) else value for name, value in values.items()), flush=True)


def main() -> None:
    """The command: train the run of a YAML file, started by torchrun or alone."""
    parser = argparse.ArgumentParser(prog="python -m trainer.worker", description=main.__doc__)
    parser.add_argument("config", type=Path, help="YAML of the run; only the trainer's sections are read")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder that holds data/ from prepare")
    arguments = parser.parse_args()
    if os.environ.get("RANK", "0") == "0":
        clear_stop(arguments.run_dir)
    stop_on_signals(arguments.run_dir)
    try:
        result = train(load_trainer_config(arguments.config), arguments.run_dir, on_step=print_row)
    except Preempted as preempted:
        print(preempted, file=sys.stderr, flush=True)
        sys.exit(RESUME_ME)
    if dist.get_rank() == 0:
        print(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
