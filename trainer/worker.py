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
from trainer.config import TrainerConfig, load_trainer_config
from trainer.data.batches import Batches
from trainer.data.shards import PackedSplit
from trainer.errors import Preempted
from trainer.failures import StepGuard, Watchdog, this_process
from trainer.flops import arithmetic_of
from trainer.isolation import prove_forward, prove_isolation
from trainer.loop import Found, Run
from trainer.loop import train as run_loop
from trainer.loss import num_loss_chunks
from trainer.metrics import METRICS, StepTrace, append, cut_after, validation_losses
from trainer.model import base_folder, causal_lm, load_base, return_the_loss
from trainer.stopping import RESUME_ME, clear_stop, stop_on_signals
from trainer.trackers import log_row, open_trackers
from trainer.tuning import apply_tuning, optimizer_for, parameter_counts, quantization
from trainer.zero import deepspeed_dict

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
        TrainerError: Something the user can mend, in words.
        Preempted: The run was asked to stop, and everything is saved.
    """
    began = time.perf_counter()
    found = join(config, run_dir)
    engine = build_engine(config, found)
    arithmetic = arithmetic_of(engine.module, found.device, DTYPES[config.training.precision], found.world_size)
    attempt = Attempt.begin(run_dir) if found.rank == 0 else None
    frozen = any(not parameter.requires_grad for parameter in engine.module.parameters())
    base = base_digests(config.model, run_dir, weights=frozen) if found.rank == 0 else None
    # The last thing before the loop that draws random numbers: from here on the generators are the interrupted run's.
    progress = checkpoint.restore(engine, run_dir, base) or checkpoint.Progress(0, 0, 0, 0)
    losses = earlier_losses(progress.step, found)
    trackers = open_trackers(config, run_dir) if found.rank == 0 else []

    def tell(row: dict[str, Any]) -> None:
        if attempt is not None:
            attempt.check()  # each step's row comes before its checkpoint
            append(run_dir / METRICS, row)
        log_row(trackers, row)
        if on_step is not None:
            on_step(row)

    peers: list[Any] = [None] * found.world_size
    dist.all_gather_object(peers, this_process(found.rank))
    with Watchdog(run_dir, found.rank, peers, config.training.hang_timeout_s) as watchdog:
        run = Run(
            engine=engine,
            config=config.training,
            train_batches=batches_of(config, found, "train", config.training.global_batch_size),
            validation_batches=batches_of(
                config, found, "validation", config.training.micro_batch_size * found.world_size
            ),
            found=found,
            tell=tell,
            guard=StepGuard(engine),
            validation_losses=losses,
            arithmetic=arithmetic,
            trace=StepTrace(run_dir, found.rank),
            saver=checkpoint.Saver(
                engine,
                run_dir,
                keep=config.training.keep_checkpoints,
                attempt=attempt,
                base=base,
                in_background=config.training.checkpoint_in_background,
                tell=tell,
            ),
            beat=watchdog.beat,
        )
        try:
            end = run_loop(run, progress)
        finally:
            run.trace.stop()
            for tracker in trackers:
                tracker.close()
            if found.rank == 0:
                clear_stop(run_dir)
    return {
        "steps": end.step,
        "max_steps": run.max_steps,
        "resumed_at_step": progress.step,
        "total_tokens": end.total_tokens,
        "skipped_steps": end.num_skipped,
        "world_size": found.world_size,
        "device": str(found.device),
        "attention": causal_lm(engine.module).config._attn_implementation,
        **parameter_counts(engine.module),
        "wall_s": time.perf_counter() - began,
    }


def join(config: TrainerConfig, run_dir: Path) -> Found:
    """Take this rank's place in the world: device, threads, process group, seeds.

    Args:
        config: Threads and seed.
        run_dir: The run's folder.

    Returns:
        What was found.
    """
    torch.set_num_threads(config.training.threads_per_worker)
    transformers.utils.logging.disable_progress_bar()
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 warns about at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        set_accelerator(CPU_Accelerator())
        # DeepSpeed would compile a shared-memory op (g++, 20 s) that only its inference all-reduce uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized() and "RANK" not in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")  # the one variable that DeepSpeed reads even then
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return Found(dist.get_rank(), dist.get_world_size(), device, run_dir)


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
    # While this object lives, transformers reads weights into ZeRO-3's parts: no rank ever holds the whole model.
    sharded_loading = HfDeepSpeedConfig(settings) if config.deepspeed.stage == 3 else None
    length = config.data.sequence_length
    base = load_base(config.model, found.run_dir, dtype, found.device, length, quantization(config.tuning, dtype))
    if config.training.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    seed_generators(config.seed)  # adapters begin alike on every rank
    place = base_folder(config.model, found.run_dir)
    model = apply_tuning(base, config.tuning, place, str(found.run_dir / "data" / "tokenizer"))
    del sharded_loading
    most_tokens = config.training.micro_batch_size * length
    return_the_loss(model, num_loss_chunks(most_tokens, base.vocab_size, config.training.logits_bytes))
    offloaded = config.deepspeed.offload_optimizer != "none"
    optimizer = optimizer_for(model, config.training, offloaded=offloaded)
    engine, *_ = deepspeed.initialize(model=model.to(found.device), optimizer=optimizer, config=settings)
    prove_forward(engine.module)
    if config.data.packing:
        prove_isolation(engine.module)
    seed_generators(config.seed + 1 + found.rank)  # ranks drop out different units
    return engine


def batches_of(config: TrainerConfig, found: Found, split: str, global_batch_size: int) -> Batches:
    """This rank's batches of a split.

    Args:
        config: Micro-batch size and seed.
        found: Rank, world, folder.
        split: train or validation.
        global_batch_size: Sequences of all ranks in a step.

    Returns:
        The batches.
    """
    return Batches(
        PackedSplit.open(found.run_dir / "data" / split),
        seed=config.seed,
        global_batch_size=global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
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
    if dist.get_rank() == 0:
        shown = ("kind", "step", "max_steps", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "stalled_s", "write_s", "cause")
        values = {name: row[name] for name in shown if row.get(name) is not None}
        print(
            *(f"{name} {value:.4g}" if isinstance(value, float) else value for name, value in values.items()),
            flush=True,
        )


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
