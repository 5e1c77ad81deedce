"""To which worker of a base a sample goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from openmint.cluster.worker_client import WorkerClient
from openmint.errors import NotFound
from openmint.service.routing import MOST_MORE, by_residency, sticky
from openmint.service.workers import Workers
from openmint.types import Digest

REVISIONS = [Digest(f"sha256:{number}") for number in range(300)]
BASE = Digest("sha256:base")


@dataclass
class Info:
    digest: Digest = BASE
    name: str = "base"
    directory: str = "base"


@dataclass
class Worker:
    replica: int
    num_waiting: int = 0
    held: set[Digest] = field(default_factory=set)
    alive: bool = True
    base: Info = field(default_factory=Info)

    def has(self, revision: Digest) -> bool:
        return revision in self.held


def two() -> tuple[Worker, Worker, list[WorkerClient]]:
    first, second = Worker(0), Worker(1)
    return first, second, cast(list[WorkerClient], [first, second])


def test_a_sample_goes_where_its_revision_is_until_that_worker_is_much_busier() -> None:
    first, second, clients = two()
    second.held.add(REVISIONS[0])
    second.num_waiting = MOST_MORE
    assert by_residency(clients, REVISIONS[0]).replica == 1
    second.num_waiting += 1
    assert by_residency(clients, REVISIONS[0]).replica == 0
    first.held.add(REVISIONS[0])
    first.num_waiting = 1
    assert by_residency(clients, REVISIONS[0]).replica == 0


def test_what_nobody_has_goes_to_the_least_busy_and_spreads_when_none_is_busy() -> None:
    first, _, clients = two()
    first.num_waiting = 1
    assert {by_residency(clients, each).replica for each in REVISIONS} == {1}
    assert by_residency(clients, None).replica == 1
    first.num_waiting = 0
    placed = [by_residency(clients, each).replica for each in REVISIONS]
    assert 100 < sum(placed) < 200


def test_sticky_moves_only_what_was_on_the_worker_that_went() -> None:
    clients = cast(list[WorkerClient], [Worker(replica) for replica in range(4)])
    before = {each: sticky(clients, each).replica for each in REVISIONS}
    after = {each: sticky(clients[:3], each).replica for each in REVISIONS}
    assert all(after[each] == before[each] for each in REVISIONS if before[each] != 3)
    assert 40 < sum(where == 3 for where in before.values()) < 110


def test_the_dead_get_nothing_while_another_lives() -> None:
    first, second, _ = two()
    workers = Workers(1)
    for worker in (first, second):
        workers.add(cast(Any, worker))
    second.held.add(REVISIONS[0])
    assert workers.to_sample(BASE, REVISIONS[0]).replica == 1
    second.alive = False
    assert workers.to_sample(BASE, REVISIONS[0]).replica == 0
    first.alive = False
    assert workers.to_sample(BASE, REVISIONS[0]).replica == 1
    with pytest.raises(NotFound):
        workers.to_sample(Digest("sha256:other"), None)


def test_training_has_one_worker_per_base() -> None:
    first, second, _ = two()
    workers = Workers(1)
    for worker in (second, first):
        workers.add(cast(Any, worker))
    assert workers.by_digest(BASE).replica == workers.by_name("base").replica == 0
    assert [client.replica for client in workers.first()] == [0]
    assert [client.replica for client in workers.all()] == [0, 1]
