"""Lanes: order inside a run, company between runs, one update after another."""

from __future__ import annotations

import numpy as np

from openmint.scheduler.fairness import TenantClock
from openmint.scheduler.lanes import Entry, Lanes
from openmint.scheduler.work import OptimWork, SaveRun, TrainWork
from openmint.types import AdamParams, Datum, LossSpec, RunId, Tenant


class Book:
    """Lanes, with entries numbered as they come."""

    def __init__(self) -> None:
        self.lanes, self.clock = Lanes(), TenantClock()
        self._next_id = 0

    def train(
        self, run: str, lengths: tuple[int, ...], tenant: str = "t", forward_only: bool = False
    ) -> Entry:
        data = tuple(Datum(np.zeros(length, dtype=np.int64), {}) for length in lengths)
        work = TrainWork(RunId(run), Tenant(tenant), data, LossSpec("cross_entropy"), forward_only)
        return self._add(Entry(self._id(), work))

    def optim(self, run: str) -> Entry:
        return self._add(Entry(self._id(), OptimWork(RunId(run), Tenant("t"), AdamParams())))

    def save(self, run: str) -> Entry:
        return self._add(Entry(self._id(), SaveRun(RunId(run), Tenant("t"))))

    def plan(self, budget: int) -> list[tuple[int, int]]:
        """Work and datum of each planned item; works with nothing left are closed."""
        batch, used = self.lanes.plan(budget, self.clock)
        assert batch.num_tokens == sum(
            entry.tokens_of(item.datum_index)
            for item in batch.items
            for entry in used
            if entry.work_id == item.work_id
        )
        for entry in used:
            entry.is_open = True
            own = [item for item in batch.items if item.work_id == entry.work_id]
            assert own, "a work in the batch has data in it"
            entry.num_unfinished -= len(own)
            if not entry.num_unfinished:
                self.lanes.remove(entry)
        return [(item.work_id, item.datum_index) for item in batch.items]

    def _add(self, entry: Entry) -> Entry:
        self.lanes.add(entry)
        return entry

    def _id(self) -> int:
        self._next_id += 1
        return self._next_id


def test_a_control_command_waits_for_all_before_it_and_holds_all_behind_it() -> None:
    book = Book()
    first, optim, second = book.train("r", (4,)), book.optim("r"), book.train("r", (4,))
    assert book.lanes.next_control() is None
    assert book.lanes.trainable() == [first]
    book.plan(100)
    assert book.lanes.next_control() is optim
    assert book.lanes.trainable() == []
    optim.is_open = True
    assert book.lanes.next_control() is None
    assert book.lanes.trainable() == []
    book.lanes.remove(optim)
    assert book.lanes.trainable() == [second]


def test_leading_train_works_of_one_run_share_a_batch() -> None:
    book = Book()
    book.train("r", (4, 4))
    book.train("r", (4,))
    book.save("r")
    book.train("r", (4,))
    assert book.plan(100) == [(1, 0), (1, 1), (2, 0)]


def test_another_runs_command_waits_for_nobody() -> None:
    book = Book()
    book.train("a", (4,))
    save = book.save("b")
    assert book.lanes.next_control() is save


def test_a_begun_work_ends_before_another_begins() -> None:
    book = Book()
    long = book.train("a", (10,) * 6)
    assert book.plan(20) == [(1, 0), (1, 1)]
    book.train("b", (10,), "behind")
    book.clock.charge(Tenant("t"), 1000)
    assert book.plan(20) == [(1, 2), (1, 3)]
    assert book.plan(20) == [(1, 4), (1, 5)]
    assert not long.todo
    assert book.plan(20) == [(2, 0)]


def test_the_tenant_furthest_behind_begins_first() -> None:
    book = Book()
    book.train("a", (10,), "greedy")
    book.train("b", (10,), "modest")
    book.clock.charge(Tenant("greedy"), 1)
    assert book.plan(10) == [(2, 0)]
    assert book.plan(10) == [(1, 0)]


def test_small_works_share_a_micro_batch_each_of_them_whole() -> None:
    book = Book()
    book.train("a", (5, 3))
    book.train("b", (7, 4))
    book.train("c", (1,))
    # b doesn't fit beside a, and nobody overtakes it.
    assert book.plan(15) == [(1, 0), (1, 1)]
    assert book.plan(15) == [(2, 0), (2, 1), (3, 0)]


