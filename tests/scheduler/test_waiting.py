"""Lines of those who wait."""

from __future__ import annotations

import numpy as np

from openmint.scheduler.sequences import Sequence
from openmint.scheduler.waiting import Waiting
from openmint.scheduler.work import SampleWork
from openmint.types import SamplingParams, Tenant


def waiting_of(sequence_id: int, tenant: str) -> Sequence:
    work = SampleWork(Tenant(tenant), None, np.array([1]), SamplingParams(1))
    return Sequence(sequence_id, sequence_id, 0, work, [1], 1)


def test_a_line_keeps_its_order_and_goes_with_its_last() -> None:
    line = Waiting()
    first, second, other = waiting_of(1, "a"), waiting_of(2, "a"), waiting_of(3, "b")
    for sequence in (first, other, second):
        line.add(sequence)
    back = waiting_of(4, "a")
    line.add_first(back)
    assert line.of(Tenant("a")) == [back, first, second]
    assert len(line) == len(list(line)) == 4
    line.remove(other)
    assert line.tenants == {"a"}
    assert line.of(Tenant("b")) == []


def test_a_line_may_change_while_its_copy_is_looked_through() -> None:
    line = Waiting()
    for number in range(3):
        line.add(waiting_of(number, "a"))
    for sequence in line.of(Tenant("a")):
        line.remove(sequence)
    assert not len(line)
