"""One lane per training run: its requests reach the worker in the order of their seq_id.

Only the sending is ordered. Each request's job is a task of its own, so that `optim_step` is
already with the worker while the `forward_backward` before it still runs.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

Job = Callable[[], Coroutine[Any, Any, None]]
"""Its first step sends the request's command. Never raises."""


@dataclass(order=True, slots=True)
class Held:
    """A request that waits for its turn."""

    seq: int
    overdue_at_seconds: float = field(compare=False)
    job: Job = field(compare=False)
    barrier: bool = field(compare=False)


class Lane:
    """Holds requests that arrived before an earlier seq_id, for a bounded time.

    A seq_id whose request was refused counts as used. One that never arrives delays the next by at
    most `gap_seconds`, and is too late from then on.
    """

    def __init__(
        self, name: str, next_seq: int, gap_seconds: float, refused: Iterable[int] = ()
    ) -> None:
        self._name, self._gap_seconds = name, gap_seconds
        self.next_seq = next_seq
        """All before it were sent, or are too late."""
        self._refused = set(refused)
        self._held: list[Held] = []
        self._changed = asyncio.Event()
        self._starting: list[int] = []
        """The request whose job exists and has not taken its first step."""
        self._running: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self.is_stopped = False
        """Nothing more is sent."""

    @property
    def sent_seq(self) -> int:
        """Everything up to it was sent, and nothing after it."""
        unsent = [self.next_seq, *self._starting]
        if self._held:
            unsent.append(self._held[0].seq)
        return min(unsent) - 1

    def submit(self, seq: int, job: Job, *, barrier: bool = False) -> None:
        """Queue a job. Nothing comes of it once the lane was stopped.

        With `barrier`, all before has finished when it starts, and it has finished before the next
        starts.
        """
        overdue = time.monotonic() + self._gap_seconds
        heapq.heappush(self._held, Held(seq, overdue, job, barrier))
        self._changed.set()
        if self._task is None and not self.is_stopped:
            self._task = asyncio.create_task(self._send_in_order(), name=f"lane:{self._name}")

    def refuse(self, seq: int | None) -> None:
        """Count a refused request's seq_id as used."""
        if seq is not None and seq >= self.next_seq:
            self._refused.add(seq)
            self._changed.set()

    def stop(self) -> None:
        """Send nothing more."""
        self.is_stopped = True
        if self._task is not None:
            self._task.cancel()

    async def wait_running(self) -> None:
        """Until the jobs that were started have ended."""
        if self._running:
            await asyncio.wait(self._running)

    def successor(self, next_seq: int) -> Lane:
        """A lane for the same run that has sent nothing yet."""
        return Lane(self._name, next_seq, self._gap_seconds, self._refused)

    async def _send_in_order(self) -> None:
        while True:
            held = await self._due()
            if held.barrier and self._running:
                await asyncio.wait(self._running)
                continue
            heapq.heappop(self._held)
            self._starting = [held.seq]
            task = asyncio.create_task(held.job())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            # The loop runs what is ready in order: the job's first step, then at once this.
            await asyncio.sleep(0)
            self._starting = []
            self.next_seq = max(self.next_seq, held.seq + 1)
            if held.barrier:
                await asyncio.wait({task})

    async def _due(self) -> Held:
        """The first request, once its turn has come or it has waited long enough."""
        while True:
            while self.next_seq in self._refused:
                self._refused.discard(self.next_seq)
                self.next_seq += 1
            wait_seconds = None
            if self._held:
                wait_seconds = self._held[0].overdue_at_seconds - time.monotonic()
                if self._held[0].seq <= self.next_seq or wait_seconds <= 0:
                    return self._held[0]
            self._changed.clear()
            try:
                async with asyncio.timeout(wait_seconds):
                    await self._changed.wait()
            except TimeoutError:
                continue
