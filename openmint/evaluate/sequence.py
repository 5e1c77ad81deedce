"""Bounds of a mean that hold however often one looks.

A bound that is right one time in twenty when looked at once is wrong sooner or later when it is
looked at after each observation. These are right for the whole sequence: with the given
confidence, none of them ever excludes the true mean.
"""

from __future__ import annotations

from math import lgamma, log

STEPS = 60
"""Halvings of the interval in which a bound is looked for: beyond what a float can tell."""


def mean_bounds(num: int, total: float, confidence: float) -> tuple[float, float]:
    """Confidence bounds of the mean of `num` values in [0, 1] that add up to `total`.

    A supposed mean is excluded once betting against it, over all constant bets at once, would have
    multiplied a stake by 1 / (1 - confidence) (see `log_wealth`); a bettor gets there from a true
    mean with no more than that chance, ever (Ville's inequality).
    Source: the mixture of Robbins 1970, "Statistical methods related to the law of the iterated
    logarithm", Annals of Mathematical Statistics 41; for values between 0 and 1, Waudby-Smith and
    Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS B 86.
    """
    if num == 0:
        return 0.0, 1.0
    needed, mean = -log(1 - confidence), min(total / num, 1.0)
    low = 0.0 if total <= 0 else _edge(num, total, mean, 0.0, needed)
    high = 1.0 if total >= num else _edge(num, total, mean, 1.0, needed)
    return low, high


def log_wealth(num: int, total: float, mean: float) -> float:
    """Log of what a stake of 1 against the supposed mean has become.

    The bets have the mean p instead, with each p in (0, 1) as likely: the integral of
    (p / mean)^total ((1 - p) / (1 - mean))^(num - total). Values strictly between 0 and 1 win less
    than that, never more, because each bet's gain is a convex function of the value.
    """
    mixed = lgamma(total + 1) + lgamma(num - total + 1) - lgamma(num + 2)
    lost = num - total
    return mixed - (total * log(mean) if total else 0) - (lost * log(1 - mean) if lost else 0)


def _edge(num: int, total: float, inside: float, outside: float, needed: float) -> float:
    """Where, between a mean that is not excluded and an impossible one, exclusion begins."""
    for _ in range(STEPS):
        middle = (inside + outside) / 2
        if middle in (inside, outside):
            break
        if log_wealth(num, total, middle) < needed:
            inside = middle
        else:
            outside = middle
    return outside
