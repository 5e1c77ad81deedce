"""What each tenant may use, and what it has used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any

from sqlalchemy import delete, select

from openmint.catalog import tables as t
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database, insert_into
from openmint.catalog.records import Quota, UsageHour
from openmint.catalog.rows import MAX_LIST, USAGE_HOURS, many
from openmint.types import Tenant

COUNTS = tuple(f.name for f in fields(UsageHour) if f.name not in ("tenant", "base_name", "hour"))


class TenantRecords:
    """Quotas and usage of every tenant."""

    _database: Database

    def quotas(self) -> dict[Tenant, Quota]:
        """Of the tenants that have one of their own."""
        columns = [t.quota.c[f.name] for f in fields(Quota)]
        with self._database.read() as connection:
            rows = connection.execute(select(t.quota.c.tenant, *columns)).mappings()
            return {
                Tenant(row["tenant"]): Quota(**{c.name: row[c.name] for c in columns})
                for row in rows
            }

    def set_quota(self, tenant: Tenant, quota: Quota | None, *, actor: str) -> None:
        """Give the tenant a quota of its own, or with None the default again."""
        with self._database.write() as connection:
            connection.execute(delete(t.quota).where(t.quota.c.tenant == tenant))
            if quota is not None:
                connection.execute(t.quota.insert().values(tenant=tenant, **asdict(quota)))
            details = {} if quota is None else asdict(quota)
            note_event(connection, tenant, actor, "quota.set", tenant, details)

    def stored_bytes(self, tenant: Tenant) -> int:
        """Of the distinct bytes that the tenant's checkpoints and revisions name."""
        query = select(t.stored.c.num_bytes).where(t.stored.c.tenant == tenant)
        with self._database.read() as connection:
            return int(connection.execute(query).scalar() or 0)

    def add_usage(self, hours: Sequence[UsageHour]) -> None:
        """Add to what is there for the same tenant, base and hour."""
        key = [t.usage.c.tenant, t.usage.c.base_name, t.usage.c.hour]
        with self._database.write() as connection:
            statement = insert_into(connection, t.usage)
            sums = {name: t.usage.c[name] + statement.excluded[name] for name in COUNTS}
            statement = statement.on_conflict_do_update(index_elements=key, set_=sums)
            connection.execute(statement, [asdict(hour) for hour in hours])

    def usage(
        self, tenant: Tenant | None, *, since: datetime, until: datetime, limit: int = MAX_LIST
    ) -> list[UsageHour]:
        """Hour by hour, oldest first; of every tenant for None."""
        hour: Any = t.usage.c.hour
        query = USAGE_HOURS.where(hour >= since, hour < until)
        if tenant is not None:
            query = query.where(t.usage.c.tenant == tenant)
        query = query.order_by(hour, t.usage.c.tenant, t.usage.c.base_name).limit(limit)
        with self._database.read() as connection:
            return many(connection, UsageHour, query)
