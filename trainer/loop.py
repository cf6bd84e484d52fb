"""The training loop, readable as the algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer import checkpoint
from trainer.config import EarlyStopping, TrainingConfig
from trainer.data.batches import Batches, StepBatches
from trainer.errors import Preempted, TrainerError
from trainer.failures import Skip, StepGuard, Stop, after_nonfinite
from trainer.flops import Arithmetic
from trainer.loss import gradient_scale
from trainer.loss_scale import SMALLEST, LossScale
from trainer.metrics import StepTrace, memory_bytes, traced
from trainer.stopping import stop_requested


@dataclass(frozen=True)
class Found:
    """What was found when the worker started, as against what was asked for."""

    rank: int
    world_size: int
    device: torch.device
    run_dir: Path


def learning_rate(step: int, max_steps: int, config: TrainingConfig) -> float:
    """The rate of one optimizer step: a linear rise, then the decay.

    The rise reaches the peak in the step behind the warm-up; the decay would reach min_lr_ratio of the peak in the
    step behind the last one. So no step is wasted on a rate of 0.

    >>> from trainer.config import EarlyStopping, TrainingConfig
    >>> config = TrainingConfig(lr=0.1, lr_schedule="linear", warmup_ratio=0.2)
    >>> [round(learning_rate(step, 10, config), 4) for step in (1, 2, 3, 7, 10)]
    [0.0333, 0.0667, 0.1, 0.05, 0.0125]

    Args:
        step: Number of the step, from 1.
        max_steps: Steps of the whole run.
        config: lr, lr_schedule, warmup_ratio, min_lr_ratio.

    Returns:
        The learning rate.
    """
    warmup = min(math.ceil(config.warmup_ratio * max_steps), max_steps - 1)
    if step <= warmup:
        return config.lr * step / (warmup + 1)
    done = (step - 1 - warmup) / (max_steps - warmup)
    match config.lr_schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - done
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)


def num_steps(config: TrainingConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: num_epochs of them, or max_steps where that is fewer.

    Args:
        config: num_epochs and max_steps.
        steps_per_epoch: Steps of one pass over the train split.

    Returns:
        At least 1.
    """
    wanted = max(1, math.ceil(config.num_epochs * steps_per_epoch))
    return wanted if config.max_steps is None else min(wanted, config.max_steps)


def summed_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Each value's sum over all ranks, in fp64.

    Args:
        values: As many on every rank.
        device: Where the collective runs.

    Returns:
        The sums, equal on every rank.
    """
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step came to.

    Attributes:
        summed_loss: Over all ranks' micro-batches, in nats.
        wait_s: Seconds that this rank waited for data.
        refused: Why the step was not taken; None when it was.
        suspects: This rank's micro-batches whose own loss is not finite.
        overflowed: Whether it was refused because the gradient overflowed fp16 at a loss scale that can be lowered.
        stop: Whether a rank was asked to stop.
        gradient_norm: Of the whole gradient before clipping; None where the step was refused.
    """

    summed_loss: float
    wait_s: float
    refused: str | None
    suspects: list[int]
    overflowed: bool
    stop: bool
    gradient_norm: float | None


