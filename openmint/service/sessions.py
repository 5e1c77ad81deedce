"""Client sessions: opened by a client, kept alive by its heartbeat and requests, closed once.

Closing frees what the session holds in the workers. Lives on the event loop; the record is in the
catalogue, so that a session outlives a restart of the gateway.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import structlog

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import AuditEvent, Session
from openmint.errors import Gone, NotFound
from openmint.types import SessionId, Tenant

log = structlog.get_logger(__name__)

IDS_PER_WRITE = 1000
RETURN_SECONDS = 60.0
"""How long clients may take to come back after a restart before silent sessions are closed."""

CloseHook = Callable[[Tenant, SessionId], Awaitable[None]]


@dataclass(slots=True)
class LiveSession:
    tenant: Tenant
    seen_at_seconds: float


class Sessions:
    """Opens, touches and closes sessions."""

    def __init__(self, catalog: Catalog, timeout_seconds: float) -> None:
        self._catalog = catalog
        self._timeout_seconds = timeout_seconds
        self._live: dict[SessionId, LiveSession] = {}
        self._close_hooks: list[CloseHook] = []
        self._unreleased: list[tuple[CloseHook, Tenant, SessionId]] = []
        self._started_at = self._kept_at = time.monotonic()

    def on_close(self, hook: CloseHook) -> None:
        """Have `hook` free what a closed session held."""
        self._close_hooks.append(hook)

    async def create(
        self,
        tenant: Tenant,
        retry_key: str | None,
        *,
        user_metadata: Mapping[str, str],
        display_name: str | None,
        project_id: str | None,
        tags: tuple[str, ...],
        sdk_version: str | None = None,
    ) -> SessionId:
        """A new session's id; the same one again for the same `retry_key`, also after a restart.

        Durable on return.
        """
        session_id = _session_id(tenant, retry_key or secrets.token_hex(16))
        await asyncio.to_thread(
            self._catalog.add_session,
            tenant,
            session_id,
            user_metadata=user_metadata,
            display_name=display_name,
            project_id=project_id,
            tags=tags,
            sdk_version=sdk_version,
        )
        self._live[session_id] = LiveSession(tenant, time.monotonic())
        return session_id

    def touch(self, tenant: Tenant, session_id: SessionId) -> None:
        """Count the session as alive. Raises NotFound, or Gone once it is closed."""
        live = self._live.get(session_id)
        if live is None:
            record = self._catalog.session(tenant, session_id)
            if record.finished_at is not None:
                raise Gone(f"session {session_id} has ended; open a new one")
            live = self._live[session_id] = LiveSession(tenant, 0.0)
        if live.tenant != tenant:
            raise NotFound(f"no session {session_id!r}")
        live.seen_at_seconds = time.monotonic()

    def record(self, tenant: Tenant, session_id: SessionId) -> Session:
        """The session's record. Raises NotFound."""
        return self._catalog.session(tenant, session_id)

    async def finish(
        self, tenant: Tenant, session_id: SessionId, reason: str, detail: str | None = None
    ) -> None:
        """Close the session and free what it holds; once closed it stays so, and this is a no-op.

        Raises NotFound. What can't be freed now is tried again by `keep_time`.
        """
        if self._catalog.session(tenant, session_id).finished_at is not None:
            return
        await asyncio.to_thread(
            self._catalog.finish_session, tenant, session_id, reason=reason, detail=detail
        )
        await self._release(tenant, session_id, reason)

    async def _release(self, tenant: Tenant, session_id: SessionId, reason: str) -> None:
        self._live.pop(session_id, None)
        for hook in self._close_hooks:
            await self._run_hook(hook, tenant, session_id)
        log.info("session_finished", session=session_id, tenant=tenant, reason=reason)

    async def _run_hook(self, hook: CloseHook, tenant: Tenant, session_id: SessionId) -> None:
        """Run one hook; a failure is logged and kept for the next sweep, so that others run."""
        try:
            await hook(tenant, session_id)
        except Exception as error:
            self._unreleased.append((hook, tenant, session_id))
            log.error("session_release_failed", session=session_id, tenant=tenant, exc_info=error)

    async def keep_time(self, now_seconds: float) -> None:
        """Write down who was heard of, and close every session that was silent for too long.

        It also closes what an earlier process left open, once clients had time to come back, and
        tries again to free what closed sessions still hold.
        """
        unreleased, self._unreleased = self._unreleased, []
        for hook, tenant, session_id in unreleased:
            await self._run_hook(hook, tenant, session_id)
        heard = [s for s, live in self._live.items() if live.seen_at_seconds >= self._kept_at]
        self._kept_at = now_seconds
        for start in range(0, len(heard), IDS_PER_WRITE):
            part = heard[start : start + IDS_PER_WRITE]
            await asyncio.to_thread(self._catalog.touch_sessions, part)
        if now_seconds < self._started_at + min(self._timeout_seconds, RETURN_SECONDS):
            return
        seen_before = datetime.now(UTC) - timedelta(seconds=self._timeout_seconds)
        for tenant, session_id in await asyncio.to_thread(self._catalog.expire_idle, seen_before):
            await self._release(tenant, session_id, "no heartbeat")

    async def move(self, tenant: Tenant, session_id: SessionId, project_id: str) -> None:
        """Label the session with a project. Raises NotFound."""
        await asyncio.to_thread(self._catalog.set_session_project, tenant, session_id, project_id)

    def audit(self, tenant: Tenant, day: date | None) -> list[AuditEvent]:
        """The tenant's audit events of one UTC day, oldest first."""
        day = day or datetime.now(UTC).date()
        start = datetime.combine(day, datetime.min.time(), UTC)
        # No time comes after the last day that a date can name.
        until = None if day == date.max else start + timedelta(days=1)
        return self._catalog.audit(tenant, limit=1000, since=start, until=until)[::-1]


def _session_id(tenant: Tenant, retry_key: str) -> SessionId:
    """The id of the session that this call of the tenant opens, however often it is sent."""
    return SessionId(hashlib.sha256(f"{tenant}\0{retry_key}".encode()).hexdigest()[:24])
