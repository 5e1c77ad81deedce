"""Is one revision worse than another, both asked the same items? The data are pairs: for each item,
whether the first was right and whether the second was.

Most items are answered alike by both; only those that one alone got right tell them apart. To look
at the two scores as if they came from different items would throw that away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import copysign, inf, sqrt
from statistics import NormalDist

STEPS = 60
"""Halvings of the interval in which a bound is looked for: beyond what a float can tell."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Items that both were asked."""

    num_items: int
    num_gained: int
    """Right now, wrong before."""
    num_lost: int
    """Wrong now, right before."""

    @property
    def difference(self) -> float:
        """By how much the share of right answers grew."""
        return (self.num_gained - self.num_lost) / self.num_items


def pairs_of(now: Sequence[bool], before: Sequence[bool]) -> Pairs:
    """The items that both have outcomes of: both ask a task's items from the first on."""
    both = list(zip(now, before, strict=False))
    gained = sum(new and not old for new, old in both)
    lost = sum(old and not new for new, old in both)
    return Pairs(len(both), gained, lost)


def lower_bound(pairs: Pairs, confidence: float) -> float:
    """One-sided confidence bound: the true difference is at least this; -1 without any item.

    Every difference below the bound is refused by the score test of `score_statistic`.
    Source: Tango 1998, "Equivalence test and confidence interval for the difference in proportions
    for the paired-sample design", Statistics in Medicine 17:891-908.
    """
    if pairs.num_items == 0:
        return -1.0
    wanted = NormalDist().inv_cdf(confidence)
    low, high = -1.0, pairs.difference
    for _ in range(STEPS):
        middle = (low + high) / 2
        if score_statistic(pairs, middle) > wanted:
            low = middle
        else:
            high = middle
    return low


def score_statistic(pairs: Pairs, difference: float) -> float:
    """How many standard errors the measured difference lies above a supposed true one.

    The error is that of the likeliest chances under which the supposed difference is true: gained
    with chance lost + d, where lost is the larger root of 2n q² + b q + c = 0 (Tango 1998).
    """
    n, gained, lost, d = pairs.num_items, pairs.num_gained, pairs.num_lost, difference
    b = (2 * n - gained + lost) * d - gained - lost
    c = -lost * d * (1 - d)
    q = (sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * q + d * (1 - d))
    above = gained - lost - n * d
    if variance <= 1e-12 * n:
        return 0.0 if above == 0 else copysign(inf, above)
    return above / sqrt(variance)
