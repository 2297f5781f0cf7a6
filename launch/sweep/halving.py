"""Successive halving: after equal shares of the training, only the best members go on. Pure functions.

Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016
(https://arxiv.org/abs/1502.07943), in the form that Hyperband uses: ``n`` members begin. At rung ``k = 0, 1, …`` all that are
left have trained exactly ``ceil(steps / eta**(K - k))`` of their steps, and the ``max(1, floor(n / eta**(k + 1)))`` with the best
score, measured at that very step, continue. There are ``K = floor(log_eta(n))`` rungs. Of equal scores the lower number
continues. A member without a finite score at that step does not continue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def rungs(members: int, eta: int) -> int:
    """Number of comparisons, ``floor(log_eta(members))``, counted in integers."""
    number = 0
    while members >= eta ** (number + 1):
        number += 1
    return number


def rung_step(steps: int, rung: int, number: int, eta: int) -> int:
    """Step at which a member is compared.

    Args:
        steps: its steps in total.
        rung: from 0.
        number: of rungs.
        eta: the factor between rungs.
    """
    return -(-steps // eta ** (number - rung))


def survivors(scores: Mapping[int, float | None], members: int, rung: int, eta: int, *, higher: bool) -> list[int]:
    """Members that continue after a rung, best first.

    Args:
        scores: of the members that were left, by number; ``None`` where there is none.
        members: number of members at the beginning.
        rung: from 0.
        eta: the factor between rungs.
        higher: whether a higher score is better.
    """
    finite = {member: score for member, score in scores.items() if score is not None and math.isfinite(score)}
    ranked = sorted(finite, key=lambda member: (-finite[member] if higher else finite[member], member))
    return ranked[: max(1, members // eta ** (rung + 1))]