def test_a_work_of_several_micro_batches_is_cut_as_if_alone() -> None:
    lengths = (10,) * 9
    alone, shared = Book(), Book()
    alone.train("a", lengths)
    shared.train("a", lengths)
    shared.train("b", (2,))
    for _ in range(3):
        assert shared.plan(40) == alone.plan(40)
    assert shared.plan(40) == [(2, 0)]
    assert not list(alone.lanes)


def test_a_work_is_cut_evenly() -> None:
    book = Book()
    book.train("a", (10,) * 9)
    assert [len(book.plan(80)) for _ in range(2)] == [5, 4]


def test_a_datum_longer_than_the_budget_runs_by_itself() -> None:
    book = Book()
    book.train("a", (3, 500, 2))
    book.train("b", (1,))
    assert book.plan(100) == [(1, 1)]
    assert book.plan(100) == [(1, 0), (1, 2)]
    assert book.plan(100) == [(2, 0)]


def test_updates_of_one_tenant_end_one_after_another() -> None:
    book = Book()
    for run in "abc":
        book.train(run, (10, 10))
        book.optim(run)
    ends = []
    for num_plans in range(1, 7):
        book.plan(10)
        if (optim := book.lanes.next_control()) is not None:
            ends.append((num_plans, optim.command.run_id))
            book.lanes.remove(optim)
    assert ends == [(2, "a"), (4, "b"), (6, "c")]


def test_a_run_that_always_has_work_queued_lets_others_update_in_turn() -> None:
    book = Book()
    first, optim = book.train("busy", (10,)), book.optim("busy")
    second = book.train("busy", (10,))
    modest = book.train("modest", (10,))
    assert book.plan(10) == [(first.work_id, 0)]
    book.lanes.remove(optim)
    assert book.plan(10) == [(modest.work_id, 0)]
    assert book.plan(10) == [(second.work_id, 0)]


def test_passes_without_an_update_take_turns_too() -> None:
    book = Book()
    first, second = (book.train("busy", (10,), forward_only=True) for _ in range(2))
    modest = book.train("modest", (10,))
    plans = [book.plan(10) for _ in range(3)]
    assert plans == [[(entry.work_id, 0)] for entry in (first, modest, second)]


def test_works_of_one_update_follow_each_other() -> None:
    book = Book()
    book.train("a", (10,))
    book.train("b", (10,))
    book.train("a", (10,))
    assert [book.plan(10) for _ in range(3)] == [[(1, 0)], [(3, 0)], [(2, 0)]]


def test_random_works_are_run_once_each_datum_and_within_the_budget() -> None:
    numbers = np.random.default_rng(0)
    for _ in range(50):
        book, expected = Book(), set()
        for _ in range(int(numbers.integers(1, 8))):
            lengths = tuple(int(n) for n in numbers.integers(1, 40, numbers.integers(1, 6)))
            tenant, run = str(numbers.integers(3)), str(numbers.integers(4))
            entry = book.train(f"{tenant}:{run}", lengths, tenant)
            expected |= {(entry.work_id, i) for i in range(len(lengths))}
        sizes = {e.work_id: [len(d.tokens_N) for d in e.command.data] for e in book.lanes}  # type: ignore[union-attr]
        seen: list[tuple[int, int]] = []
        while book.lanes.trainable():
            planned = book.plan(30)
            assert len(planned) == 1 or sum(sizes[work][i] for work, i in planned) <= 30
            seen += planned
        assert len(seen) == len(set(seen))
        assert set(seen) == expected
        assert not list(book.lanes)


def test_a_work_started_over_runs_whole_and_without_company() -> None:
    book = Book()
    suspect, neighbour = book.train("a", (5, 3)), book.train("b", (5,))
    batch, used = book.lanes.plan(100, book.clock)
    assert used == [suspect, neighbour]
    assert suspect.had_company
    assert neighbour.had_company
    suspect.start_over_alone()
    neighbour.start_over_alone()
    assert len(batch.items) == 3
    assert book.plan(100) == [(1, 0), (1, 1)]
    assert not suspect.had_company
    book.train("c", (5,))
    assert book.plan(100) == [(2, 0)]
    assert book.plan(100) == [(3, 0)]
