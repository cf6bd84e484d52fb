"""bitsandbytes' moments, kept in a form of their own: a fresh optimizer goes on with them to the bit."""

from types import SimpleNamespace

import pytest
import torch

from trainer import engine_state
from trainer.config import TrainingConfig
from trainer.tuning import optimizer_for

BITSANDBYTES = ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


def engine_of(name, weights=None):
    """What engine_state needs of a DeepSpeed engine with ZeRO 0 in fp32, which leaves the optimizer as it is."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(100, 90), torch.nn.LayerNorm(90), torch.nn.Linear(90, 7))
    if weights is not None:
        model.load_state_dict(weights)
    config = TrainingConfig(optimizer=name, weight_decay=0.1, adam_beta2=0.95)
    optimizer = optimizer_for(model, config)
    return SimpleNamespace(module=model, optimizer=optimizer, basic_optimizer=optimizer)


def train(engine, first, last):
    for step in range(first, last):
        inputs = torch.randn(8, 100, generator=torch.Generator().manual_seed(step))
        engine.module(inputs).square().mean().backward()
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2
        engine.optimizer.step()
        engine.optimizer.zero_grad()


def weights_of(engine):
    return {name: weight.clone() for name, weight in engine.module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_moments_of_its_own_form_are_restored_to_the_bit(name):
    engine = engine_of(name)
    assert engine_state.has_own_moments(engine)
    assert engine_state.own_moments(engine, engine_state.fragments(engine)) == {}
    train(engine, 0, 3)
    weights = weights_of(engine)
    live = engine_state.own_moments(engine, engine_state.fragments(engine))
    moments = {key: tensor.clone() for key, tensor in live.items()}
    assert {tensor.dtype for key, tensor in moments.items() if key.startswith("0/state")} == {
        torch.uint8 if "8bit" in name else torch.float32
    }
    again = engine_of(name, weights)
    engine_state.load_own_moments(again, moments, engine_state.num_optimizer_steps(engine))
    for one in (engine, again):
        train(one, 3, 6)
    for key, weight in weights_of(again).items():
        assert torch.equal(weight, weights_of(engine)[key]), key
    assert engine_state.num_optimizer_steps(again) == 6


def test_adamw_has_moments_that_fit_every_layout():
    assert not engine_state.has_own_moments(engine_of("adamw"))


def test_no_optimizer_moves_anything_before_its_rate_is_set():
    for name in ("adamw", "adamw_8bit"):
        assert {group["lr"] for group in engine_of(name).optimizer.param_groups} == {0.0}
