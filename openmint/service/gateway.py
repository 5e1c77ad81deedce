"""Everything that a route may reach, joined once by `cli/gateway.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Keep, Quota
from openmint.config import ServiceConfig, Settings
from openmint.errors import OpenMintError
from openmint.service.adapters import Adapters
from openmint.service.checkpoints import Checkpoints
from openmint.service.collector import Collector
from openmint.service.completions import Completions
from openmint.service.evaluations import Evaluations
from openmint.service.futures import Futures
from openmint.service.limits import Limits
from openmint.service.meter import Meter
from openmint.service.pinning import Pinning
from openmint.service.prewarming import Prewarming
from openmint.service.probes import Probes
from openmint.service.promotion import Promotion
from openmint.service.recovery import Recovery
from openmint.service.replaying import Replaying
from openmint.service.retention import Retention
from openmint.service.route_records import RouteRecords
from openmint.service.runs import Runs
from openmint.service.sampling import Sampling
from openmint.service.schedules import Schedules
from openmint.service.sessions import Sessions
from openmint.service.snapshots import Snapshots
from openmint.service.targets import Targets
from openmint.service.tokenizers import TokenizerCache
from openmint.service.training import Training
from openmint.service.watching import Watching
from openmint.service.workers import Workers
from openmint.store.blobs import BlobStore

log = structlog.get_logger(__name__)

SWEEP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Gateway:
    """The control plane of one process; lives on one event loop."""

    settings: Settings
    catalog: Catalog
    store: BlobStore
    collector: Collector
    workers: Workers
    futures: Futures
    sessions: Sessions
    training: Training
    recovery: Recovery
    sampling: Sampling
    checkpoints: Checkpoints
    targets: Targets
    completions: Completions
    promotion: Promotion
    prewarming: Prewarming
    pinning: Pinning
    watching: Watching
    adapters: Adapters
    evaluations: Evaluations
    schedules: Schedules
    snapshots: Snapshots
    probes: Probes
    limits: Limits
    meter: Meter
    retention: Retention
    route_records: RouteRecords

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sweep until the exit."""
        await self.pinning.apply()
        self.evaluations.fail_abandoned()
        keepers = [
            asyncio.create_task(self._sweep_forever(), name="sweeper"),
            asyncio.create_task(self.snapshots.keep(), name="snapshots"),
            asyncio.create_task(self.probes.keep(), name="probes"),
        ]
        try:
            yield
        finally:
            await self.evaluations.close()
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            await self.meter.flush()

    async def sweep(self) -> None:
        """Forget old results, bring records up to date, close and delete what is over."""
        now = time.monotonic()
        await self.pinning.apply()
        await self.training.forget(self.futures.sweep(now))
        await self.training.keep_records()
        await self.meter.flush()
        await self.watching.flush()
        await self.schedules.start_due()
        await self.sessions.keep_time(now)
        await self.checkpoints.expire()
        await self.retention.apply()
        await self.collector.collect()

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await self.sweep()
            except OpenMintError as error:
                log.warning("sweep_failed", error=error.message)
            except Exception as error:
                log.error("sweep_failed", exc_info=error)


def default_quota(config: ServiceConfig) -> Quota:
    """Of a tenant that has none of its own."""
    return Quota(
        config.tenant_requests_per_minute or None,
        config.tenant_tokens_per_minute or None,
        config.tenant_resident_adapters or None,
        config.tenant_stored_bytes or None,
    )


def build_gateway(
    settings: Settings, catalog: Catalog, store: BlobStore, workers: Workers
) -> Gateway:
    """The control plane over these parts, with what an earlier process left in the catalogue.

    `running` must surround its use.
    """
    service = settings.service
    futures = Futures(service.future_ttl_seconds)
    sessions = Sessions(catalog, service.session_timeout_seconds)
    limits = Limits(catalog, default_quota(service))
    meter = Meter(catalog, limits)
    route_records = RouteRecords(service.route_record_bytes)
    replaying = Replaying(service, route_records)
    runs = Runs(catalog, workers, futures, service.seq_gap_seconds)
    recovery = Recovery(catalog, workers, futures, sessions, runs)
    training = Training(catalog, workers, futures, sessions, runs, limits, meter, replaying)
    pinning = Pinning(catalog, workers, limits, settings)
    limits.count_resident_by(
        lambda t: (training.num_runs(t), workers.sampled_revisions(t) | pinning.revisions(t))
    )
    sampling = Sampling(
        catalog, workers, futures, sessions, limits, records_routes=service.replay != "off"
    )
    collector = Collector(catalog, store, service.grace_seconds)
    probes = Probes(catalog, workers, service.drift_alarm)
    checkpoints = Checkpoints(
        catalog,
        store,
        workers,
        sessions,
        runs,
        training,
        sampling,
        collector,
        probes,
        limits,
        meter,
    )
    targets = Targets(catalog, workers, sampling)
    prewarming = Prewarming(targets, pinning)
    watching = Watching(catalog, prewarming)
    completions = Completions(targets, TokenizerCache(), limits, watching)
    evaluations = Evaluations(catalog, completions, prewarming)
    recovery.restore()
    return Gateway(
        settings,
        catalog,
        store,
        collector,
        workers,
        futures,
        sessions,
        training,
        recovery,
        sampling,
        checkpoints,
        targets,
        completions,
        Promotion(catalog, prewarming),
        prewarming,
        pinning,
        watching,
        Adapters(catalog, store, workers, collector, probes, limits),
        evaluations,
        Schedules(catalog, evaluations),
        Snapshots(catalog, workers, runs, collector, service),
        probes,
        limits,
        meter,
        Retention(catalog, Keep(service.keep_revisions, service.keep_rollbacks)),
        route_records,
    )
