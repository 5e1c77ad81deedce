"""Checkpoints: named saves of runs, and the samplers that are bound to some of them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Protocol

from sqlalchemy import ColumnElement, Connection, delete, func, or_, select, update

from openmint.catalog import tables as t
from openmint.catalog.address import LATEST
from openmint.catalog.aliases import move_alias
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database, now
from openmint.catalog.garbage import doom
from openmint.catalog.policies import find_policy, find_run, put_run
from openmint.catalog.records import Checkpoint, Run, Sampler, Segment
from openmint.catalog.revisions import (
    delete_revision_row,
    note_steps,
    put_revision,
)
from openmint.catalog.rows import (
    CHECKPOINTS,
    MAX_LIST,
    SAMPLERS,
    SavedBytes,
    blob_values,
    many,
    metadata,
    one,
)
from openmint.catalog.sessions import find_session
from openmint.catalog.stored import counted
from openmint.errors import Conflict, NotFound
from openmint.types import BaseInfo, Digest, RunId, SessionId, Tenant


class RunToAdd(Protocol):
    """A run that is to be, as the service knows it."""

    @property
    def tenant(self) -> Tenant: ...
    @property
    def session_id(self) -> SessionId: ...
    @property
    def run_id(self) -> RunId: ...
    @property
    def policy(self) -> str: ...
    @property
    def base(self) -> BaseInfo: ...
    @property
    def user_metadata(self) -> Mapping[str, str]: ...


class CheckpointRecords:
    """The checkpoints of every tenant. An expired one is as good as gone."""

    _database: Database

    def add_checkpoint(
        self,
        tenant: Tenant,
        run_id: RunId,
        segment: Segment,
        name: str,
        blob: SavedBytes,
        *,
        ttl_seconds: float | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Checkpoint:
        """A named save, durable on return. Of segment `sampler_weights` it also adds the policy's
        revision and moves alias `latest`, in the same transaction.

        Repeating it with the same bytes is safe. Raises NotFound for the run, Conflict when the
        name holds other bytes and `overwrite` is off.
        """
        with self._database.write() as connection:
            run = find_run(connection, tenant, run_id)
            return _put(connection, run, segment, name, blob, ttl_seconds, overwrite, user_metadata)

    def copy_checkpoint(
        self, source: Checkpoint, new: RunToAdd, ttl_seconds: float | None = None
    ) -> Checkpoint:
        """The copy of a checkpoint under a run of its own, sharing the bytes; safe to repeat.

        The caller has shown that it may read `source`. Raises NotFound for the session or when
        `source` is gone by now, Conflict when the name in that run holds other bytes.
        """
        this = _named(source.run_id, source.segment, source.name)
        with self._database.write() as connection:
            _find(connection, this, source.segment, source.name)
            run = put_run(
                connection,
                new.tenant,
                new.run_id,
                session_id=new.session_id,
                policy=new.policy,
                base=new.base,
                spec=source.spec,
                user_metadata=new.user_metadata,
            )
            where = (connection, run, source.segment, source.name)
            return _put(*where, source, ttl_seconds, False, source.user_metadata)

    def checkpoint(self, tenant: Tenant, run_id: RunId, segment: Segment, name: str) -> Checkpoint:
        """The tenant's own checkpoint. Raises NotFound."""
        owned = _named(run_id, segment, name) & (t.checkpoint.c.tenant == tenant)
        with self._database.read() as connection:
            return _find(connection, owned, segment, name)

    def readable_checkpoint(
        self, tenant: Tenant, run_id: RunId, segment: Segment, name: str
    ) -> Checkpoint:
        """The tenant's own checkpoint, or one that its owner published. Raises NotFound."""
        readable = (t.checkpoint.c.tenant == tenant) | t.checkpoint.c.public.is_(True)
        with self._database.read() as connection:
            return _find(connection, _named(run_id, segment, name) & readable, segment, name)

    def run_checkpoints(self, tenant: Tenant, run_id: RunId) -> list[Checkpoint]:
        """A run's checkpoints, newest first. Raises NotFound for the run."""
        query = CHECKPOINTS.where(t.checkpoint.c.run_id == run_id, _unexpired())
        with self._database.read() as connection:
            find_run(connection, tenant, run_id)
            return many(connection, Checkpoint, query.order_by(*_newest()))

    def checkpoints(
        self, tenant: Tenant, *, limit: int = 100, offset: int = 0
    ) -> tuple[list[Checkpoint], int]:
        """A page of the tenant's checkpoints, newest first, and how many there are in all."""
        query = CHECKPOINTS.where(t.checkpoint.c.tenant == tenant, _unexpired())
        page = query.order_by(*_newest()).limit(min(limit, MAX_LIST)).offset(offset)
        count = query.with_only_columns(func.count())
        with self._database.read() as connection:
            found = many(connection, Checkpoint, page)
            return found, int(connection.execute(count).scalar_one())

    def checkpoint_usage(
        self, tenant: Tenant, *, session_id: SessionId | None = None
    ) -> tuple[int, int]:
        """How many checkpoints the tenant has, or one session of it, and the sum of their bytes."""
        total = func.coalesce(func.sum(t.checkpoint.c.size_bytes), 0)
        query = select(func.count(), total).select_from(t.checkpoint)
        query = query.where(t.checkpoint.c.tenant == tenant, _unexpired())
        if session_id is not None:
            query = query.join(t.run).where(t.run.c.session_id == session_id)
        with self._database.read() as connection:
            count, size_bytes = connection.execute(query).one()
            return int(count), int(size_bytes)

    def set_checkpoint_ttl(
        self,
        tenant: Tenant,
        run_id: RunId,
        segment: Segment,
        name: str,
        ttl_seconds: float | None,
    ) -> Checkpoint:
        """Let it expire that long from now; None: never. Raises NotFound."""
        change = {"expires_at": _expiry(ttl_seconds)}
        return self._change(tenant, run_id, segment, name, change, (run_id, "checkpoint.set_ttl"))

    def set_checkpoint_public(
        self,
        tenant: Tenant,
        run_id: RunId,
        segment: Segment,
        name: str,
        public: bool,
        *,
        actor: str,
    ) -> Checkpoint:
        """Let every tenant read it, or no other. Raises NotFound."""
        action = "checkpoint.publish" if public else "checkpoint.unpublish"
        change = {"public": public}
        return self._change(tenant, run_id, segment, name, change, (actor, action))

    def _change(
        self,
        tenant: Tenant,
        run_id: RunId,
        segment: Segment,
        name: str,
        values: Mapping[str, Any],
        audit: tuple[str, str] | None = None,
    ) -> Checkpoint:
        this = _named(run_id, segment, name)
        owned = this & (t.checkpoint.c.tenant == tenant)
        with self._database.write() as connection:
            _find(connection, owned, segment, name)
            connection.execute(update(t.checkpoint).where(this).values(**values))
            if audit is not None:
                note_event(connection, tenant, *audit, f"{run_id}/{segment}/{name}")
            query = CHECKPOINTS.where(owned)
            changed = one(connection, Checkpoint, query)
            assert changed is not None
            return changed

    def delete_checkpoint(
        self, tenant: Tenant, run_id: RunId, segment: Segment, name: str, *, actor: str
    ) -> None:
        """Remove it, expired or not. Raises NotFound.

        Its revision goes too, unless it has another use: another checkpoint, an alias, a place in
        the history of an alias but `latest`.
        """
        this = _named(run_id, segment, name)
        with self._database.write() as connection:
            owned = this & (t.checkpoint.c.tenant == tenant)
            found = one(connection, Checkpoint, CHECKPOINTS.where(owned))
            if found is None:
                raise _not_found(segment, name)
            _delete(connection, this)
            if segment == "sampler_weights" and not _has_other_use(connection, found):
                delete_revision_row(connection, tenant, found.policy_id, found.digest)
            subject = f"{run_id}/{segment}/{name}"
            note_event(connection, tenant, actor, "checkpoint.delete", subject)

    def expired_checkpoints(self) -> list[Checkpoint]:
        """Every tenant's checkpoints whose time is over, some at a time, for the sweeper."""
        query = CHECKPOINTS.where(t.checkpoint.c.expires_at <= now()).limit(MAX_LIST)
        with self._database.read() as connection:
            return many(connection, Checkpoint, query)


