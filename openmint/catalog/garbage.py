"""Bytes that lost a record, doomed in the transaction that took it away, so that no crash forgets
them. They may go once nothing uses them: no revision, no checkpoint, no run that would be rebuilt
from them, no sampler of an open session.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, select

from openmint.catalog import tables as t
from openmint.catalog.database import Database
from openmint.catalog.rows import MAX_LIST
from openmint.types import Digest


def doom(connection: Connection, digest: str) -> None:
    """Have the collector look at these bytes; repeating it is fine."""
    doomed = t.doomed_blob
    known = select(doomed.c.digest).where(doomed.c.digest == digest)
    if connection.execute(known).first() is None:
        connection.execute(doomed.insert().values(digest=digest))


class GarbageRecords:
    """What the collector may delete."""

    _database: Database

    def unused_blobs(self) -> list[Digest]:
        """Doomed digests that nothing uses now, some at a time."""
        digest = t.doomed_blob.c.digest
        query = select(digest).where(~_is_named(digest), ~_is_sampled(digest)).limit(MAX_LIST)
        with self._database.read() as connection:
            return list(connection.execute(query).scalars())

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
