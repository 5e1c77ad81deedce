"""The gateway's end of the link to one worker process. Lives on the gateway's event loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from openmint.cluster.link import frame, read_frame
from openmint.errors import EngineFailed
from openmint.scheduler.work import (
    Cancel,
    Command,
    Delta,
    Done,
    Drain,
    Failed,
    Ready,
    Result,
    SampleDelta,
    SampleResult,
    SampleWork,
    Submit,
    ToGateway,
    ToWorker,
    WorkerStats,
)
from openmint.types import BaseInfo


class Observer(Protocol):
    """Hears how long each command took; `cli/serve.py` joins the metrics to it."""

    def observe_command(self, base: str, kind: str, seconds: float, ok: bool) -> None: ...
    def observe_first_token(self, base: str, seconds: float) -> None: ...


class WorkerClient:
    """Sends commands to one worker and hands each result to whoever waits for it.

    Frames are `<u64 length><pickle>` on a socket pair that only these two processes hold, so no
    foreign byte is ever unpickled.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, base: BaseInfo
    ) -> None:
        self.base = base
        self.stats = WorkerStats()
        self.alive = True
        self.observer: Observer | None = None
        self._reader, self._writer = reader, writer
        self._work_ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Result]] = {}
        self._listeners: dict[int, Callable[[SampleDelta], None]] = {}
        self._pump = asyncio.create_task(self._receive(), name=f"worker-link:{base.name}")

    async def call(self, command: Command) -> Result:
        """The command's result. Raises what the worker raised, or EngineFailed if it died.

        Cancelling the awaiting task cancels a sample in the engine and frees its pages; commands of
        a training run are never cancelled, because they were accepted.
        """
        return await self._submit(command, None)

    async def stream(self, work: SampleWork) -> AsyncIterator[SampleDelta | SampleResult]:
        """Deltas as tokens appear, then the SampleResult. Closing the iterator cancels the work."""
        queue: asyncio.Queue[SampleDelta] = asyncio.Queue()
        started_at, is_first = time.monotonic(), True
        task = asyncio.create_task(self._submit(work, queue.put_nowait))
        getter: asyncio.Task[SampleDelta] = asyncio.create_task(queue.get())
        try:
            while True:
                await asyncio.wait({task, getter}, return_when=asyncio.FIRST_COMPLETED)
                if getter.done():
                    if is_first and self.observer:
                        elapsed = time.monotonic() - started_at
                        self.observer.observe_first_token(self.base.name, elapsed)
                    is_first = False
                    yield getter.result()
                    getter = asyncio.create_task(queue.get())
                elif task.done():
                    break
            result = task.result()
            assert isinstance(result, SampleResult)
            yield result
        finally:
            getter.cancel()
            task.cancel()

    async def drain(self) -> None:
        """Ask the worker to finish its queue and exit; returns when the link is closed."""
        self._send(Drain())
        await asyncio.wait({self._pump})

    async def _submit(
        self, command: Command, listener: Callable[[SampleDelta], None] | None
    ) -> Result:
        if not self.alive:
            raise EngineFailed(f"the worker of base {self.base.name!r} is not running; retry later")
        work_id = next(self._work_ids)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting[work_id] = future
        if listener:
            self._listeners[work_id] = listener
        started_at, ok = time.monotonic(), False
        try:
            self._send(Submit(work_id, command))
            result = await future
            ok = True
            return result
        except asyncio.CancelledError:
            # Cancelling the awaiting task cancelled the future too, unless it was answered.
            if isinstance(command, SampleWork) and future.cancelled() and self.alive:
                self._send(Cancel(work_id))
            raise
        finally:
            self._waiting.pop(work_id, None)
            self._listeners.pop(work_id, None)
            if self.observer:
                kind, elapsed = type(command).__name__, time.monotonic() - started_at
                self.observer.observe_command(self.base.name, kind, elapsed, ok)

    def _send(self, message: ToWorker) -> None:
        self._writer.write(frame(message))

    async def _receive(self) -> None:
        try:
            while True:
                self._deliver(await read_frame(self._reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the worker has gone
        finally:
            self.alive = False
            self._writer.close()
            for future in self._waiting.values():
                if not future.done():
                    error = f"the worker of base {self.base.name!r} stopped while this was running"
                    future.set_exception(EngineFailed(error))

    def _deliver(self, message: ToGateway) -> None:
        match message:
            case Done(work_id, result):
                if (future := self._waiting.get(work_id)) and not future.done():
                    future.set_result(result)
            case Failed(work_id, error):
                if (future := self._waiting.get(work_id)) and not future.done():
                    future.set_exception(error)
            case Delta(work_id, delta):
                if listener := self._listeners.get(work_id):
                    listener(delta)
            case WorkerStats():
                self.stats = message
            case Ready(base):
                self.base = base