def _named(run_id: RunId, segment: Segment, name: str) -> ColumnElement[bool]:
    column = t.checkpoint.c
    return (column.run_id == run_id) & (column.segment == segment) & (column.name == name)


def _unexpired() -> ColumnElement[bool]:
    return t.checkpoint.c.expires_at.is_(None) | (t.checkpoint.c.expires_at > now())


def _newest() -> tuple[ColumnElement[Any], ...]:
    column = t.checkpoint.c
    return column.created_at.desc(), column.run_id.desc(), column.segment, column.name


def _find(
    connection: Connection, where: ColumnElement[bool], segment: str, name: str
) -> Checkpoint:
    if found := one(connection, Checkpoint, CHECKPOINTS.where(where, _unexpired())):
        return found
    raise _not_found(segment, name)


def _not_found(segment: str, name: str) -> NotFound:
    return NotFound(f"no checkpoint {segment}/{name[:200]} of that run")


def _expiry(ttl_seconds: float | None) -> datetime | None:
    return None if ttl_seconds is None else now() + timedelta(seconds=ttl_seconds)


def _put(
    connection: Connection,
    run: Run,
    segment: Segment,
    name: str,
    blob: SavedBytes,
    ttl_seconds: float | None,
    overwrite: bool,
    user_metadata: Mapping[str, str] | None,
) -> Checkpoint:
    this = _named(run.run_id, segment, name)
    known = one(connection, Checkpoint, CHECKPOINTS.where(this, _unexpired()))
    if known is not None and known.digest != blob.digest and not overwrite:
        raise Conflict(
            f"checkpoint {segment}/{name} of run {run.run_id} exists; "
            "choose another name, delete it, or save with overwrite"
        )
    _delete(connection, this)
    added = t.checkpoint.insert().values(
        run_id=run.run_id,
        segment=segment,
        name=name,
        tenant=run.tenant,
        **blob_values(blob),
        # A repeated save of the same bytes stays published; other bytes need publishing anew.
        public=known is not None and known.public and known.digest == blob.digest,
        user_metadata=metadata(user_metadata),
        created_at=now(),
        expires_at=_expiry(ttl_seconds),
    )
    with counted(connection, run.tenant, [blob.digest]):
        connection.execute(added)
    note_steps(connection, run, blob)
    subject, details = f"{run.run_id}/{segment}/{name}", {"digest": blob.digest}
    note_event(connection, run.tenant, run.run_id, "checkpoint.create", subject, details)
    if segment == "sampler_weights":
        policy = find_policy(connection, run.tenant, run.policy_name)
        put_revision(
            connection,
            policy,
            blob,
            run=run,
            origin="trained",
            ephemeral=False,
            user_metadata=user_metadata,
        )
        move_alias(connection, policy, LATEST, blob.digest, "set", actor=run.run_id)
    return _find(connection, this, segment, name)