def optimizer_step(
    engine: Any,  # noqa: ANN401
    batch: StepBatches,
    lr: float,
    found: Found,
    guard: StepGuard,
    beat: Callable[[], None] = lambda: None,
    loss_scale: LossScale | None = None,
) -> StepOutcome:
    """Forward, backward and update of one step.

    Args:
        engine: DeepSpeed's engine; calling it gives a micro-batch's summed loss.
        batch: This rank's micro-batches, and the whole step's count of target tokens.
        lr: Learning rate of this step.
        found: Rank, world and device.
        guard: Takes the step, or refuses it where a number is not finite.
        beat: Called before each micro-batch.
        loss_scale: What DeepSpeed multiplies the loss by, in fp16.

    Returns:
        The step's outcome, equal on every rank but for its wait and its suspects.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    if loss_scale is not None:
        engine.optimizer.loss_scaler.cur_scale = loss_scale.value
    scale = gradient_scale(batch.num_target_tokens, found.world_size)
    losses: list[torch.Tensor] = []
    wait_s = 0.0
    asked = time.perf_counter()
    for micro_batch in batch.micro_batches:
        wait_s += time.perf_counter() - asked
        beat()
        if losses:
            engine.step()  # not yet the batch's last: DeepSpeed only counts
        summed_loss = engine(**micro_batch)
        engine.backward(summed_loss * scale, scale_wrt_gas=False)
        losses.append(summed_loss.detach())
        asked = time.perf_counter()
    each = torch.stack(losses)
    asked_to_stop = float(stop_requested(found.run_dir))
    total, stop = summed_over_ranks([each.sum().item(), asked_to_stop], found.device)
    unsharded = unsharded_norm(engine)
    refused = guard.take_step(total)
    suspects = (~each.isfinite()).nonzero().flatten().tolist() if refused else []
    norm = engine.get_global_grad_norm() if unsharded is None else unsharded
    can_be_lowered = loss_scale is not None and loss_scale.value > SMALLEST
    overflowed = refused is not None and math.isfinite(total) and can_be_lowered
    return StepOutcome(total, wait_s, refused, suspects, overflowed, stop > 0, None if norm is None else float(norm))


def unsharded_norm(engine: Any) -> float | None:  # noqa: ANN401
    """Norm of the gradient where DeepSpeed keeps none: ZeRO 0 in fp32, whose gradients every rank holds whole.

    Args:
        engine: After the backward pass that ends a step, before the step.

    Returns:
        The norm before clipping; None in the other layouts, where the engine knows it after the step.
    """
    if engine.optimizer is not engine.basic_optimizer:
        return None
    parameters = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    return float(torch.nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None]))


def validation_loss(
    engine: Any,  # noqa: ANN401
    batches: Batches,
    found: Found,
    beat: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Token mean of the loss over a split.

    Args:
        engine: DeepSpeed's engine.
        batches: The split, cut over the ranks.
        found: Rank, world and device.
        beat: Called before each micro-batch.

    Returns:
        The mean in nats a token, and the number of target tokens.
    """
    engine.eval()
    total = torch.zeros((), device=found.device, dtype=torch.float64)
    num_target_tokens = 0
    with torch.no_grad():
        for step in range(batches.steps_per_epoch):
            batch = batches.step(0, step)
            num_target_tokens += batch.num_target_tokens
            for micro_batch in batch.micro_batches:
                beat()
                total += engine(**micro_batch)
    engine.train()
    return summed_over_ranks([total.item()], found.device)[0] / max(1, num_target_tokens), num_target_tokens


@dataclass(frozen=True)
class Run:
    """All that the loop works on."""

    engine: Any
    """DeepSpeed's engine; calling it with a micro-batch gives the summed loss."""
    config: TrainingConfig
    train_batches: Batches
    validation_batches: Batches
    found: Found
    tell: Callable[[dict[str, Any]], None]
    """Takes each row of the metrics, on every rank."""
    guard: StepGuard
    validation_losses: list[float]
    """Of all validations so far, those before a restart included."""
    arithmetic: Arithmetic
    """What a step costs and what the devices can do."""
    trace: StepTrace
    """PyTorch's profiler."""
    saver: checkpoint.Saver
    """Writes checkpoints while training goes on."""
    beat: Callable[[int], None]
    """Told the steps taken so far whenever something went on; a long silence is taken for a hang."""

    @property
    def max_steps(self) -> int:
        """Optimizer steps from the start of training to its end."""
        return num_steps(self.config, self.train_batches.steps_per_epoch)


