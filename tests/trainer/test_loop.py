import math
from types import SimpleNamespace

import pytest

from trainer import loop
from trainer.checkpoint import Progress
from trainer.config import EarlyStopping, TrainingConfig
from trainer.loop import StepOutcome, learning_rate, no_longer_falls, num_steps, scaled_step
from trainer.loss_scale import LossScale


def rates(num, **changes):
    config = TrainingConfig(lr=1.0, **changes)
    return [learning_rate(step, num, config) for step in range(1, num + 1)]


def test_the_rate_rises_to_the_peak_and_decays_without_reaching_the_end():
    linear = rates(10, warmup_ratio=0.4, lr_schedule="linear")
    assert linear == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_cosine_and_its_floor():
    cosine = rates(4, warmup_ratio=0.0, lr_schedule="cosine", min_lr_ratio=0.2)
    assert cosine == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("num", [1, 2, 7])
def test_no_step_has_a_rate_of_zero_and_one_has_the_peak(schedule, warmup_ratio, num):
    values = rates(num, warmup_ratio=warmup_ratio, lr_schedule=schedule)
    assert min(values) > 0
    assert max(values) == pytest.approx(1.0)


def test_the_number_of_steps_is_what_the_epochs_give_or_fewer():
    assert num_steps(TrainingConfig(num_epochs=1.5), 7) == 11
    assert num_steps(TrainingConfig(num_epochs=3, max_steps=5), 7) == 5
    assert num_steps(TrainingConfig(num_epochs=0.001), 7) == 1


def test_early_stopping_counts_validations_since_the_best():
    config = EarlyStopping(patience=2)
    assert not no_longer_falls([], config)
    assert not no_longer_falls([3.0, 3.5], config)
    assert no_longer_falls([3.0, 3.5, 3.0], config)
    assert not no_longer_falls([3.0, 3.5, 2.9], config)
    assert not no_longer_falls([3.0] * 9, None)
    assert no_longer_falls([3.0, math.nan, math.nan], config)


def test_the_loss_scale_halves_at_once_and_doubles_after_a_thousand_steps():
    scale = LossScale(4.0, clean_steps=5)
    for _ in range(3):
        scale = scale.after_overflow()
    assert scale == LossScale(1.0, clean_steps=0, num_overflows=3)
    for _ in range(999):
        scale = scale.after_step()
    assert scale == LossScale(1.0, clean_steps=999, num_overflows=3)
    assert scale.after_step() == LossScale(2.0, clean_steps=0, num_overflows=3)


def test_a_step_is_taken_again_until_its_gradient_fits_and_a_loss_that_is_not_finite_is_not(monkeypatch):
    tried = []

    def step(*_, loss_scale, **__):
        tried.append(loss_scale and loss_scale.value)
        overflows = loss_scale is not None and loss_scale.value > 8
        return StepOutcome(1.0, 0.0, "no" if overflows or refuse else None, [], overflows, False, None)

    monkeypatch.setattr(loop, "optimizer_step", step)
    run = SimpleNamespace(engine=None, found=None, guard=None, beat=None)
    progress, refuse = Progress(0, 0, 0, 0, loss_scale=LossScale(64.0)), False
    outcome, scale = scaled_step(run, progress, None, 0.1)
    assert (outcome.refused, scale, tried) == (None, LossScale(8.0, num_overflows=3), [64, 32, 16, 8])
    refuse = True
    outcome, scale = scaled_step(run, Progress(0, 0, 0, 0, loss_scale=LossScale(4.0)), None, 0.1)
    assert (outcome.refused, scale.value, tried[4:]) == ("no", 4, [4])
    assert scaled_step(run, Progress(0, 0, 0, 0), None, 0.1)[1] is None
