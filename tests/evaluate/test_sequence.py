"""Bounds that hold for a whole sequence: by formula, and in simulation after every observation."""

from __future__ import annotations

from math import exp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmint.evaluate.sequence import log_wealth, mean_bounds


@pytest.mark.parametrize(("num", "total"), [(1, 1.0), (10, 3.0), (40, 0.0), (25, 11.5)])
@pytest.mark.parametrize("mean", [0.1, 0.5, 0.93])
def test_the_wealth_is_the_integral_over_all_bets(num: int, total: float, mean: float) -> None:
    p_G = (np.arange(200_000) + 0.5) / 200_000
    gains_G = total * np.log(p_G / mean) + (num - total) * np.log((1 - p_G) / (1 - mean))
    assert exp(log_wealth(num, total, mean)) == pytest.approx(np.exp(gains_G).mean(), rel=1e-4)


@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_bounds_lie_around_the_mean(num: int, share: float, confidence: float) -> None:
    low, high = mean_bounds(num, num * share, confidence)
    assert 0.0 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1.0
    wider = mean_bounds(num, num * share, 0.999)
    assert wider[0] <= low and high <= wider[1]


def test_without_observations_nothing_is_known() -> None:
    assert mean_bounds(0, 0.0, 0.95) == (0.0, 1.0)


def test_bounds_close_in() -> None:
    widths = [np.diff(mean_bounds(n, 0.3 * n, 0.95))[0] for n in (10, 100, 1000)]
    assert widths[0] > widths[1] > widths[2] and widths[2] < 0.12


def values_with_mean(random: np.random.Generator, kind: str, mean: float) -> np.ndarray:
    """Runs of observations, [run, observation]."""
    if kind == "binary":
        return (random.random((400, 400)) < mean).astype(float)
    return random.beta(4 * mean, 4 * (1 - mean), (400, 400))


@pytest.mark.parametrize("kind", ["binary", "between"])
@pytest.mark.parametrize("mean", [0.05, 0.5, 0.9])
def test_the_true_mean_is_hardly_ever_excluded_however_often_one_looks(
    kind: str, mean: float
) -> None:
    """After each of 400; a bound that is made for one look is wrong in a third of the runs."""
    random = np.random.default_rng(1)
    totals = values_with_mean(random, kind, mean).cumsum(axis=1)
    ever_wrong = 0
    for run in totals.tolist():
        ever_wrong += any(log_wealth(i + 1, run[i], mean) >= np.log(20) for i in range(400))
    assert ever_wrong / 400 < 0.07


def test_what_is_clearly_worse_is_noticed_soon() -> None:
    random = np.random.default_rng(2)
    needed = []
    for run in (random.random((200, 400)) < 0.3).astype(float).cumsum(axis=1).tolist():
        firsts = (i + 1 for i in range(400) if mean_bounds(i + 1, run[i], 0.95)[0] > 0.1)
        needed.append(next(firsts, 400))
    assert np.median(needed) < 40
