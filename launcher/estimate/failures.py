"""How much of a long run is lost to checkpoints and to failures, and how often a checkpoint should be written.

With failures that come at random at one rate (an exponential law), Daly ("A higher order estimate of the optimum
checkpoint interval for restart dumps", 2006, equation 13) gives the time that a stretch of work takes in the mean;
Young's interval (1974), the root of twice the cost of a checkpoint times the mean time between failures, is the
shortest formula for where that is least.
"""

from __future__ import annotations

import math

# 419 unexpected interruptions in 54 days on 2,048 nodes: The Llama 3 Herd of Models, arXiv:2407.21783, section 3.3.4.
NODE_MTBF_S = 54 * 86_400 * 2_048 / 419


def share_lost(work_s: float, cost_s: float, restart_s: float, mtbf_s: float) -> float:
    """Share of the time that is not training, in the mean. Pure.

    >>> round(share_lost(work_s=3600, cost_s=60, restart_s=300, mtbf_s=86_400), 3)
    0.04

    Args:
        work_s: training between two checkpoints, in seconds.
        cost_s: what one checkpoint holds training up, in seconds.
        restart_s: from a failure until training goes on, in seconds.
        mtbf_s: mean time between failures of the whole group, in seconds.

    Returns:
        Between 0 and 1: writing, starting again, and work that is done twice.
    """
    # A failure may strike at any time, restarts included.
    taken = mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((work_s + cost_s) / mtbf_s)
    return 1 - work_s / taken


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Young's interval between checkpoints, in seconds of training. Pure.

    Args:
        cost_s: what one checkpoint holds training up, in seconds.
        mtbf_s: mean time between failures of the whole group, in seconds.

    Returns:
        The interval at which the least is lost, for a cost that is small beside the time between failures.
    """
    return math.sqrt(2 * cost_s * mtbf_s)
