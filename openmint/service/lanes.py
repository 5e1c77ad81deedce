"""One lane per training run: its requests reach the worker in the order of their seq_id.

Only the sending is ordered. Results are awaited by a task each, so that `optim_step` is already
with the worker while the `forward_backward` before it still runs.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from openmint.errors import Gone
from openmint.service.futures import ResultFuture

Start = Callable[[], Awaitable[object]]
SESSION_ENDED = "the session ended before this request was sent to the worker"


@dataclass(order=True, slots=True)
class Job:
    """A request that waits for its turn; ordered by seq_id, then by arrival."""

    seq: int
    arrival: int
    overdue_at_seconds: float = field(compare=False)
    future: ResultFuture = field(compare=False)
    start: Start = field(compare=False)
    barrier: bool = field(compare=False)


class Lane:
    """Holds requests that arrived before an earlier seq_id, for a bounded time.

    A seq_id whose request was refused counts as used. One that never arrives delays the next by at
    most `gap_seconds`.
    """

    def __init__(self, name: str, first_seq: int, gap_seconds: float) -> None:
        self._gap_seconds = gap_seconds
        self._next_seq = first_seq
        self._refused: set[int] = set()
        self._is_closed = False
        self._held: list[Job] = []
        self._arrivals = itertools.count()
        self._changed = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._send_in_order(), name=f"lane:{name}")

    def submit(
        self, seq: int | None, future: ResultFuture, start: Start, *, barrier: bool = False
    ) -> None:
        """Queue `start`, whose first step sends the command. Without a seq_id it goes at once.

        With `barrier`, all before has finished when it starts, and it has finished before the next
        starts.
        """
        if self._is_closed:
            future.fail(Gone(SESSION_ENDED))
            return
        order = -1 if seq is None else seq
        overdue = time.monotonic() + self._gap_seconds
        job = Job(order, next(self._arrivals), overdue, future, start, barrier)
        heapq.heappush(self._held, job)
        self._changed.set()

    def refuse(self, seq: int | None) -> None:
        """Count a refused request's seq_id as used."""
        if seq is not None and seq >= self._next_seq:
            self._refused.add(seq)
            self._changed.set()

    async def close(self) -> None:
        """Stop sending, and fail what was not sent. What was sent runs to its end."""
        self._is_closed = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for job in self._held:
            job.future.fail(Gone(SESSION_ENDED))
        self._held.clear()

    async def _send_in_order(self) -> None:
        while True:
            job = await self._due()
            if job.barrier and self._running:
                await asyncio.wait(self._running)
                continue
            heapq.heappop(self._held)
            self._next_seq = max(self._next_seq, job.seq + 1)
            task = asyncio.create_task(job.future.settle(job.start()))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            if job.barrier:
                await asyncio.wait({task})

    async def _due(self) -> Job:
        """The first job, once its turn has come or it has waited long enough."""
        while True:
            while self._next_seq in self._refused:
                self._refused.discard(self._next_seq)
                self._next_seq += 1
            wait_seconds = None
            if self._held:
                wait_seconds = self._held[0].overdue_at_seconds - time.monotonic()
                if self._held[0].seq <= self._next_seq or wait_seconds <= 0:
                    return self._held[0]
            self._changed.clear()
            try:
                async with asyncio.timeout(wait_seconds):
                    await self._changed.wait()
            except TimeoutError:
                continue
