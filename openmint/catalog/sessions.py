"""Client sessions: who opened them, until when they were heard of, how they ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, and_, false, or_, select, tuple_, update

from openmint.catalog import tables as t
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database, now
from openmint.catalog.records import Session, SessionStatus
from openmint.catalog.requests import drop_requests
from openmint.catalog.rows import MAX_LIST, SESSIONS, many, metadata, one
from openmint.errors import Conflict, InvalidRequest, NotFound
from openmint.types import SessionId, Tenant

MAX_NAME_WORDS = 32
"""Words of a name that one search may ask for; each is a condition of its own."""


def find_session(connection: Connection, tenant: Tenant, session_id: SessionId) -> Session:
    """Raises NotFound, for another tenant's too."""
    owned = (t.session.c.tenant == tenant) & (t.session.c.session_id == session_id)
    if found := one(connection, Session, SESSIONS.where(owned)):
        return found
    raise NotFound(f"no session {session_id[:200]!r}")


class SessionRecords:
    """The sessions of every tenant."""

    _database: Database

    def add_session(
        self,
        tenant: Tenant,
        session_id: SessionId,
        *,
        user_metadata: Mapping[str, str] | None = None,
        display_name: str | None = None,
        project_id: str | None = None,
        tags: Sequence[str] = (),
        sdk_version: str | None = None,
    ) -> Session:
        """A new open session; the one that is there when the tenant repeats an id."""
        opened_at = now()
        with self._database.write() as connection:
            known = select(t.session.c.tenant).where(t.session.c.session_id == session_id)
            owner = connection.execute(known).scalar()
            if owner is None:
                connection.execute(
                    t.session.insert().values(
                        session_id=session_id,
                        tenant=tenant,
                        tags=list(tags),
                        user_metadata=metadata(user_metadata),
                        display_name=display_name,
                        project_id=project_id,
                        sdk_version=sdk_version,
                        created_at=opened_at,
                        last_seen_at=opened_at,
                        status="open",
                    )
                )
                note_event(connection, tenant, sdk_version or "", "session.create", session_id)
            elif owner != tenant:
                raise Conflict(f"session {session_id} exists; choose another id")
            return find_session(connection, tenant, session_id)

    def session(self, tenant: Tenant, session_id: SessionId) -> Session:
        """Raises NotFound."""
        with self._database.read() as connection:
            return find_session(connection, tenant, session_id)

    def touch_sessions(self, session_ids: Sequence[SessionId]) -> None:
        """Count open sessions as heard of now; ended and unknown ones stay as they are."""
        wanted = t.session.c.session_id.in_(session_ids) & (t.session.c.status == "open")
        with self._database.write() as connection:
            connection.execute(update(t.session).where(wanted).values(last_seen_at=now()))

    def set_session_project(
        self, tenant: Tenant, session_id: SessionId, project_id: str | None
    ) -> None:
        """Raises NotFound."""
        with self._database.write() as connection:
            find_session(connection, tenant, session_id)
            owned = t.session.c.session_id == session_id
            connection.execute(update(t.session).where(owned).values(project_id=project_id))
            details = {"project_id": project_id}
            note_event(connection, tenant, session_id, "session.move", session_id, details)

    def finish_session(
        self,
        tenant: Tenant,
        session_id: SessionId,
        *,
        reason: str,
        detail: str | None = None,
        status: SessionStatus = "finished",
    ) -> None:
        """End the session and close its runs. An ended one stays as it is. Raises NotFound."""
        with self._database.write() as connection:
            if find_session(connection, tenant, session_id).finished_at is None:
                _end(connection, [session_id], status, reason, detail)
                note_event(connection, tenant, session_id, "session.finish", session_id)

    def expire_idle(self, seen_before: datetime) -> list[tuple[Tenant, SessionId]]:
        """End the open sessions that were last heard of before then; says which they were."""
        idle = (t.session.c.status == "open") & (t.session.c.last_seen_at < seen_before)
        query = select(t.session.c.tenant, t.session.c.session_id).where(idle).limit(MAX_LIST)
        with self._database.write() as connection:
            ended = [(row.tenant, row.session_id) for row in connection.execute(query)]
            reason = ("interrupted", "no heartbeat")
            _end(connection, [session_id for _, session_id in ended], "expired", *reason)
            for tenant, session_id in ended:
                note_event(connection, tenant, "expiry", "session.finish", session_id)
        return ended

    def open_sessions(self) -> list[Session]:
        """Every tenant's open sessions, for a gateway that starts."""
        with self._database.read() as connection:
            return many(connection, Session, SESSIONS.where(t.session.c.status == "open"))

    def sessions(self, tenant: Tenant, *, limit: int = 20, offset: int = 0) -> list[Session]:
        """The tenant's sessions, newest first."""
        newest = (t.session.c.created_at.desc(), t.session.c.session_id.desc())
        query = SESSIONS.where(t.session.c.tenant == tenant).order_by(*newest)
        with self._database.read() as connection:
            return many(connection, Session, query.limit(min(limit, MAX_LIST)).offset(offset))

    def search_sessions(
        self,
        tenant: Tenant,
        *,
        session_id: str | None = None,
        project_ids: Sequence[str | None] | None = None,
        user_metadata: Mapping[str, str] | None = None,
        display_name: str | None = None,
        endings: Sequence[tuple[SessionStatus, str | None]] | None = None,
        limit: int = 50,
        before: tuple[datetime, SessionId] | None = None,
    ) -> list[Session]:
        """The sessions that match every filter, newest first.

        `session_id` and `display_name` together are one filter that either of them passes; each
        word of `display_name` may be any part of the name. None among `project_ids` stands for no
        project. `endings` are (status, finish reason) pairs, reason None for any. `before` is the
        (created_at, session_id) of the last session of the page before. Raises InvalidRequest.
        """
        column = t.session.c
        query = SESSIONS.where(column.tenant == tenant)
        if named := _named(session_id, display_name):
            query = query.where(or_(*named))
        if project_ids is not None:
            query = query.where(_in_projects(project_ids))
        if endings is not None:
            query = query.where(or_(false(), *map(_ended_as, dict.fromkeys(endings))))
        for key, value in (user_metadata or {}).items():
            if '"' in key or "\\" in key:
                raise InvalidRequest(f"metadata key {key[:80]!r} has a character not searched for")
            query = query.where(column.user_metadata[key].as_string() == value)
        if before is not None:
            query = query.where(tuple_(column.created_at, column.session_id) < before)
        query = query.order_by(column.created_at.desc(), column.session_id.desc())
        with self._database.read() as connection:
            return many(connection, Session, query.limit(min(limit, MAX_LIST)))


