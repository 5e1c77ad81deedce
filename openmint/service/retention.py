"""Keeps of each policy as many revisions as it wants, some policies at a time.

Lives on the event loop; what reads and writes much runs in threads.
"""

from __future__ import annotations

import asyncio

import structlog

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Keep, RetentionPlan
from openmint.types import Tenant

log = structlog.get_logger(__name__)

POLICIES_PER_TURN = 1000


class Retention:
    """Looks at the policies in turns, all of them again and again."""

    def __init__(self, catalog: Catalog, keep: Keep) -> None:
        self._catalog, self._keep = catalog, keep
        self._after = 0

    def plan(self, tenant: Tenant, policy: str) -> RetentionPlan:
        """Changes nothing. Raises NotFound."""
        surplus = self._catalog.surplus_revisions(tenant, policy, self._keep)
        return RetentionPlan(self._catalog.policy(tenant, policy), self._keep, tuple(surplus))

    async def set(
        self, tenant: Tenant, policy: str, keep_revisions: int | None, *, actor: str
    ) -> RetentionPlan:
        """What the policy keeps from now on, durable on return. Raises NotFound."""
        await asyncio.to_thread(
            self._catalog.set_retention, tenant, policy, keep_revisions, actor=actor
        )
        return await asyncio.to_thread(self.plan, tenant, policy)

    async def apply(self) -> None:
        """Delete what is surplus in the policies whose turn it is."""
        after, num_deleted = await asyncio.to_thread(
            self._catalog.delete_surplus, self._keep, after=self._after, limit=POLICIES_PER_TURN
        )
        self._after = after or 0
        if num_deleted:
            log.info("revisions_retired", number=num_deleted)
