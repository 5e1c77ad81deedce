"""The runs that this process knows, and what becomes of each of their requests.

A request is written down before its client hears of it, and its outcome before it can be fetched;
so the runs, and every future, outlive the worker and this process (`recovery.py`). Each run has one
lane and lives in one worker. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Finished, RequestRecord
from openmint.errors import EngineFailed, Gone, NotFound, OpenMintError, WorkerLost
from openmint.scheduler.work import DropRun, Result, RunCommand, TrainWork
from openmint.service import checks
from openmint.service.futures import Futures, Key, ResultFuture, outcome_of
from openmint.service.lanes import Lane
from openmint.service.orders import (
    CODEC,
    START_SEQ,
    Failure,
    Order,
    StartOrder,
    makes_state,
    needs_of,
)
from openmint.service.request_log import RequestLog
from openmint.service.workers import Workers
from openmint.types import BaseInfo, LoraSpec, RunId, SessionId, Tenant

LARGE_BYTES = 1 << 16
"""Orders above it are encoded off the event loop."""
MOST_LOSSES = 8
"""Workers that a request may see the end of. One that all of them died of may be the cause."""


@dataclass(eq=False, slots=True)
class Pending:
    """A request that is written down and has no outcome yet."""

    order: Order
    future: ResultFuture
    num_losses: int = 0
    """Workers that died while they had it."""
    is_again: bool = False
    """It may have been done before, in part or whole, and nobody heard of it."""


@dataclass(eq=False, slots=True)
class LiveRun:
    """A run of this process: where it lives and in which order its requests go out."""

    run_id: RunId
    tenant: Tenant
    session_id: SessionId
    base: BaseInfo
    spec: LoraSpec
    policy: str
    user_metadata: Mapping[str, str]
    lane: Lane
    pending: dict[int, Pending] = field(default_factory=dict)
    unsaved: dict[int, str] = field(default_factory=dict)
    """Requests that made the state what it is since its last snapshot, and their kinds."""
    changed_at_seconds: float = field(default_factory=time.monotonic)
    rebuilt: asyncio.Future[Any] | None = None
    """Done once a new worker has made everything again that had been done before."""
    last_seq: int = START_SEQ
    num_optim_steps: int = 0
    is_asked: bool = True
    """Whether a request came since the record was last brought up to date."""
    ended: OpenMintError | None = None
    """Why nothing more is done for it."""


Performer = Callable[[LiveRun, int, Any], Awaitable[object]]
"""Does what an order of the run asks for."""


def policy_of(session_id: SessionId, model_seq_id: int, user_metadata: Mapping[str, str]) -> str:
    default = f"run-{session_id[:8]}-{model_seq_id}"
    return checks.check_policy_name(user_metadata.get("policy", default))


class Runs:
    """The live ones, by their ids."""

    def __init__(
        self, catalog: Catalog, workers: Workers, futures: Futures, gap_seconds: float
    ) -> None:
        self._workers, self._futures, self._gap_seconds = workers, futures, gap_seconds
        self._log = RequestLog(catalog)
        self._performers: dict[type, Performer] = {}
        self.live: dict[RunId, LiveRun] = {}

    def performs(self, kind: type, performer: Performer) -> None:
        """Have orders of this kind done by `performer`."""
        self._performers[kind] = performer

    def add(self, run_id: RunId, tenant: Tenant, base: BaseInfo, start: StartOrder) -> LiveRun:
        """A run from now on; nothing of it is sent yet."""
        run = self.live[run_id] = LiveRun(
            run_id,
            tenant,
            start.session_id,
            base,
            start.spec,
            policy_of(start.session_id, start.model_seq_id, start.user_metadata),
            start.user_metadata,
            Lane(run_id, START_SEQ, self._gap_seconds),
        )
        return run

    def is_known(self, run: LiveRun, seq: int | None) -> bool:
        """Whether a request with this seq_id was accepted and is remembered."""
        return self._futures.has(("seq_id", run.run_id, seq))

    def submit(
        self, run: LiveRun, seq: int | None, kind: str, content: bytes, order: Order
    ) -> ResultFuture:
        """The future of one ordered request, to be done in the order of seq_ids.

        Without a seq_id it comes after all that came before. `future.accepted` must be awaited
        before a client hears of it.
        """
        if seq is None:
            seq = max(run.last_seq, run.lane.next_seq - 1) + 1
        key = ("seq_id", run.run_id, seq)
        if known := self._futures.existing(key, content):
            return known
        if seq < run.lane.next_seq:
            raise Gone(
                f"seq_id {seq} of {run.run_id} was answered and is forgotten, or came after "
                "later ones had gone ahead without it"
            )
        return self.open(run, seq, kind, key, content, order)

    def open(
        self, run: LiveRun, seq: int, kind: str, key: Key, content: bytes, order: Order
    ) -> ResultFuture:
        """The same for a request that is new."""
        run.last_seq = max(run.last_seq, seq)
        future = self._futures.open(run.tenant, kind, key, content)
        future.holdup = partial(self.holdup, run)
        future.accepting = asyncio.create_task(self._accept(run, seq, Pending(order, future)))
        future.accepting.add_done_callback(_heard)
        return future

    async def _accept(self, run: LiveRun, seq: int, pending: Pending) -> None:
        """Write the request down, then have it done. One that can't be written never was."""
        future = pending.future
        try:
            record = RequestRecord(
                run_id=run.run_id,
                seq=seq,
                session_id=run.session_id,
                tenant=run.tenant,
                request_id=future.request_id,
                kind=future.kind,
                fingerprint=future.fingerprint,
                status="accepted",
                body=await _encoded(pending.order),
                needs=needs_of(pending.order),
                outcome=None,
            )
            await self._log.accept(record)
        except Exception:
            self._futures.forget(future)
            if seq == START_SEQ:
                self.live.pop(run.run_id, None)
            raise
        run.pending[seq] = pending
        if run.ended is not None:
            await self.end(run, seq, pending, None, run.ended)
        elif seq < run.lane.next_seq:
            late = Gone(f"seq_id {seq} came after later ones had gone ahead without it")
            await self.end(run, seq, pending, None, late)
        else:
            self.queue(run, seq)

    def queue(self, run: LiveRun, seq: int) -> None:
        """Have a pending request done in its turn."""
        is_start = isinstance(run.pending[seq].order, StartOrder)
        run.lane.submit(seq, partial(self._do, run, seq), barrier=is_start)

    async def _do(self, run: LiveRun, seq: int) -> None:
        """The job of a request. Its first step sends the command.

        When the worker is lost the request stays pending, until the run is rebuilt.
        """
        pending = run.pending[seq]
        perform = self._performers[type(pending.order)]
        is_sent = self._workers.by_digest(run.base.digest).alive
        result, error = await outcome_of(perform(run, seq, pending.order), pending.future)
        pending.num_losses += is_sent and isinstance(error, WorkerLost)
        pending.is_again |= isinstance(error, WorkerLost)
        if not isinstance(error, WorkerLost) or pending.num_losses == MOST_LOSSES:
            await self.end(run, seq, pending, result, error)

    async def end(
        self,
        run: LiveRun,
        seq: int,
        pending: Pending,
        result: object,
        error: OpenMintError | None,
    ) -> None:
        """Write the outcome down, then let it be fetched."""
        makes = error is None and makes_state(pending.order)
        outcome = Finished(
            run.run_id,
            seq,
            "done" if error is None else "failed",
            CODEC.encode(result if error is None else Failure.of(error)),
            keeps_body=makes,
        )
        await self._log.finish(outcome)
        run.pending.pop(seq, None)
        if makes:
            run.unsaved[seq] = pending.future.kind
            run.changed_at_seconds = time.monotonic()
        pending.future.take(result, error)

    async def call(self, run: LiveRun, command: RunCommand) -> Result:
        """The worker's answer; its first step sends the command. Raises WorkerLost, and whatever
        kept the worker from rebuilding the run that the command was for."""
        try:
            result = await self._workers.by_digest(run.base.digest).call(command)
        except NotFound as error:
            raise EngineFailed(error.message) from error
        if run.rebuilt is not None:
            await asyncio.shield(run.rebuilt)
        return result

    def holdup(self, run: LiveRun) -> str | None:
        """What the run's requests wait for, in words for their client."""
        if not self._workers.by_digest(run.base.digest).alive:
            return f"the worker of base {run.base.name} is being started again; nothing is lost"
        if run.rebuilt is not None and not run.rebuilt.done():
            return "the run is being rebuilt after a crash; nothing is lost"
        return None

    async def drop(self, run: LiveRun, *, keeps_log: bool = False) -> None:
        """Free it in its worker."""
        with suppress(WorkerLost):
            client = self._workers.by_digest(run.base.digest)
            await client.call(DropRun(run.run_id, run.tenant, keeps_log))


async def _encoded(order: Order) -> bytes:
    if isinstance(order, TrainWork) and _num_bytes(order) > LARGE_BYTES:
        return await asyncio.to_thread(CODEC.encode, order)
    return CODEC.encode(order)


def _num_bytes(work: TrainWork) -> int:
    arrays = [array for datum in work.data for array in (datum.tokens_N, *datum.inputs.values())]
    records = [len(datum.routes.record) for datum in work.data if datum.routes]
    return sum(array.nbytes for array in arrays) + sum(records)


def _heard(task: asyncio.Task[None]) -> None:
    """Whoever waits hears of a failure; that nobody does is no error of the task."""
    if not task.cancelled():
        task.exception()
