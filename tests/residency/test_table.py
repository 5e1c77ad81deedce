"""The slot table: a budget kept, pins honoured, the least recently used out first."""

from __future__ import annotations

import numpy as np

from openmint.residency.table import SlotTable
from openmint.types import Digest

A, B, C, D = (Digest(name) for name in "abcd")


def admitted(table: SlotTable, revision: Digest, size: int) -> list[Digest] | None:
    """What left for it; None when there was no room."""
    leaving = table.room_for(size)
    if leaving is not None:
        for old in leaving:
            table.evict(old)
        table.admit(revision, size)
    table.check_integrity()
    return leaving


def test_the_least_recently_used_leaves_first_and_no_more_than_needed() -> None:
    table = SlotTable(30)
    for revision in (A, B, C):
        assert admitted(table, revision, 10) == []
    table.touch(A)
    assert admitted(table, D, 10) == [B]
    assert table.resident == (C, A, D)
    assert admitted(table, B, 15) == [C, A]
    assert (len(table), table.used_bytes) == (2, 25)


def test_pinned_revisions_stay_until_the_last_unpin() -> None:
    table = SlotTable(20)
    table.pin(A)
    table.pin(A)
    admitted(table, A, 10)
    admitted(table, B, 10)
    assert admitted(table, C, 20) is None
    assert admitted(table, C, 10) == [B]
    table.unpin(A)
    assert admitted(table, D, 20) is None
    table.unpin(A)
    assert admitted(table, D, 20) == [A, C]


def test_what_never_fits_evicts_nobody() -> None:
    table = SlotTable(20)
    admitted(table, A, 10)
    assert admitted(table, B, 21) is None
    assert A in table


def test_random_use_keeps_budget_and_pins() -> None:
    numbers = np.random.default_rng(0)
    names = [Digest(str(i)) for i in range(12)]
    sizes = {name: int(numbers.integers(1, 40)) for name in names}
    table, pins = SlotTable(100), list[Digest]()
    for _ in range(3000):
        name = names[int(numbers.integers(12))]
        match int(numbers.integers(4)):
            case 0:
                table.pin(name)
                pins.append(name)
            case 1 if pins:
                table.unpin(pins.pop(int(numbers.integers(len(pins)))))
            case _ if name in table:
                table.touch(name)
            case _:
                held = {pin for pin in pins if pin in table}
                admitted(table, name, sizes[name])
                assert held <= set(table.resident)
        table.check_integrity()
        assert table.used_bytes <= 100