def train(run: Run, progress: checkpoint.Progress) -> checkpoint.Progress:
    """Train from a position to the end; the last step always leaves a validation loss and a checkpoint.

    Args:
        run: What is trained, on what, how.
        progress: Where to go on; all zeros for a fresh start.

    Returns:
        The position behind the last step.

    Raises:
        Preempted: Somebody asked the run to stop; a checkpoint was written.
    """
    config = run.config
    if progress.step == 0:
        validate(run, 0)
    finished = is_finished(run, progress)
    while not finished:
        with traced(config.profile, progress.step + 1, run.trace):
            progress, stop = one_step(run, progress)
        run.saver.poll()
        due = progress.step == run.max_steps or progress.step % config.validate_every == 0
        watched = validate(run, progress.step) if due else None
        finished = is_finished(run, progress)
        if finished or stop or progress.step % config.checkpoint_every == 0:
            run.beat(progress.step)
            run.saver.save(progress, validation_loss=watched, wait=finished or stop)
        if stop and not finished:
            raise Preempted(f"asked to stop, and saved after step {progress.step} of {run.max_steps}")
    return progress


def is_finished(run: Run, progress: checkpoint.Progress) -> bool:
    """Whether all steps are taken, or the validation loss no longer falls."""
    return progress.step >= run.max_steps or no_longer_falls(run.validation_losses, run.config.early_stopping)


def no_longer_falls(losses: list[float], config: EarlyStopping | None) -> bool:
    """Whether the last `patience` validations brought no new best.

    >>> from trainer.config import EarlyStopping
    >>> no_longer_falls([3.0, 2.0, 2.1, 1.99], EarlyStopping(patience=2))
    False
    >>> no_longer_falls([3.0, 2.0, 2.1, 1.99], EarlyStopping(patience=2, min_delta=0.1))
    True

    Args:
        losses: Of all validations in order, the one before step 1 included.
        config: Patience and the least fall that counts; None never stops.

    Returns:
        True when training should end.
    """
    if config is None:
        return False
    best, since_best = math.inf, 0
    for loss in losses:
        if loss < best - config.min_delta:
            best, since_best = loss, 0
        else:
            since_best += 1
    return since_best >= config.patience


def one_step(run: Run, progress: checkpoint.Progress) -> tuple[checkpoint.Progress, bool]:
    """Take one optimizer step and tell its row of the metrics.

    Args:
        run: What is trained, on what, how.
        progress: The position of the step.

    Returns:
        The position of the step after it, and whether the run was asked to stop.

    Raises:
        TrainerError: The loss or the gradient is not finite and training.on_nonfinite allows no (further) skip.
    """
    began = time.perf_counter()
    step = progress.step + 1
    batch = run.train_batches.step(progress.epoch, progress.step_in_epoch)
    lr = learning_rate(step, run.max_steps, run.config)
    outcome, scale = scaled_step(run, progress, batch, lr)
    step_s = time.perf_counter() - began
    if outcome.refused:
        skipped_step(run, progress, batch, outcome)
    after = checkpoint.Progress(
        step,
        *divmod(step, run.train_batches.steps_per_epoch),
        total_tokens=progress.total_tokens + (0 if outcome.refused else batch.num_tokens),
        num_skipped=progress.num_skipped + (1 if outcome.refused else 0),
        loss_scale=scale and scale.after_step(),
    )
    if not outcome.refused:
        run.tell(train_row(run, after, batch, outcome, lr=lr, step_s=step_s, scale=scale))
    return after, outcome.stop


def scaled_step(
    run: Run, progress: checkpoint.Progress, batch: StepBatches, lr: float
) -> tuple[StepOutcome, LossScale | None]:
    """Take a step, in fp16 at the largest loss scale at which its gradient does not overflow: no batch is left out.

    Args:
        run: What is trained.
        progress: The position of the step, and the loss scale to begin with.
        batch: Its micro-batches, which can be read again.
        lr: Its learning rate.

    Returns:
        The last attempt's outcome, and the scale it was made at.
    """
    scale = progress.loss_scale
    while True:
        outcome = optimizer_step(
            run.engine, batch, lr, run.found, run.guard, lambda: run.beat(progress.step), loss_scale=scale
        )
        if scale is None or not outcome.overflowed:
            return outcome, scale
        scale = scale.after_overflow()


