"""What failures and checkpoints cost: the formulas beside a simulation of runs that fail at random."""

from __future__ import annotations

import doctest
import random

import pytest

from launcher.estimate import failures
from launcher.estimate.failures import best_interval_s, share_lost


def simulated(work_s: float, cost_s: float, restart_s: float, mtbf_s: float, stretches: int) -> float:
    """Share of the time lost over so many stretches of work; a failure may strike at any time, restarts included."""
    draw = random.Random(0)  # noqa: S311 - no secret
    spent = 0.0
    for _ in range(stretches):
        needed = work_s + cost_s
        while (until_failure := draw.expovariate(1 / mtbf_s)) < needed:
            spent += until_failure
            needed = restart_s + work_s + cost_s
        spent += needed
    return 1 - stretches * work_s / spent


@pytest.mark.parametrize(
    ("work_s", "cost_s", "restart_s", "mtbf_s"),
    [
        (3600, 60, 0, 86_400),
        (600, 30, 300, 11_000),
        (7200, 120, 0, 7200),
        (300, 300, 900, 3600),
        (1800, 60, 600, 14_400),
    ],
)
def test_the_formula_is_what_a_simulation_shows(work_s: float, cost_s: float, restart_s: float, mtbf_s: float) -> None:
    expected = simulated(work_s, cost_s, restart_s, mtbf_s, stretches=200_000)
    assert share_lost(work_s, cost_s, restart_s, mtbf_s) == pytest.approx(expected, rel=0.02)


def test_youngs_interval_loses_nearly_the_least() -> None:
    for mtbf_s in (10_000.0, 100_000.0):
        best = best_interval_s(60, mtbf_s)
        least = min(share_lost(float(work_s), 60, 300, mtbf_s) for work_s in range(60, 20_000, 20))
        assert share_lost(best, 60, 300, mtbf_s) == pytest.approx(least, rel=0.05)
        assert share_lost(best / 4, 60, 300, mtbf_s) > 1.2 * least
        assert share_lost(best * 4, 60, 300, mtbf_s) > 1.2 * least


def test_the_example_holds() -> None:
    assert doctest.testmod(failures).failed == 0
