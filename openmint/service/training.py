"""Training runs: creation, gradients, updates. Each run has one lane and lives in one worker.

Every method that opens a future returns at once; a retry with the same seq_id and content gets the
same future. What a future's result makes durable is said where it is opened. On the event loop.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from openmint.catalog.catalog import Catalog
from openmint.errors import (
    BodyMismatch,
    EngineFailed,
    Gone,
    InvalidRequest,
    NotFound,
    RequestError,
)
from openmint.scheduler.work import (
    CreateRun,
    DropRun,
    OptimResult,
    OptimWork,
    Result,
    RunCommand,
    TrainWork,
)
from openmint.service import checks
from openmint.service.fingerprint import fingerprint
from openmint.service.futures import Futures, ResultFuture
from openmint.service.lanes import Lane, Start
from openmint.service.sessions import Sessions
from openmint.service.workers import Workers
from openmint.types import (
    AdamParams,
    BaseInfo,
    Datum,
    LoraSpec,
    LossSpec,
    RunId,
    SessionId,
    Tenant,
)

FORGOTTEN_ORDER = 1 << 62
"""First seq_id of a lane whose past is unknown: whatever arrives is sent at once."""


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
    forgotten_seq: int = -1
    """Highest seq_id whose future was already forgotten."""
    num_optim_steps: int = 0
    is_asked: bool = True
    """Whether a request came since the record was last brought up to date."""


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
        default = f"run-{self.session_id[:8]}-{self.model_seq_id}"
        return checks.check_policy_name(self.user_metadata.get("policy", default))


class Training:
    """The live runs."""

    def __init__(
        self,
        catalog: Catalog,
        workers: Workers,
        futures: Futures,
        sessions: Sessions,
        gap_seconds: float,
    ) -> None:
        self._catalog, self._workers, self._futures = catalog, workers, futures
        self._sessions, self._gap_seconds = sessions, gap_seconds
        self._runs: dict[RunId, LiveRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        sessions.on_close(self.close_session)

    # -- creation -----------------------------------------------------------------------------

    def create_run(self, new: NewRun, seed: int | None) -> ResultFuture:
        """Start a run with a fresh adapter. Its result: policy and run are registered, durably.

        Raises InvalidRequest, Gone for a closed session, BodyMismatch for a differing retry.
        """
        checks.check_spec(new.spec, new.base)
        drawn = secrets.randbits(62) if seed is None else seed
        command = CreateRun(new.run_id, new.tenant, new.spec, drawn)
        return self.open_run(new, "create_model", fingerprint(new, seed), command)

    def open_run(self, new: NewRun, kind: str, content: bytes, command: RunCommand) -> ResultFuture:
        """Start a run by `command`, once per (session, model_seq_id)."""
        self._sessions.touch(new.tenant, new.session_id)
        key = ("run", new.run_id)
        if known := self._futures.existing(key, content):
            return known
        if new.run_id in self._runs:
            raise InvalidRequest(f"run {new.run_id} exists; use the next model_seq_id")
        self._check_policy_base(new)
        lane = Lane(new.run_id, 1, self._gap_seconds)
        run = LiveRun(
            new.run_id,
            new.tenant,
            new.session_id,
            new.base,
            new.spec,
            new.policy,
            new.user_metadata,
            lane,
        )
        self._runs[new.run_id] = run
        future = self._futures.open(new.tenant, kind, key, content)

        async def start() -> object:
            try:
                await self.call(run, command)
                await asyncio.to_thread(self.register, new)
            except Exception:
                self._runs.pop(new.run_id, None)
                raise
            return {"model_id": new.run_id, "type": kind}

        lane.submit(None, future, start, barrier=True)
        return future

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

    def register(self, new: NewRun) -> None:
        """Write the run and its policy into the catalogue; repeating it is safe."""
        self._catalog.add_run(
            new.tenant,
            new.run_id,
            session_id=new.session_id,
            policy=new.policy,
            base=new.base,
            spec=new.spec,
            user_metadata=new.user_metadata,
        )

    # -- requests of a run --------------------------------------------------------------------

    def run(self, tenant: Tenant, run_id: str) -> LiveRun:
        """The tenant's run, its session counted as alive. Raises NotFound, Gone."""
        run = self._runs.get(RunId(run_id)) or self._recall(tenant, RunId(run_id))
        if run.tenant != tenant:
            raise NotFound(f"no training run {run_id[:200]!r}")
        self._sessions.touch(tenant, run.session_id)
        run.is_asked = True
        return run

    def _recall(self, tenant: Tenant, run_id: RunId) -> LiveRun:
        """A run of an earlier process. Its weights are gone from the worker unless loaded again."""
        record = self._catalog.run(tenant, run_id)
        self._sessions.touch(tenant, record.session_id)
        run = LiveRun(
            run_id,
            tenant,
            record.session_id,
            self._workers.by_digest(record.base_digest).base,
            record.spec,
            record.policy_name,
            record.user_metadata,
            Lane(run_id, FORGOTTEN_ORDER, self._gap_seconds),
        )
        self._runs[run_id] = run
        return run

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

    def is_known(self, run: LiveRun, seq: int | None) -> bool:
        """Whether a request with this seq_id was accepted and is remembered."""
        return self._futures.has(("seq_id", run.run_id, seq))

    def submit(
        self,
        run: LiveRun,
        seq: int | None,
        kind: str,
        content: bytes,
        start: Start,
        *,
        barrier: bool = False,
    ) -> ResultFuture:
        """The future of one ordered request; `start` is called in the order of seq_ids."""
        key = ("seq_id", run.run_id, secrets.token_hex(8) if seq is None else seq)
        if known := self._futures.existing(key, content):
            return known
        if seq is not None and seq <= run.forgotten_seq:
            raise Gone(f"seq_id {seq} of {run.run_id} was answered, and its result is forgotten")
        future = self._futures.open(run.tenant, kind, key, content)
        run.lane.submit(seq, future, start, barrier=barrier)
        return future

    def train(
        self,
        run: LiveRun,
        seq: int | None,
        data: tuple[Datum, ...],
        loss: LossSpec,
        forward_only: bool,
    ) -> ResultFuture:
        """A forward pass, or forward and backward. Raises InvalidRequest for what cannot run.

        Its result is volatile until a checkpoint is saved.
        """
        checks.check_data(data, loss, run.base)
        filled = tuple(_filled(datum, loss) for datum in data)
        work = TrainWork(run.run_id, run.tenant, filled, loss, forward_only)
        kind = "forward" if forward_only else "forward_backward"
        return self.submit(run, seq, kind, fingerprint(work), lambda: self.call(run, work))

    def optim_step(self, run: LiveRun, seq: int | None, adam: AdamParams) -> ResultFuture:
        """One AdamW update from the accumulated gradient."""
        work = OptimWork(run.run_id, run.tenant, adam)
        content = fingerprint(work)

        async def start() -> object:
            result = await self.call(run, work)
            assert isinstance(result, OptimResult)
            run.num_optim_steps = result.num_optim_steps
            return result

        return self.submit(run, seq, "optim_step", content, start)

    async def call(self, run: LiveRun, command: RunCommand) -> Result:
        """The worker's answer; its first step sends the command. Raises EngineFailed for a run
        that the worker lost."""
        try:
            return await self._workers.by_digest(run.base.digest).call(command)
        except NotFound as error:
            raise EngineFailed(error.message) from error

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

    # -- end ----------------------------------------------------------------------------------

    async def close_session(self, tenant: Tenant, session_id: SessionId) -> None:
        """Free the session's runs in the workers."""
        runs = [run for run in self._runs.values() if run.session_id == session_id]
        for run in runs:
            await run.lane.close()
            self._runs.pop(run.run_id, None)
            task = asyncio.create_task(self._drop(run))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _drop(self, run: LiveRun) -> None:
        client = self._workers.by_digest(run.base.digest)
        if client.alive:
            await client.call(DropRun(run.run_id, run.tenant))

    def forget(self, futures: list[ResultFuture]) -> None:
        """Remember that these requests were answered, so that a late retry runs nothing twice."""
        for future in futures:
            name, *rest = future.key
            run = self._runs.get(RunId(str(rest[0]))) if name == "seq_id" else None
            if run and isinstance(rest[1], int):
                run.forgotten_seq = max(run.forgotten_seq, rest[1])


def _filled(datum: Datum, loss: LossSpec) -> Datum:
    """The datum as the engine wants it: floats in float32, absent weights as ones."""
    inputs = {
        name: values.astype(np.int64 if name == "target_tokens" else np.float32)
        for name, values in datum.inputs.items()
    }
    if loss.name == "cross_entropy" and "weights" not in inputs:
        inputs["weights"] = np.ones(inputs["target_tokens"].shape, np.float32)
    return Datum(datum.tokens_N, inputs)
