"""Checks each published revision a moment after: does its slot answer as its stored bytes train?

A probe asks the log-probabilities of a few fixed tokens of the slot that serves the revision, of
its bytes read back from the store and run as the trainer does, and of the bare base. Slot and bytes
must agree; slot and base must differ, unless the adapter does nothing yet (B = 0). Both distances
are kept with the revision. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import structlog

from openmint.catalog.catalog import Catalog
from openmint.cluster.worker_client import WorkerClient
from openmint.errors import NotFound, OpenMintError
from openmint.scheduler.work import SampleResult, SampleWork, Scored, ScoreWork
from openmint.service.meter import OURS
from openmint.service.workers import Workers
from openmint.types import BaseInfo, Digest, FloatArray, IntArray, SamplingParams, Tenant

log = structlog.get_logger(__name__)

DELAY_SECONDS = 2.0
"""A new revision's first samples go first."""
NUM_TOKENS = 24
QUEUE = 64
"""Publishes that wait for their probe; beyond it the oldest goes without."""


class AlarmCounter(Protocol):
    """Counts revisions whose probe failed; `cli/gateway.py` joins the metrics to it."""

    def observe_probe(self, base: str, outcome: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Published:
    tenant: Tenant
    policy: str
    base: Digest
    revision: Digest


@dataclass(frozen=True, slots=True)
class Probe:
    """Distances in nats, the largest over the tokens."""

    drift: float
    """Between the slot and the stored bytes under the trainer's arithmetic."""
    difference: float
    """Between the slot and the base."""
    is_zero: bool
    """The adapter does nothing: its B is zero."""

    def failure(self, drift_alarm: float) -> str | None:
        """What is wrong with the revision's slot, in one word for a metric."""
        if not self.drift <= drift_alarm:  # also a NaN
            return "drift"
        if self.is_zero and self.difference > drift_alarm:
            return "changes_base"
        if not self.is_zero and self.difference == 0.0:
            return "equals_base"
        return None


class Probes:
    """Probes published revisions, one after the other, each digest of a policy once."""

    def __init__(self, catalog: Catalog, workers: Workers, drift_alarm: float) -> None:
        self._catalog, self._workers, self._drift_alarm = catalog, workers, drift_alarm
        self._queue: asyncio.Queue[Published] = asyncio.Queue()
        self.counter: AlarmCounter | None = None

    def after_publish(self, published: Published) -> None:
        if self._queue.qsize() >= QUEUE:
            self._queue.get_nowait()
        self._queue.put_nowait(published)

    async def keep(self) -> None:
        """Probe what is published, for ever."""
        while True:
            published = await self._queue.get()
            await asyncio.sleep(DELAY_SECONDS)
            try:
                await self.probe(published)
            except NotFound:
                pass  # it is deleted already
            except OpenMintError as error:
                log.warning("probe_skipped", revision=published.revision, error=error.message)
            except Exception as error:  # a task's edge: the next one wants its probe
                log.error("probe_failed", revision=published.revision, exc_info=error)

    async def probe(self, published: Published) -> Probe | None:
        """Probe a revision and keep what came of it; None when that was done before."""
        tenant, policy, digest = published.tenant, published.policy, published.revision
        if self._catalog.revision(tenant, policy, digest).drift is not None:
            return None
        client = self._workers.by_digest(published.base)
        found = await _compare(client, digest)
        await asyncio.to_thread(
            self._catalog.note_probe, tenant, policy, digest, found.drift, found.difference
        )
        failure = found.failure(self._drift_alarm)
        if failure is not None:
            name = f"{tenant}/{policy}"
            log.error("probe_alarm", policy=name, revision=digest, failure=failure, found=found)
        if self.counter is not None:
            self.counter.observe_probe(client.base.name, failure or "ok")
        return found


async def _compare(client: WorkerClient, digest: Digest) -> Probe:
    tokens_T = probe_tokens(client.base)
    slot_T, base_T, scored = await asyncio.gather(
        _sampled(client, digest, tokens_T),
        _sampled(client, None, tokens_T),
        client.call(ScoreWork(OURS, digest, tokens_T)),
    )
    assert isinstance(scored, Scored)
    return Probe(
        drift=float(np.abs(slot_T - scored.logprobs_T).max()),
        difference=float(np.abs(slot_T - base_T).max()),
        is_zero=scored.is_zero,
    )


async def _sampled(client: WorkerClient, revision: Digest | None, tokens_T: IntArray) -> FloatArray:
    """Log-probabilities of the tokens after the first, from the path that serves."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    result = await client.call(SampleWork(OURS, revision, tokens_T, params, prompt_logprobs=True))
    assert isinstance(result, SampleResult)
    assert result.prompt_logprobs_T is not None
    return result.prompt_logprobs_T[1:]


def probe_tokens(base: BaseInfo) -> IntArray:
    """The same tokens for every revision of a base."""
    num_tokens = min(NUM_TOKENS, base.context_length - 1)
    return np.random.default_rng(0).integers(0, base.vocab_size, num_tokens)
