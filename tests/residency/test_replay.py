"""Replays: Belady's order against a search of all decisions, and what is counted."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from openmint.residency.eviction import LeastRecent, LeastWorth
from openmint.residency.load_times import LoadTimes
from openmint.residency.replay import FarthestUse, Use, replay
from openmint.types import Digest


def uses_of(indices: list[int], num_bytes: int = 10) -> list[Use]:
    return [Use(Digest(f"sha256:{index}"), num_bytes) for index in indices]


def fewest_loads(uses: list[Use], room: int) -> int:
    """By trying every eviction."""

    @cache
    def best(at: int, resident: frozenset[Digest]) -> int:
        if at == len(uses):
            return 0
        wanted = uses[at].revision
        if wanted in resident:
            return best(at + 1, resident)
        if len(resident) < room:
            return 1 + best(at + 1, resident | {wanted})
        return 1 + min(best(at + 1, resident - {gone} | {wanted}) for gone in resident)

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(12))
def test_the_farthest_use_first_loads_as_little_as_can_be(seed: int) -> None:
    uses = uses_of(np.random.default_rng(seed).integers(0, 6, 24).tolist())
    found = replay(uses, FarthestUse(uses), budget_bytes=30, load=lambda _: 1.0)
    assert found.num_loads == fewest_loads(uses, 3)


def test_loads_are_counted_with_their_bytes_and_seconds() -> None:
    times = LoadTimes()
    times.learn(10, 0.5)
    uses = uses_of([1, 2, 1, 3, 1, 2])
    found = replay(uses, LeastRecent(), 20, lambda use: times.seconds(use.num_bytes))
    assert (found.num_uses, found.num_loads, found.loaded_bytes) == (6, 4, 40)
    assert found.load_seconds == pytest.approx(2.0)
    assert found.hit_share == pytest.approx(2 / 6)


def test_the_future_is_not_beaten_by_the_past() -> None:
    uses = uses_of((np.random.default_rng(0).zipf(1.3, 3000) % 200).tolist())
    times = LoadTimes()
    oracle, lru, ours = (
        replay(uses, order, 300, lambda _: 1.0).num_loads
        for order in (FarthestUse(uses), LeastRecent(), LeastWorth(times))
    )
    assert oracle < ours < lru
