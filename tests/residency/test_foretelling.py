"""What is likely to be asked for next, of what isn't in memory."""

from __future__ import annotations

import pytest

from openmint.residency.eviction import HALF_LIVES, LeastWorth
from openmint.residency.foretelling import NUM_LOOKED_AT, Foretelling
from openmint.residency.load_times import LoadTimes
from openmint.types import Digest

A, B, C, D = (Digest(name) for name in "abcd")
ROOMY = 1 << 40


def used(*revisions: Digest) -> LeastWorth:
    order = LeastWorth(LoadTimes())
    for revision in revisions:
        order.use(revision)
    return order


def taken(book: Foretelling, free_bytes: int = ROOMY) -> list[Digest]:
    found = []
    while (revision := book.take(free_bytes)) is not None:
        found.append(revision)
    return found


def test_the_greatest_worth_by_the_byte_first() -> None:
    book = Foretelling(used(*[A, B, B, C, C, C, C] * 20))
    for revision in (A, B, C):
        book.note(revision, 10)
    assert taken(book) == [C, B, A]
    for revision, num_bytes in ((A, 1), (B, 10), (C, 1000)):
        book.note(revision, num_bytes)
    assert taken(book) == [A, B, C]


def test_what_was_used_since_it_was_noted_counts() -> None:
    order = used(*[A, A, B] * 20)
    book = Foretelling(order)
    for revision in (A, B):
        book.note(revision, 10)
    for _ in range(200):
        order.use(B)
    assert taken(book) == [B, A]


def test_the_best_that_fits_and_the_others_when_there_is_room() -> None:
    book = Foretelling(used(*[A, B, B] * 20))
    book.note(A, 10)
    book.note(B, 15)
    assert (taken(book, 9), taken(book, 10), taken(book, 14)) == ([], [A], [])
    book.note(C, 5)  # was never used
    assert (taken(book, 14), taken(book, 15), len(book)) == ([], [B], 0)
    book.note(A, 15)
    assert taken(book, 14) == []
    book.note(A, 14)  # something smaller is looked at again
    assert taken(book, 14) == [A]


def test_only_what_has_a_chance_within_the_longest_half_life() -> None:
    order = used(A, B, B)
    book = Foretelling(order)
    for revision in (A, B, C):
        book.note(revision, 10)
    for _ in range(2 * HALF_LIVES[-1]):
        order.use(D)
    assert taken(book) == []
    assert len(book) == 0


def test_what_is_dropped_is_not_foretold_again_until_it_is_noted() -> None:
    book = Foretelling(used(A, B))
    book.note(A, 10)
    book.drop(A)
    assert taken(book) == []
    book.note(A, 10)
    assert (taken(book), book.taken) == ([A], A)
    book.drop(A)
    assert book.taken is None


def test_a_look_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [Digest(f"{i}") for i in range(4 * NUM_LOOKED_AT)]
    order = used(*names)
    book, weighed = Foretelling(order), 0
    for name in names:
        book.note(name, 10)
    weigh = order.worth

    def counting(revision: Digest, num_bytes: int) -> float:
        nonlocal weighed
        weighed += 1
        return weigh(revision, num_bytes)

    monkeypatch.setattr(order, "worth", counting)
    assert book.take(9) is None
    assert weighed <= NUM_LOOKED_AT
    assert book.take(9) is None  # nothing has changed, so nothing is looked at
    assert weighed <= NUM_LOOKED_AT


def test_nothing_is_foretold_when_it_is_closed() -> None:
    book = Foretelling(used(A))
    book.note(A, 10)
    book.close()
    assert taken(book) == []
