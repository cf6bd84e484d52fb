"""Checkpoints: written by all ranks together, believed only when every byte is as it was written.

`run_dir/checkpoints/step-N/` holds one `rank-R.safetensors` per rank that wrote it, and `seal.json`. Tensors are kept
by parameter name, `<kind>/<first element>/<parameter>`, so that a run goes on with another number of workers or another
ZeRO stage. Frozen parameters are the base model's and are not stored.

Saving and restoring are collective: every rank of the process group calls them at the same step. What one rank
finds, all ranks hear of before any goes on, so that none waits for one that has stopped.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError

from trainer import engine_state, sealed
from trainer.attempt import Attempt
from trainer.base_files import refuse_other_base
from trainer.errors import TrainerError
from trainer.loss_scale import LossScale
from trainer.stored import (
    DAMAGED,
    FORMAT,
    KINDS,
    Kind,
    StoredTensors,
    checkpoints_dir,
    damage_of,
    refuse_fresh_start,
    sealed_steps,
)

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: Optimizer steps taken.
        epoch: Epoch that the next step reads from.
        step_in_epoch: Steps of that epoch already taken.
        total_tokens: Tokens trained on, over all ranks, padding left out.
        num_skipped: Steps of these that were not taken, because a number was not finite.
        loss_scale: Of the next step, in fp16; None in the other precisions.
    """

    step: int
    epoch: int
    step_in_epoch: int
    total_tokens: int
    num_skipped: int = 0
    loss_scale: LossScale | None = None


# --- all ranks as one -----------------------------------------------------------------------------


def _gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def _together(what: str) -> Iterator[None]:
    """A part that either every rank has done, or every rank raises for.

    Args:
        what: What is being done, for the message.

    Yields:
        Nothing.

    Raises:
        TrainerError: Some rank failed; the message holds each failing rank's words.
    """
    problem: str | None = None
    try:
        yield
    except (OSError, TrainerError, SafetensorError) as error:
        problem = str(error) if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
    ranks: dict[str, list[str]] = {}
    for rank, words in enumerate(_gather(problem)):
        if words:
            ranks.setdefault(words, []).append(str(rank))
    if ranks:
        told = "; ".join(f"rank {', '.join(found)}: {words}" for words, found in ranks.items())
        raise TrainerError(f"{what} failed: {told}")


# --- generators -----------------------------------------------------------------------------------


