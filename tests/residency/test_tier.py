"""A tier of memory: a budget kept, pins honoured, in the order that it was given."""

from __future__ import annotations

import numpy as np

from openmint.residency.eviction import LeastFrequent, LeastRecent, LeastWorth
from openmint.residency.load_times import LoadTimes
from openmint.residency.tier import Tier
from openmint.types import Digest

A, B, C, D = (Digest(name) for name in "abcd")


def admitted(tier: Tier, revision: Digest, size: int) -> list[Digest] | None:
    """What left for it; None when there was no room."""
    leaving = tier.room_for(size)
    if leaving is not None:
        for old in leaving:
            tier.evict(old)
        tier.admit(revision, size)
    tier.check_integrity()
    return leaving


def test_the_first_in_order_leave_and_no_more_than_needed() -> None:
    tier = Tier(30, LeastRecent())
    for revision in (A, B, C):
        assert admitted(tier, revision, 10) == []
    tier.use(A)
    assert admitted(tier, D, 10) == [B]
    assert admitted(tier, B, 15) == [C, A]
    assert (len(tier), tier.used_bytes) == (2, 25)


def test_pinned_revisions_stay_until_the_last_unpin() -> None:
    tier = Tier(20, LeastRecent())
    tier.pin(A)
    tier.pin(A)
    admitted(tier, A, 10)
    admitted(tier, B, 10)
    assert admitted(tier, C, 20) is None
    assert admitted(tier, C, 10) == [B]
    tier.unpin(A)
    assert admitted(tier, D, 20) is None
    tier.unpin(A)
    assert admitted(tier, D, 20) == [A, C]


def test_the_caller_may_keep_more_than_pins_do() -> None:
    tier = Tier(20, LeastRecent())
    admitted(tier, A, 10)
    admitted(tier, B, 10)
    assert tier.room_for(10, stays=lambda each: each == A) == [B]
    assert tier.room_for(20, stays=lambda each: each == A) is None


def test_what_never_fits_evicts_nobody() -> None:
    tier = Tier(20, LeastRecent())
    admitted(tier, A, 10)
    assert admitted(tier, B, 21) is None
    assert A in tier


def test_random_use_keeps_budget_and_pins_in_every_order() -> None:
    for order in (LeastRecent(), LeastFrequent(), LeastWorth(LoadTimes())):
        numbers = np.random.default_rng(0)
        names = [Digest(str(i)) for i in range(200)]
        sizes = {name: int(numbers.integers(1, 40)) for name in names}
        tier, pins = Tier(2000, order), list[Digest]()
        for _ in range(3000):
            name = names[int(numbers.integers(len(names)))]
            tier.use(name)
            match int(numbers.integers(3)):
                case 0 if name not in tier:
                    before = set(tier.resident)
                    leaving = admitted(tier, name, sizes[name])
                    assert not set(leaving or ()) & set(pins)
                    assert set(tier.resident) == (
                        before if leaving is None else before - set(leaving) | {name}
                    )
                case 1:
                    tier.pin(name)
                    pins.append(name)
                case 2 if pins:
                    tier.unpin(pins.pop(int(numbers.integers(len(pins)))))
            assert tier.used_bytes <= tier.budget_bytes
            assert all(tier.is_pinned(each) for each in pins)
