"""Load times: the line that least squares gives, and sense where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from openmint.residency.load_times import FIRST_GUESS_SECONDS, KEPT, LoadTimes


def test_a_guess_comes_before_the_first_measurement() -> None:
    assert LoadTimes().seconds(10) == LoadTimes().mean_seconds == FIRST_GUESS_SECONDS


def test_it_is_the_weighted_least_squares_line() -> None:
    numbers = np.random.default_rng(0)
    sizes_N = numbers.integers(1_000, 50_000_000, 40)
    seconds_N = 0.003 + sizes_N * 2e-9 + numbers.normal(0, 0.001, 40)
    times = LoadTimes()
    for size, seconds in zip(sizes_N, seconds_N, strict=True):
        times.learn(int(size), float(seconds))
    weights_N = KEPT ** np.arange(39, -1, -1)
    slope, start = np.polyfit(sizes_N, seconds_N, 1, w=np.sqrt(weights_N))
    assert times.seconds(7_000_000) == pytest.approx(start + slope * 7_000_000, rel=1e-6)
    assert times.mean_seconds == pytest.approx(np.average(seconds_N, weights=weights_N))


def test_one_size_alone_gives_the_mean() -> None:
    times = LoadTimes()
    for seconds in (0.1, 0.3):
        times.learn(4096, seconds)
    assert times.seconds(1 << 30) == pytest.approx(times.mean_seconds)


def test_it_never_foretells_less_than_nothing() -> None:
    times = LoadTimes()
    times.learn(1_000, 1.0)
    times.learn(1_000_000, 0.1)
    assert times.seconds(10**12) >= 0.0
