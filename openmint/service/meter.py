"""What tenants use: tokens, saves and engine seconds, hour by hour. Lives on the event loop.

Counted when a result is there, and written every few seconds: a crash forgets the last of them, a
repeated request adds nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import UsageHour
from openmint.scheduler.work import SampleResult, SampleWork
from openmint.service.limits import Limits
from openmint.types import Tenant

Key = tuple[Tenant, str, datetime]
"""Who used which base in which hour."""
OURS = Tenant("")
"""Whom our own probes work for; nobody pays for them."""


class Meter:
    """Adds up, until it is flushed."""

    def __init__(self, catalog: Catalog, limits: Limits) -> None:
        self._catalog, self._limits = catalog, limits
        self._hours: dict[Key, dict[str, float]] = {}

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
        if tenant != OURS:
            hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
            self._add_to((tenant, base, hour), counts)

    def _add_to(self, key: Key, counts: Mapping[str, float]) -> None:
        sums = self._hours.setdefault(key, {})
        for name, more in counts.items():
            sums[name] = sums.get(name, 0) + more

    async def flush(self) -> None:
        """Write what was added; kept for the next time when the catalogue can't be written."""
        hours, self._hours = self._hours, {}
        if not hours:
            return
        rows = [UsageHour(*key, **counts) for key, counts in hours.items()]  # type: ignore[arg-type]
        try:
            await asyncio.to_thread(self._catalog.add_usage, rows)
        except BaseException:
            for key, counts in hours.items():
                self._add_to(key, counts)
            raise
