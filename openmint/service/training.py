"""Training runs: creation, gradients, updates. Each run has one lane and lives in one worker.

A request is written down before its client hears of it, and its outcome before it can be fetched;
so the runs, and every future, outlive the worker and this process (`rebuilding.py`). Every method
that opens a future returns at once; a retry with the same seq_id and content gets the same future.
Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import structlog

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Finished, RequestRecord
from openmint.errors import (
    BodyMismatch,
    EngineFailed,
    Gone,
    InvalidRequest,
    NotFound,
    OpenMintError,
    Overloaded,
    RequestError,
    WorkerLost,
)
from openmint.scheduler.work import (
    LAST_SEQ,
    CreateRun,
    DropRun,
    OptimResult,
    OptimWork,
    RestoreRun,
    Result,
    RunCommand,
    TrainWork,
)
from openmint.service import checks
from openmint.service.fingerprint import fingerprint
from openmint.service.futures import Futures, Key, ResultFuture, outcome_of
from openmint.service.lanes import Lane
from openmint.service.limits import Limits
from openmint.service.meter import Meter
from openmint.service.orders import (
    CODEC,
    START_SEQ,
    Failure,
    Order,
    StartOrder,
    makes_state,
    needs_of,
)
from openmint.service.rebuilding import next_seq_of, past_of
from openmint.service.replaying import Replaying
from openmint.service.request_log import RequestLog
from openmint.service.sessions import Sessions
from openmint.service.workers import Workers
from openmint.types import (
    AdamParams,
    BaseInfo,
    Datum,
    Digest,
    LoraSpec,
    LossSpec,
    RunId,
    SessionId,
    Tenant,
)

log = structlog.get_logger(__name__)

SESSION_ENDED = "the session ended before this request was done"
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


@dataclass(frozen=True, slots=True)
class Dormant:
    """A run of an earlier process, until its base is resident."""

    run_id: RunId
    tenant: Tenant
    start: StartOrder
    pending: dict[int, Pending]
    next_seq: int
    last_seq: int


@dataclass(frozen=True, slots=True)
class NewRun:
    """What `create_model`, or a load that creates, asks for."""

    tenant: Tenant
    session_id: SessionId
    model_seq_id: int
    base: BaseInfo
    spec: LoraSpec
    user_metadata: Mapping[str, str]

    @property
    def run_id(self) -> RunId:
        return RunId(f"{self.session_id}:train:{self.model_seq_id}")

    @property
    def policy(self) -> str:
        """The policy that the run adds revisions to. Raises InvalidRequest for a bad name."""
        return policy_of(self.session_id, self.model_seq_id, self.user_metadata)


def policy_of(session_id: SessionId, model_seq_id: int, user_metadata: Mapping[str, str]) -> str:
    default = f"run-{session_id[:8]}-{model_seq_id}"
    return checks.check_policy_name(user_metadata.get("policy", default))


class Training:
    """The live runs."""

    def __init__(
        self,
        catalog: Catalog,
        workers: Workers,
        futures: Futures,
        sessions: Sessions,
        limits: Limits,
        meter: Meter,
        replaying: Replaying,
        gap_seconds: float,
    ) -> None:
        self._catalog, self._workers, self._futures = catalog, workers, futures
        self._sessions, self._gap_seconds = sessions, gap_seconds
        self._limits, self._meter, self._replaying = limits, meter, replaying
        self._log = RequestLog(catalog)
        self._runs: dict[RunId, LiveRun] = {}
        self._dormant: dict[Digest, list[Dormant]] = defaultdict(list)
        self._lost: dict[RunId, LiveRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._performers: dict[type, Performer] = {
            StartOrder: self._start,
            TrainWork: self._pass,
            OptimWork: self._update,
        }
        sessions.on_close(self.close_session)

    def performs(self, kind: type, performer: Performer) -> None:
        """Have orders of this kind done by `performer`."""
        self._performers[kind] = performer

    # -- creation -----------------------------------------------------------------------------

    def create_run(self, new: NewRun, seed: int | None) -> ResultFuture:
        """Start a run with a fresh adapter. Its result: policy and run are registered, durably.

        Raises InvalidRequest, Gone for a closed session, BodyMismatch for a differing retry.
        """
        checks.check_spec(new.spec, new.base)
        drawn = secrets.randbits(62) if seed is None else seed
        command = CreateRun(new.run_id, new.tenant, new.spec, drawn)
        return self.open_run(new, "create_model", fingerprint(new, seed), command)

    def open_run(
        self, new: NewRun, kind: str, content: bytes, command: CreateRun | RestoreRun
    ) -> ResultFuture:
        """Start a run by `command`, once per (session, model_seq_id)."""
        self._sessions.touch(new.tenant, new.session_id)
        key = ("run", new.run_id)
        if known := self._futures.existing(key, content):
            return known
        if new.run_id in self._runs:
            raise InvalidRequest(f"run {new.run_id} exists; use the next model_seq_id")
        self._check_policy_base(new)
        self._limits.check_run(new.tenant)
        order = StartOrder(
            kind,
            new.session_id,
            new.model_seq_id,
            new.base.digest,
            new.spec,
            new.user_metadata,
            command,
        )
        run = self._live(new.run_id, new.tenant, new.base, order)
        return self._open(run, START_SEQ, kind, key, content, order)

    def _live(self, run_id: RunId, tenant: Tenant, base: BaseInfo, start: StartOrder) -> LiveRun:
        run = self._runs[run_id] = LiveRun(
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

    def _check_policy_base(self, new: NewRun) -> None:
        try:
            policy = self._catalog.policy(new.tenant, new.policy)
        except NotFound:
            return
        if policy.base_digest != new.base.digest:
            raise InvalidRequest(
                f"policy {new.policy!r} belongs to base {policy.base_name}, not {new.base.name}; "
                "choose another policy name or that base"
            )

    async def _start(self, run: LiveRun, _seq: int, order: StartOrder) -> object:
        try:
            await self.call(run, order.command)
            await asyncio.to_thread(
                self._catalog.add_run,
                run.tenant,
                run.run_id,
                session_id=run.session_id,
                policy=run.policy,
                base=run.base,
                spec=run.spec,
                user_metadata=run.user_metadata,
            )
        except WorkerLost:
            raise
        except Exception:
            self._runs.pop(run.run_id, None)
            raise
        return {"model_id": run.run_id, "type": order.kind}

    # -- requests of a run --------------------------------------------------------------------

    def run(self, tenant: Tenant, run_id: str) -> LiveRun:
        """The tenant's run, its session counted as alive. Raises NotFound, Gone, and Overloaded
        while its base is still loading."""
        run = self._runs.get(RunId(run_id))
        if run is None:
            raise self._why_absent(tenant, RunId(run_id))
        if run.tenant != tenant:
            raise NotFound(f"no training run {run_id[:200]!r}")
        self._sessions.touch(tenant, run.session_id)
        run.is_asked = True
        return run

    def _why_absent(self, tenant: Tenant, run_id: RunId) -> OpenMintError:
        record = self._catalog.run(tenant, run_id)
        self._sessions.touch(tenant, record.session_id)
        self._workers.by_digest(record.base_digest)
        return Gone(
            f"training run {run_id!r} is not in memory (finished, or it could not be rebuilt); "
            "continue from a checkpoint with create_training_client_from_state"
        )

    @contextmanager
    def request(self, tenant: Tenant, run_id: str, seq: int | None) -> Iterator[LiveRun]:
        """The run, for one request of it; a refusal inside counts the request's seq_id as used."""
        run = self.run(tenant, run_id)
        try:
            yield run
        except BodyMismatch:
            raise
        except RequestError:
            run.lane.refuse(seq)
            raise

    def refuse(self, tenant: Tenant, run_id: str, seq: int) -> None:
        """Count a request's seq_id as used, if the tenant has such a run in memory."""
        run = self._runs.get(RunId(run_id))
        if run is not None and run.tenant == tenant:
            run.lane.refuse(seq)

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
        return self._open(run, seq, kind, key, content, order)

    def _open(
        self, run: LiveRun, seq: int, kind: str, key: Key, content: bytes, order: Order
    ) -> ResultFuture:
        run.last_seq = max(run.last_seq, seq)
        future = self._futures.open(run.tenant, kind, key, content)
        future.holdup = partial(self._holdup, run)
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
                self._runs.pop(run.run_id, None)
            raise
        run.pending[seq] = pending
        if run.ended is not None:
            await self._end(run, seq, pending, None, run.ended)
        elif seq < run.lane.next_seq:
            late = Gone(f"seq_id {seq} came after later ones had gone ahead without it")
            await self._end(run, seq, pending, None, late)
        else:
            self._queue(run, seq)

    def _queue(self, run: LiveRun, seq: int) -> None:
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
            await self._end(run, seq, pending, result, error)

    async def _end(
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

    def train(
        self,
        run: LiveRun,
        seq: int | None,
        data: tuple[Datum, ...],
        loss: LossSpec,
        forward_only: bool,
    ) -> ResultFuture:
        """A forward pass, or forward and backward. Raises InvalidRequest for what cannot run.

        A result that was given stays as it is. After a crash before the next update the gradient
        is computed again, which gives the same bits when the worker is deterministic.
        """
        checks.check_data(data, loss, run.base)
        if not self.is_known(run, seq):
            self._limits.check_tokens(run.tenant)
        filled = tuple(_filled(datum, loss) for datum in data)
        work = TrainWork(run.run_id, run.tenant, filled, loss, forward_only)
        kind = "forward" if forward_only else "forward_backward"
        content = fingerprint(work)
        routed = self._replaying.routed(run.tenant, run.base.digest, filled, loss)
        return self.submit(run, seq, kind, content, replace(work, data=routed))

    async def _pass(self, run: LiveRun, _seq: int, work: TrainWork) -> object:
        result = await self.call(run, work)
        num_tokens = sum(len(datum.tokens_N) for datum in work.data)
        self._meter.trained(run.tenant, run.base.name, num_tokens)
        return result

    def optim_step(self, run: LiveRun, seq: int | None, adam: AdamParams) -> ResultFuture:
        """One AdamW update from the accumulated gradient. Its result: it is durable."""
        work = OptimWork(run.run_id, run.tenant, adam)
        return self.submit(run, seq, "optim_step", fingerprint(work), work)

    async def _update(self, run: LiveRun, seq: int, work: OptimWork) -> object:
        result = await self.call(run, replace(work, seq=seq))
        assert isinstance(result, OptimResult)
        run.num_optim_steps = result.num_optim_steps
        return result

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

    async def keep_records(self) -> None:
        """Bring the records of the runs that were asked something up to date."""
        for run in [run for run in self._runs.values() if run.is_asked]:
            run.is_asked = False
            with suppress(NotFound):  # its creation has not ended
                await asyncio.to_thread(
                    self._catalog.touch_run,
                    run.tenant,
                    run.run_id,
                    num_optim_steps=run.num_optim_steps or None,
                )

    def num_runs(self, tenant: Tenant) -> int:
        return sum(run.tenant == tenant for run in self._runs.values())

    def _holdup(self, run: LiveRun) -> str | None:
        """What the run's requests wait for, in words for their client."""
        if not self._workers.by_digest(run.base.digest).alive:
            return f"the worker of base {run.base.name} is being started again; nothing is lost"
        if run.rebuilt is not None and not run.rebuilt.done():
            return "the run is being rebuilt after a crash; nothing is lost"
        return None

    def live_runs(self) -> list[LiveRun]:
        return list(self._runs.values())

    # -- through crashes ----------------------------------------------------------------------

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
            run = self._live(dormant.run_id, dormant.tenant, base, dormant.start)
            run.pending, run.last_seq = dormant.pending, dormant.last_seq
            run.lane = run.lane.successor(dormant.next_seq)
            run.lane.stop()
            for pending in run.pending.values():
                pending.future.holdup = partial(self._holdup, run)

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
        runs = [run for run in self._runs.values() if run.base.digest == base.digest]
        for run in runs:
            run.lane.stop()
        for run in runs:
            await self._rebuild(run, frozenset(logged.get(run.run_id, ())))
        self._let_go_of_homeless()
        for run_id in logged.keys() - self._runs.keys() - self._lost.keys():
            self._workers.by_digest(base.digest).forget(run_id, LAST_SEQ)
        if runs:
            self._spawn(_say_rebuilt(base, runs, started_at))
        return len(runs)

    def _let_go_of_homeless(self) -> None:
        """Tell who waits for a base that turned out to have other weights; what is written down
        stays for when the old ones are back."""
        for run in list(self._runs.values()):
            try:
                self._workers.by_digest(run.base.digest)
            except NotFound as error:
                run.ended = error
                run.lane.stop()
                del self._runs[run.run_id]
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
            self._queue(run, seq)

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
            self._spawn(self._lose(run, error))

    async def _lose(self, run: LiveRun, error: OpenMintError) -> None:
        """Refuse the run from now on: its state could not be made again as it was."""
        log.error("run_lost", run=run.run_id, error=error.message)
        run.lane.stop()
        self._runs.pop(run.run_id, None)
        run.ended = lost = EngineFailed(
            f"training run {run.run_id!r} could not be rebuilt: {error.message}; continue from a "
            "checkpoint with create_training_client_from_state"
        )
        self._lost[run.run_id] = run
        for seq, pending in list(run.pending.items()):
            await self._end(run, seq, pending, None, lost)
        await asyncio.to_thread(self._catalog.lose_runs, [run.run_id])
        await self._drop(run, keeps_log=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- end ----------------------------------------------------------------------------------

    async def close_session(self, tenant: Tenant, session_id: SessionId) -> None:
        """Free the session's runs in the workers."""
        runs = [run for run in self._runs.values() if run.session_id == session_id]
        for run in runs:
            run.ended = Gone(SESSION_ENDED)
            run.lane.stop()
            self._runs.pop(run.run_id, None)
            for pending in run.pending.values():
                pending.future.fail(run.ended)
            self._spawn(self._drop(run))
        for run in [run for run in self._lost.values() if run.session_id == session_id]:
            del self._lost[run.run_id]
            self._spawn(self._drop(run))

    async def _drop(self, run: LiveRun, *, keeps_log: bool = False) -> None:
        with suppress(WorkerLost):
            client = self._workers.by_digest(run.base.digest)
            await client.call(DropRun(run.run_id, run.tenant, keeps_log))

    async def close(self) -> None:
        """Wait for what the workers have answered to be written down."""
        for run in self._runs.values():
            run.lane.stop()
            await run.lane.wait_running()

    async def forget(self, futures: list[ResultFuture]) -> None:
        """These results were kept long enough."""
        keys = [
            (RunId(str(rest[0])), START_SEQ if name == "run" else int(str(rest[1])))
            for name, *rest in (future.key for future in futures)
            if name in ("run", "seq_id")
        ]
        if keys:
            await asyncio.to_thread(self._catalog.forget_outcomes, keys)


async def _say_rebuilt(base: BaseInfo, runs: Sequence[LiveRun], started_at: float) -> None:
    ends = [run.rebuilt for run in runs if run.rebuilt is not None]
    await asyncio.gather(*ends, return_exceptions=True)
    seconds = round(time.monotonic() - started_at, 3)
    log.info("runs_rebuilt", base=base.name, runs=len(ends), seconds=seconds)


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


def _filled(datum: Datum, loss: LossSpec) -> Datum:
    """The datum as the engine wants it: floats in float32, absent weights as ones."""
    inputs = {
        name: values.astype(np.int64 if name == "target_tokens" else np.float32)
        for name, values in datum.inputs.items()
    }
    if loss.name == "cross_entropy" and "weights" not in inputs:
        inputs["weights"] = np.ones(inputs["target_tokens"].shape, np.float32)
    return Datum(datum.tokens_N, inputs)