def _named(session_id: str | None, display_name: str | None) -> list[ColumnElement[bool]]:
    """What a session may be known by: its id, or all words of a name. Raises InvalidRequest."""
    known_by: list[ColumnElement[bool]] = []
    if session_id is not None:
        known_by.append(t.session.c.session_id == session_id)
    words = display_name.split() if display_name else []
    if len(words) > MAX_NAME_WORDS:
        raise InvalidRequest(
            f"display_name has {len(words)} words; a search takes at most {MAX_NAME_WORDS}"
        )
    if words:
        name = t.session.c.display_name
        known_by.append(and_(*(name.icontains(word, autoescape=True) for word in words)))
    return known_by


def _in_projects(project_ids: Sequence[str | None]) -> ColumnElement[bool]:
    column = t.session.c.project_id
    named = column.in_([project_id for project_id in project_ids if project_id is not None])
    return named | column.is_(None) if None in project_ids else named


def _ended_as(ending: tuple[SessionStatus, str | None]) -> ColumnElement[bool]:
    status, reason = ending
    this = t.session.c.status == status
    return this if reason is None else this & (t.session.c.finish_reason == reason)


def _end(
    connection: Connection,
    session_ids: Sequence[SessionId],
    status: SessionStatus,
    reason: str,
    detail: str | None,
) -> None:
    connection.execute(
        update(t.session)
        .where(t.session.c.session_id.in_(session_ids))
        .values(status=status, finished_at=now(), finish_reason=reason, finish_detail=detail)
    )
    live = t.run.c.session_id.in_(session_ids) & (t.run.c.status == "live")
    connection.execute(update(t.run).where(live).values(status="closed"))
    drop_requests(connection, session_ids)
