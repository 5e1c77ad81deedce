"""The queue of cold loads: one load a revision, in turn, bounded, refused when it would be late."""

from __future__ import annotations

import pytest

from openmint.errors import Overloaded
from openmint.residency.load_times import LoadTimes
from openmint.residency.loads import LoadQueue
from openmint.types import Digest, Priority

A, B, C, D = (Digest(name) for name in "abcd")
LATE = 1e9


def started(queue: LoadQueue) -> list[Digest]:
    """All loads, one after another."""
    order = []
    while (revision := queue.start()) is not None:
        order.append(revision)
        queue.end(revision)
    return order


def test_one_load_for_all_who_want_it() -> None:
    queue = LoadQueue(2, 10, LoadTimes())
    for _ in range(3):
        queue.want(A, Priority.BATCH, 0.0, LATE)
    assert queue.start() == A
    queue.want(A, Priority.BATCH, 0.0, LATE)
    assert queue.start() is None
    queue.end(A)
    assert A not in queue


def test_priorities_then_deadlines_then_first_come() -> None:
    queue = LoadQueue(1, 10, LoadTimes())
    queue.want(A, Priority.PREFETCH, 0.0, 10.0)
    queue.want(B, Priority.INTERACTIVE, 0.0, 30.0)
    queue.want(C, Priority.INTERACTIVE, 0.0, 20.0)
    queue.want(D, Priority.INTERACTIVE, 0.0, 20.0)
    assert started(queue) == [C, D, B, A]


def test_who_wants_it_sooner_moves_it_forward() -> None:
    queue = LoadQueue(1, 10, LoadTimes())
    queue.want(A, Priority.INTERACTIVE, 0.0, 30.0)
    queue.want(B, Priority.PREFETCH, 0.0, 20.0)
    queue.want(B, Priority.INTERACTIVE, 0.0, 25.0)
    assert started(queue) == [B, A]


def test_no_more_run_at_once_than_are_allowed() -> None:
    queue = LoadQueue(2, 10, LoadTimes())
    for revision in (A, B, C):
        queue.want(revision, Priority.BATCH, 0.0, LATE)
    assert [queue.start(), queue.start(), queue.start()] == [A, B, None]
    queue.end(B)
    assert queue.start() == C


def test_what_would_be_late_is_refused_at_once_with_the_time_to_wait() -> None:
    times = LoadTimes()
    times.learn(1, 4.0)
    queue = LoadQueue(2, 10, times)
    for revision in (A, B, C):
        queue.want(revision, Priority.BATCH, 100.0, 200.0)
    # Three before it, two at a time: 6 s, then its own 4 s.
    with pytest.raises(Overloaded, match=r"likely to take 10\.0 s.*3\.0 s more") as refused:
        queue.want(D, Priority.PREFETCH, 100.0, 107.0)
    assert refused.value.retry_after_seconds == 3.0
    assert D not in queue
    queue.want(D, Priority.INTERACTIVE, 100.0, 107.0)
    assert queue.start() == D


def test_a_full_queue_refuses_new_ones_and_takes_those_it_has() -> None:
    queue = LoadQueue(1, 2, LoadTimes())
    queue.want(A, Priority.BATCH, 0.0, LATE)
    queue.want(B, Priority.BATCH, 0.0, LATE)
    with pytest.raises(Overloaded, match=r"2 adapters wait.*worker\.waiting_loads"):
        queue.want(C, Priority.INTERACTIVE, 0.0, LATE)
    queue.want(B, Priority.INTERACTIVE, 0.0, LATE)
    assert started(queue) == [B, A]


def test_what_nobody_wants_any_more_is_not_loaded() -> None:
    queue = LoadQueue(1, 10, LoadTimes())
    queue.want(A, Priority.BATCH, 0.0, LATE)
    queue.want(B, Priority.BATCH, 0.0, LATE)
    queue.give_up(A)
    queue.give_up(D)
    assert started(queue) == [B]


def test_a_guess_takes_no_place_of_those_who_wait_and_makes_nobody_late() -> None:
    times = LoadTimes()
    times.learn(1, 1.0)
    queue = LoadQueue(1, 10, times)
    queue.start_prefetch(A)
    assert (A in queue, queue.is_idle, queue.num_running) == (True, False, 1)
    queue.want(B, Priority.INTERACTIVE, 0.0, 1.5)
    assert queue.start() == B
    queue.want(A, Priority.INTERACTIVE, 0.0, LATE)  # it is on its way already
    assert (queue.num_waiting, queue.start()) == (0, None)
    queue.end(A)
    queue.end(B)
    assert queue.is_idle
