"""What each tenant may ask for: requests and tokens per minute, adapters at one time, stored bytes.

A refusal is LimitReached, 429 with the time after which it is worth asking again. Requests are
counted before they run, tokens when they are used: a tenant over its tokens waits until what it
used is paid back by the minutes. Lives on the event loop; counts start anew with the process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Quota
from openmint.errors import LimitReached
from openmint.types import Digest, Tenant

STORE_RETRY_SECONDS, ADAPTER_RETRY_SECONDS = 60.0, 5.0


Resident = Callable[[Tenant], tuple[int, set[Digest]]]
"""A tenant's live training runs, and the revisions that it samples from or has pinned."""


@dataclass(slots=True)
class Bucket:
    """Holds at most a minute's worth, fills steadily, and may be overdrawn."""

    per_minute: int
    level: float
    filled_at_seconds: float

    def seconds_until(self, level: float, now_seconds: float) -> float:
        """How long until it holds so much; 0 when it does."""
        grown = (now_seconds - self.filled_at_seconds) * self.per_minute / 60.0
        self.level = min(float(self.per_minute), self.level + grown)
        self.filled_at_seconds = now_seconds
        return max(0.0, (level - self.level) * 60.0 / self.per_minute)


class Limits:
    """The quotas of all tenants, and what is left of them."""

    def __init__(self, catalog: Catalog, default: Quota) -> None:
        self._catalog, self._default = catalog, default
        self._resident: Resident = lambda tenant: (0, set())
        self._own = catalog.quotas()
        self._buckets: dict[tuple[Tenant, str], Bucket] = {}

    def count_resident_by(self, resident: Resident) -> None:
        """Have `resident` say what a tenant has resident."""
        self._resident = resident

    def quota(self, tenant: Tenant) -> Quota:
        """The tenant's own, or the default."""
        return self._own.get(tenant, self._default)

    async def set_quota(self, tenant: Tenant, quota: Quota | None, *, actor: str) -> None:
        """Holds from the next request on; durable on return."""
        await asyncio.to_thread(self._catalog.set_quota, tenant, quota, actor=actor)
        self._own = self._catalog.quotas()
        for what in ("requests", "tokens"):
            self._buckets.pop((tenant, what), None)

    def take_request(self, tenant: Tenant) -> None:
        """Count a request. Raises LimitReached."""
        self._check(tenant, "requests", self.quota(tenant).requests_per_minute, take=1)

    def check_tokens(self, tenant: Tenant) -> None:
        """Raises LimitReached for a tenant that has used up its tokens."""
        self._check(tenant, "tokens", self.quota(tenant).tokens_per_minute, take=0)

    def charge_tokens(self, tenant: Tenant, num_tokens: int) -> None:
        """Count tokens that were used."""
        if per_minute := self.quota(tenant).tokens_per_minute:
            now = time.monotonic()
            bucket = self._bucket(tenant, "tokens", per_minute, now)
            bucket.seconds_until(0.0, now)
            bucket.level -= num_tokens

    def check_run(self, tenant: Tenant) -> None:
        """Raises LimitReached unless the tenant may have one more live run."""
        num_runs, sampled = self._resident(tenant)
        self._check_adapters(tenant, num_runs + 1, len(sampled))

    def check_sample(self, tenant: Tenant, revision: Digest | None) -> None:
        """Raises LimitReached unless the tenant may sample from the revision now."""
        self.check_tokens(tenant)
        num_runs, sampled = self._resident(tenant)
        if revision is not None and revision not in sampled:
            self._check_adapters(tenant, num_runs, len(sampled) + 1)

    def check_pin(self, tenant: Tenant, revisions: set[Digest]) -> None:
        """Raises LimitReached unless the tenant may have these resident too."""
        num_runs, sampled = self._resident(tenant)
        self._check_adapters(tenant, num_runs, len(sampled | revisions))

    def _check_adapters(self, tenant: Tenant, num_runs: int, num_sampled: int) -> None:
        most = self.quota(tenant).resident_adapters
        if most is not None and num_runs + num_sampled > most:
            raise LimitReached(
                f"tenant {tenant!r} may have {most} adapters resident; with this it would have "
                f"{num_runs} live training runs and {num_sampled} sampled or pinned revisions. End "
                "a session, unpin an alias, or wait for samples to finish",
                ADAPTER_RETRY_SECONDS,
            )

    def check_stored(self, tenant: Tenant) -> None:
        """Raises LimitReached for a tenant whose checkpoints and revisions fill its room."""
        most = self.quota(tenant).stored_bytes
        if most is not None and (used := self._catalog.stored_bytes(tenant)) >= most:
            raise LimitReached(
                f"tenant {tenant!r} stores {used} of {most} bytes; delete checkpoints or "
                "revisions, or give them a time to live",
                STORE_RETRY_SECONDS,
            )

    def _bucket(self, tenant: Tenant, what: str, per_minute: int, now_seconds: float) -> Bucket:
        full = Bucket(per_minute, float(per_minute), now_seconds)
        return self._buckets.setdefault((tenant, what), full)

    def _check(self, tenant: Tenant, what: str, per_minute: int | None, take: int) -> None:
        if not per_minute:
            return
        now = time.monotonic()
        bucket = self._bucket(tenant, what, per_minute, now)
        # Tokens are counted afterwards, so something above zero is enough to begin.
        wait_seconds = bucket.seconds_until(take or 1e-9, now)
        if wait_seconds > 0:
            raise LimitReached(
                f"tenant {tenant!r} may use {per_minute} {what} a minute; "
                f"ask again in {wait_seconds:.1f} s",
                wait_seconds,
            )
        bucket.level -= take
