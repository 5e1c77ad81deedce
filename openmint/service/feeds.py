"""Which samples of a sampling session have finished: an ordered feed for clients that poll it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

MAX_EVENTS = 20_000
"""Events kept for a client that does not poll; older ones are dropped."""


@dataclass(frozen=True, slots=True)
class Completion:
    cursor: int
    request_id: str
    failed: bool


class Feed:
    """The completions of one (possibly cloned) sampling client, oldest first."""

    def __init__(self) -> None:
        self._events: deque[Completion] = deque(maxlen=MAX_EVENTS)
        self._last_cursor = 0
        self._appended = asyncio.Event()

    def append(self, request_id: str, *, failed: bool) -> None:
        self._last_cursor += 1
        self._events.append(Completion(self._last_cursor, request_id, failed))
        self._appended.set()
        self._appended = asyncio.Event()

    async def after(self, cursor: int, timeout_seconds: float) -> list[Completion]:
        """Events newer than `cursor`, as soon as there is one; older ones are forgotten."""
        while self._events and self._events[0].cursor <= cursor:
            self._events.popleft()
        if not self._events and timeout_seconds > 0:
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._appended.wait()
            except TimeoutError:
                return []
        return [event for event in self._events if event.cursor > cursor]
