"""Training: creation of runs, gradients, updates, and their end with their session.

Every method that opens a future returns at once; a retry with the same seq_id and content gets the
same future (`runs.py`). Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np

from openmint.catalog.catalog import Catalog
from openmint.errors import (
    BodyMismatch,
    Gone,
    InvalidRequest,
    NotFound,
    OpenMintError,
    RequestError,
    WorkerLost,
)
from openmint.scheduler.work import CreateRun, OptimResult, OptimWork, RestoreRun, TrainWork
from openmint.service import checks
from openmint.service.background import Background
from openmint.service.fingerprint import fingerprint
from openmint.service.futures import Futures, ResultFuture
from openmint.service.limits import Limits
from openmint.service.meter import Meter
from openmint.service.orders import START_SEQ, StartOrder
from openmint.service.replaying import Replaying
from openmint.service.runs import LiveRun, Runs, policy_of
from openmint.service.sessions import Sessions
from openmint.service.workers import Workers
from openmint.types import AdamParams, BaseInfo, Datum, LoraSpec, LossSpec, RunId, SessionId, Tenant

SESSION_ENDED = "the session ended before this request was done"


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


class Training:
    """What clients ask of runs, but for their checkpoints."""

    def __init__(
        self,
        catalog: Catalog,
        workers: Workers,
        futures: Futures,
        sessions: Sessions,
        runs: Runs,
        limits: Limits,
        meter: Meter,
        replaying: Replaying,
    ) -> None:
        self._catalog, self._workers, self._futures = catalog, workers, futures
        self._sessions, self._runs, self._background = sessions, runs, Background()
        self._limits, self._meter, self._replaying = limits, meter, replaying
        runs.performs(StartOrder, self._start)
        runs.performs(TrainWork, self._pass)
        runs.performs(OptimWork, self._update)
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

    def open_run(
        self, new: NewRun, kind: str, content: bytes, command: CreateRun | RestoreRun
    ) -> ResultFuture:
        """Start a run by `command`, once per (session, model_seq_id)."""
        self._sessions.touch(new.tenant, new.session_id)
        key = ("run", new.run_id)
        if known := self._futures.existing(key, content):
            return known
        if new.run_id in self._runs.live:
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
        run = self._runs.add(new.run_id, new.tenant, new.base, order)
        return self._runs.open(run, START_SEQ, kind, key, content, order)

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
            await self._runs.call(run, order.command)
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
            self._runs.live.pop(run.run_id, None)
            raise
        return {"model_id": run.run_id, "type": order.kind}

    # -- requests of a run --------------------------------------------------------------------

    def run(self, tenant: Tenant, run_id: str) -> LiveRun:
        """The tenant's run, its session counted as alive. Raises NotFound, Gone, and Overloaded
        while its base is still loading."""
        run = self._runs.live.get(RunId(run_id))
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
        run = self._runs.live.get(RunId(run_id))
        if run is not None and run.tenant == tenant:
            run.lane.refuse(seq)

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
        if not self._runs.is_known(run, seq):
            self._limits.check_tokens(run.tenant)
        filled = tuple(_filled(datum, loss) for datum in data)
        work = TrainWork(run.run_id, run.tenant, filled, loss, forward_only)
        kind = "forward" if forward_only else "forward_backward"
        content = fingerprint(work)
        routed = self._replaying.routed(run.tenant, run.base.digest, filled, loss)
        return self._runs.submit(run, seq, kind, content, replace(work, data=routed))

    async def _pass(self, run: LiveRun, _seq: int, work: TrainWork) -> object:
        result = await self._runs.call(run, work)
        num_tokens = sum(len(datum.tokens_N) for datum in work.data)
        self._meter.trained(run.tenant, run.base.name, num_tokens)
        return result

    def optim_step(self, run: LiveRun, seq: int | None, adam: AdamParams) -> ResultFuture:
        """One AdamW update from the accumulated gradient. Its result: it is durable."""
        work = OptimWork(run.run_id, run.tenant, adam)
        return self._runs.submit(run, seq, "optim_step", fingerprint(work), work)

    async def _update(self, run: LiveRun, seq: int, work: OptimWork) -> object:
        result = await self._runs.call(run, replace(work, seq=seq))
        assert isinstance(result, OptimResult)
        run.num_optim_steps = result.num_optim_steps
        return result

    async def keep_records(self) -> None:
        """Bring the records of the runs that were asked something up to date."""
        for run in [run for run in self._runs.live.values() if run.is_asked]:
            run.is_asked = False
            with suppress(NotFound):  # its creation has not ended
                await asyncio.to_thread(
                    self._catalog.touch_run,
                    run.tenant,
                    run.run_id,
                    num_optim_steps=run.num_optim_steps or None,
                )

    def num_runs(self, tenant: Tenant) -> int:
        return sum(run.tenant == tenant for run in self._runs.live.values())

    # -- end ----------------------------------------------------------------------------------

    async def close_session(self, tenant: Tenant, session_id: SessionId) -> None:
        """Free the session's runs in the workers."""
        runs = [run for run in self._runs.live.values() if run.session_id == session_id]
        for run in runs:
            run.ended = Gone(SESSION_ENDED)
            run.lane.stop()
            self._runs.live.pop(run.run_id, None)
            for pending in run.pending.values():
                pending.future.fail(run.ended)
            self._background.start(self._runs.drop(run))

    async def close(self) -> None:
        """Wait for what the workers have answered to be written down."""
        for run in self._runs.live.values():
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


def _filled(datum: Datum, loss: LossSpec) -> Datum:
    """The datum as the engine wants it: floats in float32, absent weights as ones."""
    inputs = {
        name: values.astype(np.int64 if name == "target_tokens" else np.float32)
        for name, values in datum.inputs.items()
    }
    if loss.name == "cross_entropy" and "weights" not in inputs:
        inputs["weights"] = np.ones(inputs["target_tokens"].shape, np.float32)
    return Datum(datum.tokens_N, inputs)
