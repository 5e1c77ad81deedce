"""The runs of an earlier worker or an earlier process: taken up, rebuilt, or refused by name.

`rebuilding.py` says what gives a new worker the state of a run. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import structlog

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import RequestRecord
from openmint.errors import EngineFailed, NotFound, OpenMintError, Overloaded, WorkerLost
from openmint.scheduler.work import LAST_SEQ, RunCommand
from openmint.service.background import Background
from openmint.service.futures import Futures, ResultFuture
from openmint.service.orders import CODEC, START_SEQ, Failure, StartOrder
from openmint.service.rebuilding import next_seq_of, past_of
from openmint.service.runs import LiveRun, Pending, Runs
from openmint.service.sessions import Sessions
from openmint.service.workers import Workers
from openmint.types import BaseInfo, Digest, RunId, SessionId, Tenant

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Dormant:
    """A run of an earlier process, until its base is resident."""

    run_id: RunId
    tenant: Tenant
    start: StartOrder
    pending: dict[int, Pending]
    next_seq: int
    last_seq: int


class Recovery:
    """Brings runs through the end of their worker, and of this process."""

    def __init__(
        self, catalog: Catalog, workers: Workers, futures: Futures, sessions: Sessions, runs: Runs
    ) -> None:
        self._catalog, self._workers, self._futures = catalog, workers, futures
        self._runs = runs
        self._dormant: dict[Digest, list[Dormant]] = defaultdict(list)
        self._lost: dict[RunId, LiveRun] = {}
        self._background = Background()
        sessions.on_close(self.close_session)

    def restore(self) -> None:
        """Take up the futures of an earlier process, and its runs, which wait for their bases.

        A run whose base nobody expects is taken up when that is resident after all.
        """
        for run_id, group in groupby(self._catalog.open_requests(), lambda row: row.run_id):
            rows = list(group)
            pending = {}
            for row in rows:
                if row.status == "accepted":
                    assert row.body is not None
                    order = CODEC.decode(row.body)
                    pending[row.seq] = Pending(order, self._restored(row), is_again=True)
                elif row.outcome is not None:
                    outcome = CODEC.decode(row.outcome)
                    failed = isinstance(outcome, Failure)
                    self._restored(row).take(outcome, outcome.error() if failed else None)
            first = rows[0]
            if first.seq == START_SEQ and first.status != "failed" and first.body is not None:
                start = CODEC.decode(first.body)
                next_seq = next_seq_of(rows, self._catalog.snapshot_of(run_id))
                dormant = Dormant(run_id, first.tenant, start, pending, next_seq, rows[-1].seq)
                self._dormant[start.base].append(dormant)
        for client in self._workers.first():
            self._wake(client.base)
        self._catalog.lose_runs()

    def _wake(self, base: BaseInfo) -> None:
        """Have the base's runs of an earlier process be found; they send nothing yet."""
        for dormant in self._dormant.pop(base.digest, ()):
            run = self._runs.add(dormant.run_id, dormant.tenant, base, dormant.start)
            run.pending, run.last_seq = dormant.pending, dormant.last_seq
            run.lane = run.lane.successor(dormant.next_seq)
            run.lane.stop()
            for pending in run.pending.values():
                pending.future.holdup = partial(self._runs.holdup, run)

    def _restored(self, row: RequestRecord) -> ResultFuture:
        key = ("run", row.run_id) if row.seq == START_SEQ else ("seq_id", row.run_id, row.seq)
        return self._futures.add(
            ResultFuture(row.request_id, row.tenant, row.kind, key, row.fingerprint)
        )

    async def resume(self, base: BaseInfo, logged: Mapping[RunId, Collection[int]]) -> int:
        """Rebuild the base's runs in the worker that has just been connected; how many.

        To be called before anything else is sent to that worker. `logged` are the requests whose
        updates it has in its log.
        """
        started_at = time.monotonic()
        self._wake(base)
        runs = [run for run in self._runs.live.values() if run.base.digest == base.digest]
        for run in runs:
            run.lane.stop()
        for run in runs:
            await self._rebuild(run, frozenset(logged.get(run.run_id, ())))
        self._let_go_of_homeless()
        for run_id in logged.keys() - self._runs.live.keys() - self._lost.keys():
            self._workers.by_digest(base.digest).forget(run_id, LAST_SEQ)
        if runs:
            self._background.start(_say_rebuilt(base, runs, started_at))
        return len(runs)

    def _let_go_of_homeless(self) -> None:
        """Tell who waits for a base that turned out to have other weights; what is written down
        stays for when the old ones are back."""
        for run in list(self._runs.live.values()):
            try:
                self._workers.by_digest(run.base.digest)
            except NotFound as error:
                run.ended = error
                run.lane.stop()
                del self._runs.live[run.run_id]
                for pending in run.pending.values():
                    pending.future.fail(error)
            except Overloaded:
                pass  # it may still come

    async def _rebuild(self, run: LiveRun, logged: frozenset[int]) -> None:
        """A new lane, which first sends what was done and then what was not."""
        await run.lane.wait_running()
        rows = await asyncio.to_thread(self._catalog.requests_of, run.run_id)
        snapshot = await asyncio.to_thread(self._catalog.snapshot_of, run.run_id)
        try:
            past = past_of(run.run_id, run.tenant, rows, snapshot, logged)
        except OpenMintError as error:
            await self._lose(run, error)
            return
        next_seq = max(run.lane.next_seq, next_seq_of(rows, snapshot))
        loop = asyncio.get_running_loop()
        ends = [loop.create_future() for _ in past]
        run.unsaved = {row.seq: row.kind for row in rows if row.status == "done" and row.body}
        run.lane = run.lane.successor(next_seq)
        run.rebuilt = asyncio.gather(*ends)
        run.rebuilt.add_done_callback(partial(self._rebuilt, run))
        for (seq, command), end in zip(past, ends, strict=True):
            run.lane.submit(seq, partial(self._repeat, run, command, end))
        for seq in sorted(run.pending):
            self._runs.queue(run, seq)

    async def _repeat(self, run: LiveRun, command: RunCommand, end: asyncio.Future[None]) -> None:
        try:
            await self._workers.by_digest(run.base.digest).call(command)
        except Exception as error:
            end.set_exception(error)
        else:
            end.set_result(None)

    def _rebuilt(self, run: LiveRun, end: asyncio.Future[Any]) -> None:
        error = None if end.cancelled() else end.exception()
        if isinstance(error, OpenMintError) and not isinstance(error, WorkerLost):
            self._background.start(self._lose(run, error))

    async def _lose(self, run: LiveRun, error: OpenMintError) -> None:
        """Refuse the run from now on: its state could not be made again as it was."""
        log.error("run_lost", run=run.run_id, error=error.message)
        run.lane.stop()
        self._runs.live.pop(run.run_id, None)
        run.ended = lost = EngineFailed(
            f"training run {run.run_id!r} could not be rebuilt: {error.message}; continue from a "
            "checkpoint with create_training_client_from_state"
        )
        self._lost[run.run_id] = run
        for seq, pending in list(run.pending.items()):
            await self._runs.end(run, seq, pending, None, lost)
        await asyncio.to_thread(self._catalog.lose_runs, [run.run_id])
        await self._runs.drop(run, keeps_log=True)

    async def close_session(self, tenant: Tenant, session_id: SessionId) -> None:
        """Free what the workers kept of the session's lost runs."""
        for run in [run for run in self._lost.values() if run.session_id == session_id]:
            del self._lost[run.run_id]
            self._background.start(self._runs.drop(run))


async def _say_rebuilt(base: BaseInfo, runs: Sequence[LiveRun], started_at: float) -> None:
    ends = [run.rebuilt for run in runs if run.rebuilt is not None]
    await asyncio.gather(*ends, return_exceptions=True)
    seconds = round(time.monotonic() - started_at, 3)
    log.info("runs_rebuilt", base=base.name, runs=len(ends), seconds=seconds)