def _generators() -> dict[str, torch.Tensor]:
    """The state of every generator of random numbers that a layer or a library here may draw from."""
    _, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    state = {
        "generator/0/torch": torch.get_rng_state(),
        "generator/0/python": torch.tensor(words, dtype=torch.int64),
        "generator/0/python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "generator/0/numpy": torch.tensor([*inner["key"].tolist(), inner["pos"], numpy_state["has_gauss"]]),
        "generator/0/numpy_gauss": torch.tensor(numpy_state["gauss"], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["generator/0/cuda"] = torch.cuda.get_rng_state()
    return state


def _set_generators(state: dict[str, torch.Tensor]) -> None:
    gauss = next(iter(state["generator/0/python_gauss"].tolist()), None)  # none, where no half of a pair is left over
    random.setstate((3, tuple(state["generator/0/python"].tolist()), gauss))
    *key, position, has_gauss = state["generator/0/numpy"].tolist()
    words = np.array(key, dtype=np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, state["generator/0/numpy_gauss"].item()))
    torch.set_rng_state(state["generator/0/torch"])
    if torch.cuda.is_available() and "generator/0/cuda" in state:
        torch.cuda.set_rng_state(state["generator/0/cuda"])


def _seed_generators(step: int) -> None:
    """Fresh generators for a world size of which no states were stored: they depend on the step and the rank."""
    seed = int.from_bytes(hashlib.sha256(f"{step}/{dist.get_rank()}".encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- save -----------------------------------------------------------------------------------------


@dataclass
class _Writing:
    """A checkpoint on its way: what is in it, and this rank's file, which a thread writes."""

    step: int
    final: Path
    partial: Path
    content: dict[str, Any]
    num_bytes: int
    stalled_s: float
    copy_s: float
    file: Future[tuple[sealed.SealedFile, float]]


class Saver:
    """Writes a run's checkpoints, from a copy of the state, while training goes on.

    Training stands still only while the copy is made in the host's memory. A thread of each rank then writes, hashes
    and flushes the rank's file; at the first step's edge at which every rank has done so, rank 0 seals the folder and
    gives it its name. Until then the checkpoint before it is the newest. All methods are collective.

    Args:
        engine: The DeepSpeed engine.
        run_dir: The run.
        keep: Newest checkpoints that stay; the one with the best validation loss stays besides.
        attempt: Who owns the run, on rank 0; None on the others.
        base: Digests of the base model's files, on rank 0 (see `trainer.base_files`).
        in_background: Whether training goes on while a checkpoint is written.
        tell: Takes a row for the metrics for each checkpoint.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        run_dir: Path,
        *,
        keep: int,
        attempt: Attempt | None,
        base: dict[str, str] | None = None,
        in_background: bool = True,
        tell: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._folder = checkpoints_dir(run_dir)
        self._keep = keep
        self._attempt = attempt
        self._base = base
        self._in_background = in_background
        self._tell = tell
        self._writing: _Writing | None = None

    def save(self, progress: Progress, *, validation_loss: float | None = None, wait: bool = False) -> None:
        """Begin a checkpoint at a step's edge; one that is still being written is sealed first.

        Args:
            progress: How far the run has come.
            validation_loss: Mean loss per target token measured at this step, if it was.
            wait: Return only when it is sealed; no copy is made then.

        Raises:
            TrainerError: A weight or moment is not finite, there is no room, a later attempt owns the run, or a file
                could not be written; on every rank.
        """
        self.finish()
        began = time.perf_counter()
        final = self._folder / f"step-{progress.step}"
        if max(_gather(final.is_dir())):
            return
        wait = wait or not self._in_background
        tensors = _tensors_of_this_rank(self._engine)
        num_bytes = sum(_gather(sealed.num_tensor_bytes(tensors)))
        partial = self._make_room(final, num_bytes)
        content = _seal_content(self._engine, progress, validation_loss) | {"base": self._base}
        copying = time.perf_counter()
        if not wait:
            tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        copy_s = time.perf_counter() - copying
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        file = thread.submit(_timed_write, partial / f"rank-{dist.get_rank()}.safetensors", tensors)
        thread.shutdown(wait=wait)
        stalled_s = time.perf_counter() - began
        self._writing = _Writing(progress.step, final, partial, content, num_bytes, stalled_s, copy_s, file)
        if wait:
            self.finish()

    def poll(self) -> None:
        """At each step's edge: seal the checkpoint that is being written, if every rank's file is on disk.

        Raises:
            TrainerError: See `save`.
        """
        if self._writing is not None and all(_gather(self._writing.file.done())):
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is on disk, and seal it; without one there is nothing to do.

        Raises:
            TrainerError: See `save`.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        began = time.perf_counter()
        name, folder = writing.final.name, writing.final.parent
        with _together(f"writing the checkpoint {name}, which needs {writing.num_bytes:,} bytes in {folder},"):
            file, write_s = writing.file.result()
        files, write_times = zip(*_gather((file, write_s)), strict=True)
        with _together(f"sealing the checkpoint {name}"):
            if self._attempt is not None:
                self._attempt.check()
                sealed.seal(writing.partial, writing.final, writing.content, list(files))
                _prune(folder, self._keep)
        row = {"kind": "checkpoint", "step": writing.step, "num_bytes": writing.num_bytes, "copy_s": writing.copy_s}
        stalled_s = writing.stalled_s + time.perf_counter() - began
        self._tell(row | {"write_s": max(write_times), "stalled_s": stalled_s})

    def _make_room(self, final: Path, num_bytes: int) -> Path:
        """Rank 0 makes the folder that all write into; its name says whose attempt it is."""
        partial: Path | None = None
        with _together(f"making room for the checkpoint {final.name}"):
            if self._attempt is not None:
                self._attempt.check()
                partial = final.with_name(f"{final.name}{sealed.PARTIAL}-{self._attempt.label}")
                _make_room(partial, num_bytes, self._attempt.number)
        return next(path for path in _gather(partial) if path is not None)


def _timed_write(path: Path, tensors: dict[str, torch.Tensor]) -> tuple[sealed.SealedFile, float]:
    began = time.perf_counter()
    return sealed.write_tensors(path, tensors), time.perf_counter() - began


def _tensors_of_this_rank(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """What this rank writes: its share of the state, as views of the live tensors, and its generators.

    Args:
        engine: The DeepSpeed engine.

    Returns:
        `<kind>/<first element>/<parameter>` and `generator/0/<which>` to tensor.

    Raises:
        TrainerError: A weight or moment is not finite; on every rank.
    """
    has_own_moments = engine_state.has_own_moments(engine)
    kinds = KINDS if engine_state.num_optimizer_steps(engine) and not has_own_moments else KINDS[:1]
    tensors: dict[str, torch.Tensor] = {}
    with _together("collecting what is to be saved"):
        here = engine_state.fragments(engine)
        if has_own_moments:
            tensors |= {f"moments/{name}": tensor for name, tensor in engine_state.own_moments(engine, here).items()}
        for of_one_master, is_passing in engine_state.by_master(engine, here):
            for fragment in of_one_master:
                parts = _parts_of(engine, fragment, kinds)
                tensors |= {name: part.clone() for name, part in parts.items()} if is_passing else parts
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                kind, _, parameter = name.split("/", 2)
                raise TrainerError(f"{kind} of {parameter} is not finite, so it is not saved")
    return tensors | _generators()


def _parts_of(
    engine: DeepSpeedEngine, fragment: engine_state.Fragment, kinds: tuple[Kind, ...]
) -> dict[str, torch.Tensor]:
    """What this rank writes of a fragment; where every rank has all of it, an equal part each."""
    first, end = 0, fragment.numel
    if engine_state.is_replicated(engine):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        first, end = fragment.numel * rank // world_size, fragment.numel * (rank + 1) // world_size
    return {
        f"{kind}/{fragment.start + first}/{fragment.name}": engine_state.view(engine, fragment, kind)[first:end]
        for kind in (kinds if end > first else ())
    }


def _make_room(partial: Path, num_bytes: int, attempt: int) -> None:
    """Clear away what earlier attempts left; what a later one writes, should this one have been asleep, is not ours."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    for leftover in partial.parent.iterdir():
        owner = re.search(rf"{re.escape(sealed.PARTIAL)}-A(\d+)-\w+$", leftover.name)
        if leftover.name.endswith(sealed.REMOVED) or (owner and int(owner[1]) <= attempt):
            shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(partial.parent).free
    if free < num_bytes:
        raise TrainerError(
            f"{partial.parent} has {free:,} bytes free, the checkpoint needs {num_bytes:,}: free some space, lower "
            "training.keep_checkpoints, or put the run elsewhere"
        )
    partial.mkdir()


def _seal_content(engine: DeepSpeedEngine, progress: Progress, validation_loss: float | None) -> dict[str, Any]:
    scheduler = engine.lr_scheduler
    return {
        "format": FORMAT,
        "progress": asdict(progress),
        "validation_loss": validation_loss if validation_loss is not None and math.isfinite(validation_loss) else None,
        "world_size": dist.get_world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "num_optimizer_steps": engine_state.num_optimizer_steps(engine),
        "moments": _moments_layout(engine),
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
        "lr_scheduler": scheduler.state_dict() if hasattr(scheduler, "state_dict") else None,
        "parameters": _shapes(engine),
    }


def _moments_layout(engine: DeepSpeedEngine) -> str | None:
    """What moments in a form of their own need to be restored; None for moments that fit every layout."""
    if not engine_state.has_own_moments(engine):
        return None
    world_size, stage = dist.get_world_size(), engine.zero_optimization_stage()
    name = type(engine.basic_optimizer).__name__
    return f"{name} with training.num_workers {world_size} and deepspeed.stage {stage}"


def _shapes(engine: DeepSpeedEngine) -> dict[str, list[int]]:
    return {name: engine_state.shape_of(parameter) for name, parameter in engine_state.trainable(engine).items()}


def _prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the one with the lowest validation loss."""
    steps = sealed_steps(folder)
    losses = {}
    for step in steps:
        with suppress(TrainerError):  # a seal that was damaged since: nobody would take this checkpoint for the best
            loss = sealed.read_seal(folder / f"step-{step}")[0]["validation_loss"]
            losses |= {step: loss} if loss is not None else {}
    kept = set(steps[:keep]) | ({min(losses, key=lambda step: losses[step])} if losses else set())
    for step in steps:
        if step not in kept:
            sealed.remove(folder / f"step-{step}")


# --- restore --------------------------------------------------------------------------------------


def restore(engine: DeepSpeedEngine, run_dir: Path, base: dict[str, str] | None = None) -> Progress | None:
    """Give a fresh engine the newest whole checkpoint's state; collective, before the first step.

    A damaged checkpoint is named in a warning, set aside as `step-N.damaged`, and the one before it is taken.

    Args:
        engine: The DeepSpeed engine as `deepspeed.initialize` returned it.
        run_dir: The run.
        base: Digests of the base model's files, on rank 0 (see `trainer.base_files`).

    Returns:
        Where the run goes on; None where it has no checkpoint.

    Raises:
        TrainerError: All checkpoints are damaged, or the newest belongs to another model or base; on every rank.
    """
    checkpoint = _agree_on_checkpoint(checkpoints_dir(run_dir))
    if checkpoint is None:
        return None
    content, files = sealed.read_seal(checkpoint)
    with _together(f"restoring {checkpoint}"):
        _refuse_other_model(engine, content["parameters"], checkpoint)
        _refuse_other_moments(content.get("moments"), _moments_layout(engine), checkpoint)
        if dist.get_rank() == 0:
            refuse_other_base(content["base"], base)
    with _together(f"restoring {checkpoint}"), StoredTensors(checkpoint, [file.name for file in files]) as stored:
        engine_state.load(engine, stored.read, content["num_optimizer_steps"])
        if engine_state.has_own_moments(engine):
            engine_state.load_own_moments(engine, stored.own_moments(dist.get_rank()), content["num_optimizer_steps"])
        if dist.get_world_size() == content["world_size"]:
            _set_generators(stored.generators(dist.get_rank()))
        else:
            _seed_generators(content["progress"]["step"])
    engine_state.refresh(engine)
    for name, value in content["counters"].items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()  # a step's edge, as it was
    if content["lr_scheduler"] is not None and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(content["lr_scheduler"])
    scale = content["progress"].get("loss_scale")
    return Progress(**content["progress"] | {"loss_scale": LossScale(**scale) if scale else None})


def _agree_on_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that every rank found whole; each hashes its share of the files."""
    steps: list[int] = _gather(sealed_steps(folder))[0]
    damage: list[str] = []
    damaged: list[Path] = []
    for step in steps:
        checkpoint = folder / f"step-{step}"
        found = _gather(damage_of(checkpoint, rank=dist.get_rank(), world_size=dist.get_world_size()))
        problems = sorted({problem for words in found for problem in words})
        if not problems:
            _set_aside(damaged)
            return checkpoint
        damage += problems
        damaged.append(checkpoint)
        logger.warning("checkpoint step-%d is passed over: %s", step, "; ".join(problems))
    with _together("looking for a checkpoint"):
        refuse_fresh_start(folder, damage)
    return None


def _set_aside(damaged: list[Path]) -> None:
    """Only after a whole one was found: while all are damaged they keep their names, and every start says so."""
    with _together("setting damaged checkpoints aside"):
        for checkpoint in damaged if dist.get_rank() == 0 else ():
            aside = checkpoint.with_name(checkpoint.name + DAMAGED)
            sealed.remove_tree(aside)
            checkpoint.rename(aside)


def _refuse_other_moments(stored: str | None, live: str | None, checkpoint: Path) -> None:
    if stored != live:
        raise TrainerError(
            f"{checkpoint} holds the moments of {stored or 'adamw'}, which {live or 'adamw'} can't take over: go on "
            "with what it was written with, or start anew in another folder"
        )


def _refuse_other_model(engine: DeepSpeedEngine, stored: dict[str, list[int]], checkpoint: Path) -> None:
    live = _shapes(engine)
    if live == stored:
        return
    for name in sorted(live.keys() | stored.keys()):
        if live.get(name) != stored.get(name):
            raise TrainerError(
                f"{checkpoint} was written for another model or tuning method: the trained parameter {name} has shape "
                f"{stored.get(name, 'none (absent)')} there and {live.get(name, 'none (absent)')} here"
            )
