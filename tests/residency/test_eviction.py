"""Orders of eviction, each against what its name says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from openmint.residency.eviction import (
    NUM_COMPARED,
    EvictionOrder,
    LeastFrequent,
    LeastRecent,
    LeastWorth,
)
from openmint.residency.load_times import LoadTimes
from openmint.types import Digest

NAMES = [Digest(f"sha256:{i}") for i in range(400)]


def filled(order: EvictionOrder, num: int) -> None:
    for name in NAMES[:num]:
        order.admit(name, 1)


def misses(order: EvictionOrder, uses: list[int], room: int) -> int:
    """How many uses found their revision gone, in a memory of `room` equal ones."""
    resident, num = set[Digest](), 0
    for index in uses:
        name = NAMES[index]
        order.use(name)
        if name in resident:
            continue
        num += 1
        if len(resident) == room:
            gone = next(order.leaving())
            order.evict(gone)
            resident.remove(gone)
        order.admit(name, 1)
        resident.add(name)
    return num


def misses_of_each(uses: list[int]) -> tuple[int, int, int]:
    """Ours, LRU's, LFU's, in a tenth of the memory."""
    orders = (LeastWorth(LoadTimes()), LeastRecent(), LeastFrequent())
    ours, lru, lfu = (misses(order, uses, len(NAMES) // 10) for order in orders)
    return ours, lru, lfu


def test_recent_and_frequent_by_their_definitions() -> None:
    numbers = np.random.default_rng(0)
    recent, frequent = LeastRecent(), LeastFrequent()
    filled(recent, 20)
    filled(frequent, 20)
    uses = [NAMES[i] for i in numbers.integers(0, 20, 100)]
    for name in uses:
        recent.use(name)
        frequent.use(name)
    last_use = {name: max(i for i, each in enumerate(uses) if each == name) for name in set(uses)}
    assert list(recent.leaving()) == sorted(NAMES[:20], key=lambda n: last_use.get(n, -1))
    counts = Counter(uses)
    assert list(frequent.leaving()) == sorted(NAMES[:20], key=counts.__getitem__)


def test_among_equally_wanted_ones_the_cheapest_to_have_again_leaves_first() -> None:
    times = LoadTimes()
    for size in (1_000, 100_000):
        times.learn(size, 0.001 + size * 1e-9)
    order = LeastWorth(times)
    # Each load has a part that doesn't depend on its size: by the byte, small ones cost more.
    for name, size in zip(NAMES, (2_000, 50_000, 1_000), strict=False):
        order.admit(name, size)
    assert list(order.leaving()) == [NAMES[1], NAMES[0], NAMES[2]]
    order.use(NAMES[1])
    assert list(order.leaving()) == [NAMES[0], NAMES[2], NAMES[1]]


def test_many_residents_all_have_their_turn() -> None:
    order = LeastWorth(LoadTimes())
    filled(order, 3 * NUM_COMPARED)
    assert sorted(order.leaving()) == sorted(NAMES[: 3 * NUM_COMPARED])
    for name in NAMES[1 : 2 * NUM_COMPARED : 2]:
        order.evict(name)
    assert len(list(order.leaving())) == 2 * NUM_COMPARED


@pytest.mark.parametrize("exponent", [0.8, 1.2])
def test_steady_favourites_stay_through_a_flood_of_others(exponent: float) -> None:
    """As LFU does, which knows nothing better here, and LRU doesn't."""
    numbers = np.random.default_rng(0)
    weights = np.arange(1, 401) ** -exponent
    uses = numbers.choice(400, 20_000, p=weights / weights.sum()).tolist()
    ours, lru, lfu = (
        misses(o, uses, 40) for o in (LeastWorth(LoadTimes()), LeastRecent(), LeastFrequent())
    )
    assert ours < 0.92 * lru
    assert ours < 1.06 * lfu


def test_a_set_that_drifts_is_followed() -> None:
    """As LRU does, and LFU doesn't."""
    numbers = np.random.default_rng(0)
    uses = [(i // 200 + int(x)) % 400 for i, x in enumerate(numbers.geometric(0.05, 20_000))]
    ours, lru, lfu = (
        misses(o, uses, 40) for o in (LeastWorth(LoadTimes()), LeastRecent(), LeastFrequent())
    )
    assert ours < 1.05 * lru
    assert ours < 0.7 * lfu


def test_equal_uses_give_equal_decisions() -> None:
    numbers = np.random.default_rng(0)
    uses = numbers.integers(0, 400, 3000).tolist()
    assert misses(LeastWorth(LoadTimes()), uses, 100) == misses(LeastWorth(LoadTimes()), uses, 100)