def _delete(connection: Connection, this: ColumnElement[bool]) -> None:
    """Remove the checkpoint, if it is there."""
    query = select(t.checkpoint.c.tenant, t.checkpoint.c.digest).where(this)
    if found := connection.execute(query).first():
        doom(connection, found.digest)
        with counted(connection, found.tenant, [found.digest]):
            connection.execute(delete(t.checkpoint).where(this))


def _has_other_use(connection: Connection, gone: Checkpoint) -> bool:
    event = t.alias_event.c
    uses = (
        select(t.checkpoint.c.name)
        .join_from(t.checkpoint, t.run)
        .where(t.run.c.policy_id == gone.policy_id, t.checkpoint.c.digest == gone.digest)
        .where(t.checkpoint.c.segment == "sampler_weights"),
        select(t.alias.c.name).where(
            t.alias.c.policy_id == gone.policy_id, t.alias.c.digest == gone.digest
        ),
        select(event.alias).where(
            event.policy_id == gone.policy_id,
            event.alias != LATEST,
            or_(event.to_digest == gone.digest, event.from_digest == gone.digest),
        ),
    )
    return any(connection.execute(use.limit(1)).first() for use in uses)


class SamplerRecords:
    """The sampling sessions of every tenant."""

    _database: Database

    def add_sampler(
        self,
        tenant: Tenant,
        sampler_id: str,
        *,
        session_id: SessionId,
        base: BaseInfo,
        revision: Digest | None,
        model_path: str | None,
        inflight_run: RunId | None = None,
    ) -> Sampler:
        """A sampler bound to a revision or the bare base; the one there is when repeated.

        Raises NotFound for the session, Conflict when the id is bound to something else.
        """
        with self._database.write() as connection:
            find_session(connection, tenant, session_id)
            query = SAMPLERS.where(t.sampler.c.sampler_id == sampler_id)
            known = one(connection, Sampler, query)
            if known is None:
                connection.execute(
                    t.sampler.insert().values(
                        sampler_id=sampler_id,
                        session_id=session_id,
                        tenant=tenant,
                        seq_id=int(sampler_id.rpartition(":")[2]),
                        base_name=base.name,
                        base_digest=base.digest,
                        revision=revision,
                        model_path=model_path,
                        inflight_run=inflight_run,
                        created_at=now(),
                    )
                )
                known = one(connection, Sampler, query)
                assert known is not None
            # A path is bound when it is first asked for; what it names now may be something else.
            bound = known.revision if model_path is None else revision
            wanted = (tenant, base.digest, model_path, revision)
            if (known.tenant, known.base_digest, known.model_path, bound) != wanted:
                raise Conflict(f"sampling session {sampler_id} is bound to something else")
            return known

    def move_samplers(self, run_id: RunId, revision: Digest) -> None:
        """Bind the samplers that follow the run to newer weights."""
        following = t.sampler.c.inflight_run == run_id
        with self._database.write() as connection:
            connection.execute(update(t.sampler).where(following).values(revision=revision))

    def sampler(self, tenant: Tenant, sampler_id: str) -> Sampler:
        """Raises NotFound."""
        owned = (t.sampler.c.tenant == tenant) & (t.sampler.c.sampler_id == sampler_id)
        with self._database.read() as connection:
            if found := one(connection, Sampler, SAMPLERS.where(owned)):
                return found
        raise NotFound(f"no sampling session {sampler_id[:200]!r}")

    def samplers_of_session(self, tenant: Tenant, session_id: SessionId) -> list[Sampler]:
        """A session's samplers in the order of their seq_id."""
        owned = (t.sampler.c.tenant == tenant) & (t.sampler.c.session_id == session_id)
        with self._database.read() as connection:
            return many(connection, Sampler, SAMPLERS.where(owned).order_by(t.sampler.c.seq_id))
