"""The gateway's end of a link whose worker ends and comes back; the worker's end is played here."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

import numpy as np
import pytest

from openmint.cluster import worker_client
from openmint.cluster.link import frame, read_frame
from openmint.cluster.worker_client import MOST_RUNS, WorkerClient
from openmint.errors import EngineFailed
from openmint.scheduler.work import (
    Delta,
    Done,
    Hold,
    OptimWork,
    Ready,
    SampleDelta,
    SampleResult,
    SampleWork,
    Submit,
)
from openmint.types import AdamParams, Digest, RunId, SamplingParams, Tenant
from tests.catalog.made import BASE, base_named

T = Tenant("t")
WORK = SampleWork(T, None, np.arange(3), SamplingParams(4), stream=True)
RESULT = SampleResult((), None, BASE.digest)


class PlayedWorker:
    """The worker's end of a client's link."""

    met: ClassVar[list[PlayedWorker]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def behind(cls, client: WorkerClient, base: Any = BASE) -> PlayedWorker:
        ours, theirs = socket.socketpair()
        client.connect(*await asyncio.open_connection(sock=ours), Ready(base, 1, {}))
        worker = cls(*await asyncio.open_connection(sock=theirs))
        cls.met.append(worker)
        return worker

    async def held(self) -> tuple[Digest, ...]:
        message = await read_frame(self._reader)
        assert isinstance(message, Hold)
        return message.revisions

    async def work_id(self) -> int:
        message = await read_frame(self._reader)
        assert isinstance(message, Submit)
        return message.work_id

    def draws(self, work_id: int, *tokens: int) -> None:
        for token in tokens:
            self._writer.write(frame(Delta(work_id, SampleDelta(0, (token,), (0.0,)))))

    def finishes(self, work_id: int) -> None:
        self._writer.write(frame(Done(work_id, RESULT)))

    async def dies(self, client: WorkerClient) -> None:
        self._writer.close()
        await self._writer.wait_closed()
        assert client._pump is not None
        await client._pump


def played(story: Callable[[WorkerClient], Coroutine[Any, Any, None]]) -> None:
    """Run a story with a client, and leave nothing open behind it."""

    async def whole() -> None:
        client = WorkerClient()
        try:
            await asyncio.wait_for(story(client), 20.0)
        finally:
            for worker in PlayedWorker.met:
                worker._writer.close()
            PlayedWorker.met.clear()
            await client.drain()

    asyncio.run(whole())


async def read_all(client: WorkerClient, found: list[Any]) -> None:
    async for piece in client.stream(WORK):
        found.append(piece.tokens[0] if isinstance(piece, SampleDelta) else piece)


async def read_with_a_death(
    client: WorkerClient, found: list[Any]
) -> tuple[asyncio.Task[None], PlayedWorker]:
    """A stream whose worker died after tokens 5 and 6, and the successor."""
    worker = await PlayedWorker.behind(client)
    reading = asyncio.create_task(read_all(client, found))
    worker.draws(await worker.work_id(), 5, 6)
    await until(found, 2)
    await worker.dies(client)
    return reading, await PlayedWorker.behind(client)


async def until(found: list[Any], count: int) -> None:
    while len(found) < count:  # noqa: ASYNC110 - filled by another task of this loop
        await asyncio.sleep(0.001)


def test_a_stream_goes_on_where_it_was() -> None:
    async def story(client: WorkerClient) -> None:
        found = list[Any]()
        reading, worker = await read_with_a_death(client, found)
        work_id = await worker.work_id()
        worker.draws(work_id, 5, 6, 7, 8)
        worker.finishes(work_id)
        await reading
        assert found == [5, 6, 7, 8, RESULT]

    played(story)


def test_a_stream_that_would_go_on_differently_ends_with_an_error() -> None:
    async def story(client: WorkerClient) -> None:
        found = list[Any]()
        reading, worker = await read_with_a_death(client, found)
        worker.draws(await worker.work_id(), 5, 9)
        with pytest.raises(EngineFailed, match="went on differently"):
            await reading
        assert found == [5, 6]

    played(story)


def test_a_sample_that_several_workers_died_of_fails_and_a_new_one_does_not() -> None:
    async def story(client: WorkerClient) -> None:
        worker = await PlayedWorker.behind(client)
        sample = asyncio.create_task(client.call(WORK))
        for run in range(MOST_RUNS):
            await worker.work_id()
            assert not sample.done()
            await worker.dies(client)
            late = asyncio.create_task(client.call(WORK)) if run == MOST_RUNS - 1 else None
            if run < MOST_RUNS - 1:
                worker = await PlayedWorker.behind(client)
        with pytest.raises(EngineFailed, match=f"died {MOST_RUNS} times"):
            await sample
        worker = await PlayedWorker.behind(client)
        worker.finishes(await worker.work_id())
        assert late is not None
        assert await late == RESULT

    played(story)


def test_samples_do_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_client, "RETURN_SECONDS", 0.05)

    async def story(client: WorkerClient) -> None:
        worker = await PlayedWorker.behind(client)
        sample = asyncio.create_task(client.call(WORK))
        await worker.work_id()
        await worker.dies(client)
        with pytest.raises(EngineFailed, match="stopped while this was running"):
            await sample
        with pytest.raises(EngineFailed, match="is not running"):
            await client.call(WORK)
        worker = await PlayedWorker.behind(client)
        sample = asyncio.create_task(client.call(WORK))
        worker.finishes(await worker.work_id())
        assert await sample == RESULT

    played(story)


def test_a_worker_with_other_weights_gets_no_earlier_sample() -> None:
    async def story(client: WorkerClient) -> None:
        worker = await PlayedWorker.behind(client)
        sample = asyncio.create_task(client.call(WORK))
        await worker.work_id()
        await worker.dies(client)
        await PlayedWorker.behind(client, base_named("other"))
        with pytest.raises(EngineFailed, match="other weights"):
            await sample

    played(story)


def test_commands_of_a_run_end_with_their_worker() -> None:
    async def story(client: WorkerClient) -> None:
        worker = await PlayedWorker.behind(client)
        update = asyncio.create_task(client.call(OptimWork(RunId("r"), T, AdamParams())))
        await worker.work_id()
        await worker.dies(client)
        with pytest.raises(EngineFailed, match="stopped while this was running"):
            await update
        with pytest.raises(EngineFailed, match="is not running"):
            await client.call(OptimWork(RunId("r"), T, AdamParams()))

    played(story)


HELD = (Digest("sha256:1"), Digest("sha256:2"))


def test_each_worker_is_told_what_to_hold_after_the_samples_that_wait() -> None:
    async def story(client: WorkerClient) -> None:
        worker = await PlayedWorker.behind(client)
        client.hold(HELD)
        assert await worker.held() == HELD
        sample = asyncio.create_task(client.call(WORK))
        await worker.work_id()
        await worker.dies(client)
        client.hold(HELD[:1])
        worker = await PlayedWorker.behind(client)
        worker.finishes(await worker.work_id())
        assert await worker.held() == HELD[:1]
        await sample

    played(story)


def test_what_has_not_changed_is_said_again_only_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(client: WorkerClient) -> None:
        worker = await PlayedWorker.behind(client)
        for revisions in ((), HELD, HELD, HELD[:1], ()):
            client.hold(revisions)
        assert [await worker.held() for _ in range(3)] == [HELD, HELD[:1], ()]
        monkeypatch.setattr(worker_client, "HOLD_AGAIN_SECONDS", 0.0)
        client.hold(HELD)
        client.hold(HELD)
        assert [await worker.held() for _ in range(2)] == [HELD, HELD]

    played(story)


def test_a_worker_with_another_base_is_not_told_to_hold_what_the_last_one_did() -> None:
    async def story(client: WorkerClient) -> None:
        worker = await PlayedWorker.behind(client)
        client.hold(HELD)
        await worker.held()
        await worker.dies(client)
        worker = await PlayedWorker.behind(client, base_named("other"))
        assert client.held == ()
        client.hold(HELD[1:])
        assert await worker.held() == HELD[1:]

    played(story)
