"""The audit trail: who changed what. Rows are only ever added."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from openmint.catalog import tables as t
from openmint.catalog.database import Database, now
from openmint.catalog.records import AuditEvent
from openmint.catalog.rows import AUDIT_EVENTS, MAX_LIST, many
from openmint.types import Tenant


def note_event(
    connection: Connection,
    tenant: Tenant,
    actor: str,
    action: str,
    subject: str,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write an event in the transaction of the change that it tells of."""
    connection.execute(
        t.audit_event.insert().values(
            tenant=tenant,
            actor=actor,
            action=action,
            subject=subject,
            details=dict(details or {}),
            created_at=now(),
        )
    )


class AuditRecords:
    """The audit events of every tenant."""

    _database: Database

    def add_audit(
        self,
        tenant: Tenant,
        actor: str,
        action: str,
        subject: str,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Record an act that changed nothing else in the catalogue."""
        with self._database.write() as connection:
            note_event(connection, tenant, actor, action, subject, details)

    def audit(
        self,
        tenant: Tenant,
        *,
        limit: int = 100,
        before_id: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[AuditEvent]:
        """The tenant's events, newest first; `before_id` continues after a page's last."""
        event = t.audit_event.c
        query = AUDIT_EVENTS.where(event.tenant == tenant).order_by(event.event_id.desc())
        if before_id is not None:
            query = query.where(event.event_id < before_id)
        if since is not None:
            query = query.where(event.created_at >= since)
        if until is not None:
            query = query.where(event.created_at < until)
        with self._database.read() as connection:
            return many(connection, AuditEvent, query.limit(min(limit, MAX_LIST)))