def train_row(
    run: Run,
    after: checkpoint.Progress,
    batch: StepBatches,
    outcome: StepOutcome,
    *,
    lr: float,
    step_s: float,
    scale: LossScale | None,
) -> dict[str, Any]:
    """The row of metrics.jsonl of a step that was taken.

    Args:
        run: What is trained.
        after: The position behind the step.
        batch: What was trained on.
        outcome: Loss, gradient norm and wait.
        lr: Its learning rate.
        step_s: Its time, in seconds.
        scale: Its loss scale, in fp16.

    Returns:
        JSON-able; times in seconds, sizes in bytes, losses in nats a token.
    """
    row = {
        "kind": "train",
        "step": after.step,
        "max_steps": run.max_steps,
        "epoch": after.step / run.train_batches.steps_per_epoch,
        "loss": outcome.summed_loss / max(1, batch.num_target_tokens),
        "lr": lr,
        "grad_norm": outcome.gradient_norm,
        "num_tokens": batch.num_tokens,
        "num_target_tokens": batch.num_target_tokens,
        "total_tokens": after.total_tokens,
        "padding_share": 1 - batch.num_tokens / batch.num_slots,
        "step_s": step_s,
        "tokens_per_s": batch.num_tokens / step_s,
        "tokens_per_s_per_device": batch.num_tokens / step_s / run.found.world_size,
        "wait_s": outcome.wait_s,
        "memory_bytes": memory_bytes(run.found.device),
        "mfu": run.arithmetic.utilisation(batch.num_tokens, squared_lengths(batch, run.found), step_s),
    }
    return row if scale is None else row | {"loss_scale": scale.value, "num_overflows": scale.num_overflows}


def squared_lengths(batch: StepBatches, found: Found) -> float:
    """Sum of the squared document lengths of the step: this rank's share times the ranks, which are balanced by it."""
    packs = batch.packs[batch.packs >= 0]
    return float(batch.split.pack_costs[packs].sum()) * found.world_size


def skipped_step(run: Run, progress: checkpoint.Progress, batch: StepBatches, outcome: StepOutcome) -> None:
    """Say that a step was not taken, if the configuration lets training go on at all.

    Args:
        run: What is trained.
        progress: The position of the step.
        batch: Its rows on this rank.
        outcome: Why it was refused.

    Raises:
        TrainerError: No (further) step may be skipped.
    """
    row_ids = rows_at_fault(batch, outcome.suspects, run.found.world_size)
    step, cause = progress.step + 1, str(outcome.refused)
    match after_nonfinite(run.config.on_nonfinite, progress.num_skipped, step, cause, row_ids):
        case Stop(message):
            run.saver.finish()  # the checkpoint that is being written is whole: nothing of this step is in it
            raise TrainerError(message)
        case Skip():
            epoch = step / run.train_batches.steps_per_epoch
            run.tell({"kind": "skipped", "step": step, "epoch": epoch, "cause": cause, "row_ids": row_ids})


def rows_at_fault(batch: StepBatches, suspects: list[int], world_size: int) -> list[str]:
    """Ids of the rows of all ranks that may have made a step not finite.

    Args:
        batch: This rank's rows.
        suspects: Its micro-batches whose own loss is not finite.
        world_size: Ranks.

    Returns:
        The rows of all suspects; where there are none, the gradient overflowed, and every row of the step is named.
    """
    everywhere: list[Any] = [None] * world_size
    numbers = (suspects, range(len(batch.packs)))
    dist.all_gather_object(everywhere, [[row for i in some for row in batch.row_ids(i)] for some in numbers])
    return [row for mine, _ in everywhere for row in mine] or [row for _, whole in everywhere for row in whole]


def validate(run: Run, step: int) -> float:
    """Take the validation loss and tell its row of the metrics.

    Args:
        run: What is trained, on what, how.
        step: Optimizer steps taken so far.

    Returns:
        The mean in nats a target token.
    """
    loss, num_target_tokens = validation_loss(run.engine, run.validation_batches, run.found, lambda: run.beat(step))
    epoch = step / run.train_batches.steps_per_epoch
    run.validation_losses.append(loss)
    run.tell({"kind": "validation", "step": step, "epoch": epoch, "loss": loss, "num_target_tokens": num_target_tokens})
    return loss
