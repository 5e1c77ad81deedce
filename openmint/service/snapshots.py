"""Saves the states of runs now and then, so that rebuilding one takes little and its log stays
short. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import SavedState
from openmint.config import ServiceConfig
from openmint.errors import OpenMintError, WorkerLost
from openmint.scheduler.work import SavedBlob, SaveRun
from openmint.service.collector import Collector
from openmint.service.runs import LiveRun, Runs
from openmint.service.workers import Workers

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0
MOST_REQUESTS = 256
"""Passes without an update are kept too, as they would have to run again."""


class Snapshots:
    """A snapshot replaces the requests before it, in the catalogue and in the worker's log."""

    def __init__(
        self,
        catalog: Catalog,
        workers: Workers,
        runs: Runs,
        collector: Collector,
        config: ServiceConfig,
    ) -> None:
        self._catalog, self._workers = catalog, workers
        self._runs, self._collector, self._config = runs, collector, config

    async def keep(self) -> None:
        """Save every run that is due, one after the other, for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for run in self.due(time.monotonic()):
                try:
                    await self.save(run)
                except WorkerLost:
                    pass  # it is rebuilt, and due again
                except OpenMintError as error:
                    log.error("snapshot_failed", run=run.run_id, error=error.message)
                except Exception as error:  # a task's edge: the other runs want theirs
                    log.error("snapshot_failed", run=run.run_id, exc_info=error)

    def due(self, now_seconds: float) -> list[LiveRun]:
        """The runs with much to do again; those that nobody asks anything; and while a base's log
        is too long, those that hold most of it."""
        runs = [run for run in list(self._runs.live.values()) if run.unsaved]
        return [
            run
            for run in runs
            if num_updates(run) >= min(self._config.snapshot_updates, self._most(run, runs))
            or len(run.unsaved) >= MOST_REQUESTS
            or now_seconds - run.changed_at_seconds >= self._config.snapshot_idle_seconds
        ]

    def _most(self, run: LiveRun, runs: list[LiveRun]) -> int:
        """How many logged updates a run of that base may have while others have fewer."""
        worker = self._workers.by_digest(run.base.digest)
        if worker.stats.journal_bytes <= self._config.journal_bytes:
            return self._config.snapshot_updates
        beside = [num_updates(other) for other in runs if other.base.digest == run.base.digest]
        return max(1, max(beside))

    async def save(self, run: LiveRun) -> None:
        """Save the run's state after what was sent so far, then forget what led to it.

        A run that a new worker has not begun to rebuild is left for later.
        """
        if run.lane.is_stopped:
            return
        seq = run.lane.sent_seq
        with self._collector.saving():
            # Its first step sends the command, so nothing comes between.
            blob = await self._runs.call(run, SaveRun(run.run_id, run.tenant))
            assert isinstance(blob, SavedBlob)
            await self._collector.spare(blob.digest)
            before = [pending for at, pending in run.pending.items() if at <= seq]
            await asyncio.gather(*(pending.future.done.wait() for pending in before))
            if run.ended is not None:
                return
            saved = SavedState(blob.digest, seq)
            await asyncio.to_thread(self._catalog.move_snapshot, run.run_id, saved)
        for at in [at for at in run.unsaved if at <= seq]:
            del run.unsaved[at]
        self._workers.by_digest(run.base.digest).forget(run.run_id, seq)


def num_updates(run: LiveRun) -> int:
    return list(run.unsaved.values()).count("optim_step")
