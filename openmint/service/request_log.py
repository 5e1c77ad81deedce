"""Writes requests and their outcomes to the catalogue, many in one transaction.

What comes while a transaction is on its way to the disk shares the next one. Lives on the event
loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import structlog

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Finished, RequestRecord
from openmint.errors import ServiceError

log = structlog.get_logger(__name__)

RETRY_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class Group:
    """What one transaction writes; `written` hears how it went."""

    written: asyncio.Future[None]
    accepted: list[RequestRecord] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)


class RequestLog:
    """Returns once what it was given would survive a power cut."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._next: Group | None = None
        self._writer: asyncio.Task[None] | None = None

    async def accept(self, record: RequestRecord) -> None:
        """Raises StoreFailed or Overloaded when the catalogue can't be written to."""
        group = self._group()
        group.accepted.append(record)
        await asyncio.shield(group.written)

    async def finish(self, outcome: Finished) -> None:
        """Write an outcome, as soon as the catalogue can be written to.

        It came about already, so nobody can be told that it didn't, nor that it is durable before
        it is: who waits for it waits for the disk.
        """
        while True:
            group = self._group()
            group.finished.append(outcome)
            try:
                await asyncio.shield(group.written)
                return
            except ServiceError as error:
                log.error("outcome_not_written", run=outcome.run_id, error=error.message)
                await asyncio.sleep(RETRY_SECONDS)

    def _group(self) -> Group:
        if self._next is None:
            self._next = Group(asyncio.get_running_loop().create_future())
            # Those who left before the end hear nothing; that isn't an error of the future.
            self._next.written.add_done_callback(asyncio.Future.exception)
            if self._writer is None or self._writer.done():
                self._writer = asyncio.create_task(self._write_all(), name="request-log")
        return self._next

    async def _write_all(self) -> None:
        while (group := self._next) is not None:
            self._next = None
            try:
                await asyncio.to_thread(
                    self._catalog.write_requests, group.accepted, group.finished
                )
            except Exception as error:  # a task's edge: everyone in the group must hear
                group.written.set_exception(error)
            else:
                group.written.set_result(None)
