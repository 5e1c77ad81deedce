"""Starts the evaluations that schedules ask for. Lives on the event loop.

What is due is read from the catalogue, so a revision that was saved while the service was away, or
while too much ran, is evaluated later; one that was followed by another meanwhile is not.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from openmint.catalog.catalog import Catalog
from openmint.errors import OpenMintError, Overloaded
from openmint.service.evaluations import EvaluationRequest, Evaluations
from openmint.types import Tenant

log = structlog.get_logger(__name__)

SEED = 0


@dataclass(frozen=True, slots=True)
class Schedules:
    catalog: Catalog
    evaluations: Evaluations

    async def start_due(self) -> None:
        """Start what is due; what finds no room stays due, and a tenant's first of those is brought
        into memory meanwhile. One that can't be, for its task or its revision is gone, waits for
        its next time."""
        at, queued = datetime.now(UTC), set[Tenant]()
        for due in await asyncio.to_thread(self.catalog.due_evaluations, at):
            schedule, model = due.schedule, f"{due.tenant}/{due.policy}@{due.digest}"
            request = EvaluationRequest(model, schedule.task, schedule.num_items, SEED, 0.0)
            try:
                started = await self.evaluations.start(due.tenant, request)
            except Overloaded:
                if due.tenant not in queued:
                    queued.add(due.tenant)
                    with contextlib.suppress(OpenMintError):  # its start will say it
                        self.evaluations.expect(due.tenant, model)
                continue
            except OpenMintError as error:
                log.warning("not_evaluated", model=model, task=schedule.task, error=error.message)
            else:
                log.info("evaluation_due", model=model, evaluation_id=started.evaluation_id)
            await asyncio.to_thread(self.catalog.note_scheduled, schedule, due.digest, at)
