"""Bytes that lost a record, doomed in the transaction that took it away, so that no crash forgets
them. They may go once nothing uses them: no revision, no checkpoint, no run that would be rebuilt
from them, no sampler of an open session. Those of a revision that was deleted are left for a grace
first: whoever still works with it goes on, and the same save again costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, or_, select, update

from openmint.catalog import tables as t
from openmint.catalog.database import Database, now
from openmint.catalog.records import DoomedBlob
from openmint.catalog.rows import DOOMED_BLOBS, MAX_LIST, many
from openmint.types import Digest


def doom(connection: Connection, digest: str, *, with_grace: bool = False) -> None:
    """Have the collector look at these bytes, with grace a while later; repeating it is fine."""
    doomed = t.doomed_blob
    values = {"digest": digest, "doomed_at": now() if with_grace else None}
    known = select(doomed.c.digest).where(doomed.c.digest == digest)
    if connection.execute(known).first() is None:
        connection.execute(doomed.insert().values(**values))
    elif with_grace:
        connection.execute(update(doomed).where(doomed.c.digest == digest).values(**values))


class GarbageRecords:
    """What the collector may delete."""

    _database: Database

    def unused_blobs(self, grace_seconds: float = 0.0) -> list[Digest]:
        """Doomed digests whose grace is over and that nothing uses now, some at a time."""
        digest, doomed_at = t.doomed_blob.c.digest, t.doomed_blob.c.doomed_at
        over = or_(doomed_at.is_(None), doomed_at <= now() - timedelta(seconds=grace_seconds))
        query = select(digest).where(over, ~_is_named(digest), ~_is_sampled(digest))
        with self._database.read() as connection:
            return list(connection.execute(query.limit(MAX_LIST)).scalars())

    def doomed_blobs(self, limit: int = 100) -> list[DoomedBlob]:
        """What waits for the collector and is named by no record, longest waiting first."""
        digest, doomed_at = t.doomed_blob.c.digest, t.doomed_blob.c.doomed_at
        query = DOOMED_BLOBS.where(~_is_named(digest)).order_by(doomed_at, digest)
        with self._database.read() as connection:
            return many(connection, DoomedBlob, query.limit(min(limit, MAX_LIST)))

    def forget_blobs(self, digests: Sequence[Digest]) -> None:
        """Their bytes are gone. What a record names again is no longer doomed either."""
        digest = t.doomed_blob.c.digest
        with self._database.write() as connection:
            connection.execute(delete(t.doomed_blob).where(digest.in_(digests) | _is_named(digest)))


def _is_named(digest: Any) -> ColumnElement[bool]:
    revision, checkpoint = t.revision.c, t.checkpoint.c
    live = select(revision.number).where(revision.digest == digest, revision.deleted_at.is_(None))
    saved = select(checkpoint.name).where(checkpoint.digest == digest)
    rebuilt = select(t.run.c.run_id).where(t.run.c.snapshot_digest == digest)
    repeated = select(t.request.c.seq).where(t.request.c.needs == digest)
    return live.exists() | saved.exists() | rebuilt.exists() | repeated.exists()


def _is_sampled(digest: Any) -> ColumnElement[bool]:
    bound = select(t.sampler.c.sampler_id).join_from(t.sampler, t.session)
    bound = bound.where(t.sampler.c.revision == digest, t.session.c.finished_at.is_(None))
    return bound.exists()
