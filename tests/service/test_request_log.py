"""Group commit: many requests, few transactions, and nobody hears of one before it is written."""

import asyncio
import threading

import pytest

from openmint.catalog.records import Finished, RequestRecord
from openmint.errors import StoreFailed
from openmint.service import request_log
from openmint.service.request_log import RequestLog
from openmint.types import RunId, SessionId, Tenant

RUN = RunId("s:train:0")


def record(seq):
    return RequestRecord(
        RUN, seq, SessionId("s"), Tenant("t"), f"r{seq}", "kind", b"", "accepted", b"", None, None
    )


def outcome(seq):
    return Finished(RUN, seq, "done", b"", keeps_body=True)


class Disk:
    """Takes transactions one after the other, when it is let."""

    def __init__(self):
        self.groups = []
        self.may_write = threading.Event()
        self.failures = []

    def write_requests(self, accepted, finished):
        self.may_write.wait(10)
        if self.failures:
            raise self.failures.pop()
        self.groups.append(([row.seq for row in accepted], [row.seq for row in finished]))


def run(story):
    disk = Disk()
    asyncio.run(asyncio.wait_for(story(disk, RequestLog(disk)), 20))
    return disk


def test_what_comes_during_a_transaction_shares_the_next():
    async def story(disk, log):
        first = asyncio.create_task(log.accept(record(1)))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(log.accept(record(seq))) for seq in range(2, 9)]
        others.append(asyncio.create_task(log.finish(outcome(1))))
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in (first, *others))
        disk.may_write.set()
        await asyncio.gather(first, *others)

    assert run(story).groups == [([1], []), (list(range(2, 9)), [1])]


def test_a_request_that_can_not_be_written_is_refused_and_the_next_is_not():
    async def story(disk, log):
        disk.may_write.set()
        disk.failures.append(StoreFailed("full"))
        with pytest.raises(StoreFailed):
            await log.accept(record(1))
        await log.accept(record(2))

    assert run(story).groups == [([2], [])]


def test_an_outcome_waits_until_it_can_be_written(monkeypatch):
    monkeypatch.setattr(request_log, "RETRY_SECONDS", 0.01)

    async def story(disk, log):
        disk.may_write.set()
        disk.failures += [StoreFailed("full"), StoreFailed("full")]
        await log.finish(outcome(1))

    assert run(story).groups == [([], [1])]


def test_who_leaves_early_takes_nobody_along():
    async def story(disk, log):
        leaver = asyncio.create_task(log.accept(record(1)))
        other = asyncio.create_task(log.accept(record(2)))
        await asyncio.sleep(0.05)
        leaver.cancel()
        disk.may_write.set()
        await other

    assert run(story).groups == [([1, 2], [])]
