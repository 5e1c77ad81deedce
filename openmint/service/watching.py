"""Watches at work: observations come in, and a revision that fails one loses its traffic.

A failing canary is aborted, a failing revision of an alias is rolled back, by the same transactions
that people use. Lives on the event loop; writes run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol

import structlog

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Alias, Observation, Watch, WatchFinding
from openmint.catalog.watches import wanted_of
from openmint.errors import Conflict, InvalidRequest, NotFound
from openmint.service.prewarming import Prewarming
from openmint.types import Digest, Tenant

log = structlog.get_logger(__name__)

OWN_PREFIX = "service."
FAILED = "service.failed"
"""Our own metric of completions: 1 where the engine gave no answer, 0 where it did."""


class WatchCounter(Protocol):
    """Counts what watches did; `cli/gateway.py` joins the metrics to it."""

    def observe_watch(self, action: str) -> None: ...


class Watching:
    """The watches of this gateway."""

    def __init__(self, catalog: Catalog, prewarming: Prewarming) -> None:
        self._catalog, self._prewarming = catalog, prewarming
        self._watched = catalog.watched_policies(FAILED)
        self._own: dict[tuple[Tenant, str, Digest], tuple[int, int]] = {}
        """Completions and failures that aren't written yet."""
        self.counter: WatchCounter | None = None

    async def add(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        metric: str,
        *,
        at_least: float | None,
        at_most: float | None,
        confidence: float,
        min_observations: int,
        window_seconds: int,
        actor: str,
    ) -> Watch:
        """A watch on an alias. Raises NotFound, InvalidRequest, Conflict."""
        if metric.startswith(OWN_PREFIX) and metric != FAILED:
            raise InvalidRequest(f"the service's own metric is {FAILED!r}; name another")
        added = await asyncio.to_thread(
            self._catalog.add_watch,
            tenant,
            policy,
            alias,
            metric,
            at_least=at_least,
            at_most=at_most,
            confidence=confidence,
            min_observations=min_observations,
            window_seconds=window_seconds,
            actor=actor,
        )
        self._watched = self._catalog.watched_policies(FAILED)
        return added

    async def remove(
        self, tenant: Tenant, policy: str, alias: str, watch_id: int, *, actor: str
    ) -> None:
        """Raises NotFound."""
        await asyncio.to_thread(
            self._catalog.remove_watch, tenant, policy, alias, watch_id, actor=actor
        )
        self._watched = self._catalog.watched_policies(FAILED)

    async def observe(self, tenant: Tenant, observations: Sequence[Observation]) -> int:
        """How many of the values counted; what they decide is done on return.

        A retry counts them again. Raises NotFound for a policy or a metric that nobody watches,
        InvalidRequest for a metric of the service's own.
        """
        for each in observations:
            if each.metric.startswith(OWN_PREFIX):
                raise InvalidRequest(f"{each.metric!r} is observed by the service itself")
        return await self._add(tenant, observations)

    def note_answer(self, tenant: Tenant, policy: str, digest: Digest, *, failed: bool) -> None:
        """A completion by an alias of the policy ended; counted where somebody watches for it."""
        if (tenant, policy) in self._watched:
            key = (tenant, policy, digest)
            num, num_failed = self._own.get(key, (0, 0))
            self._own[key] = num + 1, num_failed + failed

    async def flush(self) -> None:
        """Count what completions showed, and act on it."""
        own, self._own = self._own, {}
        for (tenant, policy, digest), (num, num_failed) in own.items():
            observation = Observation(policy, digest, FAILED, num, float(num_failed))
            with contextlib.suppress(NotFound):  # nobody watches any more
                await self._add(tenant, [observation])

    async def _add(self, tenant: Tenant, observations: Sequence[Observation]) -> int:
        num_counted = await asyncio.to_thread(
            self._catalog.add_observations, tenant, observations, datetime.now(UTC)
        )
        for policy in sorted({each.policy for each in observations}):
            await self._judge(tenant, policy)
        return num_counted

    async def _judge(self, tenant: Tenant, policy: str) -> None:
        """Act on the first watch that fails; the others are judged anew afterwards."""
        for finding in await asyncio.to_thread(self._catalog.judge, tenant, policy):
            if finding.failed:
                await self._withdraw(tenant, policy, finding)
                return

    async def _withdraw(self, tenant: Tenant, policy: str, finding: WatchFinding) -> None:
        name = f"{tenant}/{policy}@{finding.watch.alias}"
        reason = reason_of(finding)
        try:
            alias = await asyncio.to_thread(self._take_traffic, tenant, policy, finding, reason)
        except Conflict as error:  # it has changed meanwhile, or there is nothing to go back to
            log.warning("watch_failed", alias=name, reason=reason, not_done=error.message)
            self._count("nothing")
            return
        action = "canary_abort" if finding.is_canary else "rollback"
        log.warning("watch_failed", alias=name, reason=reason, action=action, now=alias.digest)
        self._count(action)
        self._prewarming.after_move(tenant, policy, alias.digest)

    def _take_traffic(
        self, tenant: Tenant, policy: str, finding: WatchFinding, reason: str
    ) -> Alias:
        watch, version = finding.watch, finding.alias_version
        actor = f"watch:{watch.watch_id}"
        if finding.is_canary:
            return self._catalog.abort_canary(
                tenant, policy, watch.alias, actor=actor, reason=reason, expected_version=version
            )
        if self._catalog.alias(tenant, policy, watch.alias).canary_digest is not None:
            ended = self._catalog.abort_canary(
                tenant, policy, watch.alias, actor=actor, reason=reason, expected_version=version
            )
            version = ended.version
        return self._catalog.rollback(
            tenant, policy, watch.alias, actor=actor, reason=reason, expected_version=version
        )

    def _count(self, action: str) -> None:
        if self.counter is not None:
            self.counter.observe_watch(action)


def reason_of(finding: WatchFinding) -> str:
    """What the watch wanted and what was observed, for history, audit and log."""
    confidence = f"{100 * finding.watch.confidence:g} %"
    return (
        f"watch {finding.watch.watch_id} wants {wanted_of(finding.watch)}: {finding.mean:.4g} in "
        f"{finding.num} observations of {finding.digest[:19]}, between {finding.low:.4g} and "
        f"{finding.high:.4g} with {confidence} confidence"
    )
