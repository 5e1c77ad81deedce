"""What tenants use: tokens, saves and engine seconds, hour by hour. Lives on the event loop.

Counted when a result is there, and written every few seconds: a crash forgets the last of them, a
repeated request adds nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import UsageHour
from openmint.scheduler.work import SampleResult, SampleWork
from openmint.service.limits import Limits
from openmint.types import Tenant

OURS = Tenant("")
"""Whom our own probes work for; nobody pays for them."""


class Meter:
    """Adds up, until it is flushed."""

    def __init__(self, catalog: Catalog, limits: Limits) -> None:
        self._catalog, self._limits = catalog, limits
        self._hours: dict[tuple[Tenant, str, datetime], UsageHour] = {}

    def trained(self, tenant: Tenant, base: str, num_tokens: int) -> None:
        """A pass over so many tokens has its result."""
        self._limits.charge_tokens(tenant, num_tokens)
        self._add(tenant, base, trained_tokens=num_tokens)

    def sampled(self, base: str, work: SampleWork, result: SampleResult) -> None:
        """A sample has its result."""
        cached = result.num_cached_tokens
        prompt = len(work.prompt_T) - cached
        drawn = sum(len(sequence.tokens_N) for sequence in result.sequences)
        self._limits.charge_tokens(work.tenant, prompt + drawn)
        self._add(
            work.tenant, base, prompt_tokens=prompt, cached_tokens=cached, sampled_tokens=drawn
        )

    def saved(self, tenant: Tenant, base: str) -> None:
        """A checkpoint was made."""
        self._add(tenant, base, checkpoints=1)

    def spent(self, base: str, seconds: Mapping[Tenant, float]) -> None:
        """The engine computed so long for each tenant."""
        for tenant, more in seconds.items():
            self._add(tenant, base, engine_seconds=more)

    def _add(self, tenant: Tenant, base: str, **counts: float) -> None:
        if tenant == OURS:
            return
        hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        key = (tenant, base, hour)
        known = self._hours.get(key) or UsageHour(tenant, base, hour)
        sums = {name: getattr(known, name) + more for name, more in counts.items()}
        self._hours[key] = replace(known, **sums)

    async def flush(self) -> None:
        """Write what was added; kept for the next time when the catalogue can't be written."""
        hours, self._hours = self._hours, {}
        if not hours:
            return
        try:
            await asyncio.to_thread(self._catalog.add_usage, list(hours.values()))
        except BaseException:
            for (tenant, base, hour), lost in hours.items():
                known = self._hours.get((tenant, base, hour)) or UsageHour(tenant, base, hour)
                self._hours[tenant, base, hour] = _sum(known, lost)
            raise


def _sum(one: UsageHour, other: UsageHour) -> UsageHour:
    return replace(
        one,
        trained_tokens=one.trained_tokens + other.trained_tokens,
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        cached_tokens=one.cached_tokens + other.cached_tokens,
        sampled_tokens=one.sampled_tokens + other.sampled_tokens,
        checkpoints=one.checkpoints + other.checkpoints,
        engine_seconds=one.engine_seconds + other.engine_seconds,
    )
