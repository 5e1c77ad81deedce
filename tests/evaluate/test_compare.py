"""The bound of a paired difference: beside a search for the likeliest chances, and simulated."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt
from statistics import NormalDist

import numpy as np
import pytest

from openmint.evaluate.compare import Pairs, lower_bound, pairs_of, score_statistic

CASES = [Pairs(44, 0, 1), Pairs(50, 5, 3), Pairs(200, 3, 17), Pairs(20, 9, 0), Pairs(400, 40, 41)]


def likeliest_lost(pairs: Pairs, difference: float) -> float:
    """By search instead of by formula: the chance of a loss that makes the counts likeliest."""
    low, high = max(0.0, -difference), (1 - difference) / 2
    grid_G = np.linspace(low, high, 400_001)[1:-1]
    same = pairs.num_items - pairs.num_gained - pairs.num_lost
    likelihood_G = (
        pairs.num_gained * np.log(grid_G + difference)
        + pairs.num_lost * np.log(grid_G)
        + same * np.log1p(-2 * grid_G - difference)
    )
    return float(grid_G[likelihood_G.argmax()])


@pytest.mark.parametrize("pairs", CASES)
@pytest.mark.parametrize("difference", [-0.3, -0.05, 0.02, 0.2])
def test_the_statistic_is_what_a_search_for_the_likeliest_chances_gives(
    pairs: Pairs, difference: float
) -> None:
    lost = likeliest_lost(pairs, difference)
    variance = (2 * lost + difference - difference**2) / pairs.num_items
    searched = (pairs.difference - difference) / sqrt(variance)
    assert score_statistic(pairs, difference) == pytest.approx(searched, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("pairs", CASES)
def test_the_bound_lies_where_the_statistic_is_the_quantile(pairs: Pairs) -> None:
    for confidence in (0.8, 0.95, 0.99):
        bound = lower_bound(pairs, confidence)
        assert -1 < bound < pairs.difference
        quantile = NormalDist().inv_cdf(confidence)
        assert score_statistic(pairs, bound) == pytest.approx(quantile, abs=1e-6)


def test_the_bound_falls_with_confidence_and_rises_with_evidence() -> None:
    bounds = [lower_bound(Pairs(100, 8, 8), confidence) for confidence in (0.6, 0.9, 0.99)]
    assert bounds == sorted(bounds, reverse=True)
    for less, more in pairwise([Pairs(50 * k, 3 * k, 2 * k) for k in (1, 4, 16)]):
        assert lower_bound(less, 0.95) < lower_bound(more, 0.95)
    assert lower_bound(Pairs(100, 0, 100), 0.95) == -1.0
    assert lower_bound(Pairs(0, 0, 0), 0.95) == -1.0


def test_two_that_answer_alike_are_close_but_not_proven_equal() -> None:
    alike = Pairs(100, 0, 0)
    # The largest loss that leaves no trace in n items: d with n d / (1 - d) = z².
    z2 = NormalDist().inv_cdf(0.95) ** 2
    assert lower_bound(alike, 0.95) == pytest.approx(-z2 / (100 + z2), abs=1e-6)


@pytest.mark.parametrize(("gained", "lost"), [(0.05, 0.10), (0.01, 0.06), (0.15, 0.20)])
@pytest.mark.parametrize("num_items", [60, 300])
def test_a_revision_that_is_worse_by_the_margin_passes_as_rarely_as_promised(
    gained: float, lost: float, num_items: int
) -> None:
    """Its true difference is -0.05, so a bound above it is an error: one time in twenty."""
    random = np.random.default_rng(7)
    chances = [gained, lost, 1 - gained - lost]
    counts = random.multinomial(num_items, chances, size=4000)
    wrong = [lower_bound(Pairs(num_items, g, n), 0.95) > -0.05 for g, n, _ in counts.tolist()]
    assert 0.02 < float(np.mean(wrong)) < 0.065


def test_pairs_are_items_that_both_were_asked() -> None:
    now = [True, True, False, False, True]
    before = [True, False, True, False]
    assert pairs_of(now, before) == Pairs(num_items=4, num_gained=1, num_lost=1)
    assert pairs_of(now, now).difference == 0
