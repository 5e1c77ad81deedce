"""The requests of training runs, from their acceptance until a snapshot makes them unnecessary.

A request's `body` says what to do, `outcome` what came of it; both are the service's bytes. A body
goes once nothing needs it to rebuild its run, an outcome once it was kept long enough, and the row
with the later of them. Those of a session that has ended go with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Boolean, Connection, Executable, bindparam, case, delete, select, update

from openmint.catalog import tables as t
from openmint.catalog.database import Database, insert_into
from openmint.catalog.garbage import doom
from openmint.catalog.records import Finished, RequestRecord, SavedState
from openmint.catalog.rows import REQUESTS, many
from openmint.types import Digest, RunId, SessionId

THIS = (t.request.c.run_id == bindparam("_run_id")) & (t.request.c.seq == bindparam("_seq"))


def _key(run_id: RunId, seq: int) -> dict[str, Any]:
    return {"_run_id": run_id, "_seq": seq}


class RequestRecords:
    """The requests of every tenant's live runs."""

    _database: Database

    def write_requests(
        self, accepted: Sequence[RequestRecord], finished: Sequence[Finished]
    ) -> None:
        """Write down new requests and outcomes of earlier ones, all of them or none.

        Safe to repeat: when the connection is lost during a commit, nobody knows whether what
        was accepted is there, so it takes the place of what is.
        """
        rows = [{f.name: getattr(each, f.name) for f in fields(each)} for each in accepted]
        ends = [
            {**_key(each.run_id, each.seq), "_status": each.status, "_outcome": each.outcome}
            | {"_keeps_body": each.keeps_body}
            for each in finished
        ]
        is_kept = bindparam("_keeps_body", type_=Boolean)
        values: dict[str, Any] = {
            "status": bindparam("_status"),
            "outcome": bindparam("_outcome"),
            "body": case((is_kept, t.request.c.body), else_=None),
            "needs": case((is_kept, t.request.c.needs), else_=None),
        }
        with self._database.write() as connection:
            if rows:
                connection.execute(_accept(connection), rows)
            if ends:
                connection.execute(update(t.request).where(THIS).values(values), ends)

    def open_requests(self) -> list[RequestRecord]:
        """Those of every run whose session is open, run by run and in their order.

        Bodies are there where something is still to do, and of the request that starts a run. One
        that was accepted just when its session ended is forgotten here.
        """
        column = t.request.c
        wanted = case(((column.status == "accepted") | (column.seq == 0), column.body))
        columns = [wanted.label("body") if c.name == "body" else c for c in column]
        ended = select(t.session.c.session_id).where(t.session.c.finished_at.is_not(None))
        with self._database.write() as connection:
            connection.execute(delete(t.request).where(t.request.c.session_id.in_(ended)))
            ordered = select(*columns).order_by(column.run_id, column.seq)
            return many(connection, RequestRecord, ordered)

    def requests_of(self, run_id: RunId) -> list[RequestRecord]:
        """A run's requests in their order."""
        query = REQUESTS.where(t.request.c.run_id == run_id).order_by(t.request.c.seq)
        with self._database.read() as connection:
            return many(connection, RequestRecord, query)

    def snapshot_of(self, run_id: RunId) -> SavedState | None:
        """The state from which the run can be rebuilt, if one was saved."""
        query = select(t.run.c.snapshot_digest, t.run.c.snapshot_seq).where(
            t.run.c.run_id == run_id, t.run.c.snapshot_digest.is_not(None)
        )
        with self._database.read() as connection:
            row = connection.execute(query).first()
        return None if row is None else SavedState(Digest(row[0]), int(row[1]))

    def move_snapshot(self, run_id: RunId, snapshot: SavedState) -> None:
        """Rebuild the run from this state from now on; what came before it is not needed any more.

        The caller has seen that every request up to `snapshot.seq` has its outcome.
        """
        request, run = t.request.c, t.run.c
        before = (request.run_id == run_id) & (request.seq <= snapshot.seq)
        with self._database.write() as connection:
            this = run.run_id == run_id
            old = connection.execute(select(run.snapshot_digest).where(this)).scalar()
            values = {"snapshot_digest": snapshot.digest, "snapshot_seq": snapshot.seq}
            connection.execute(update(t.run).where(this).values(**values))
            if old is not None and old != snapshot.digest:
                doom(connection, old)
            connection.execute(update(t.request).where(before).values(needs=None))
            # The first one says what the run is.
            later = before & (request.seq > 0)
            connection.execute(delete(t.request).where(later, request.outcome.is_(None)))
            connection.execute(update(t.request).where(later).values(body=None))

    def forget_outcomes(self, keys: Sequence[tuple[RunId, int]]) -> None:
        """These results were kept long enough."""
        rows = [_key(run_id, seq) for run_id, seq in keys]
        with self._database.write() as connection:
            connection.execute(delete(t.request).where(THIS, t.request.c.body.is_(None)), rows)
            connection.execute(update(t.request).where(THIS).values(outcome=None), rows)


def _accept(connection: Connection) -> Executable:
    statement = insert_into(connection, t.request)
    key = [t.request.c.run_id, t.request.c.seq]
    again = {c.name: statement.excluded[c.name] for c in t.request.c if not c.primary_key}
    waits = t.request.c.status == "accepted"
    return statement.on_conflict_do_update(index_elements=key, set_=again, where=waits)


def drop_requests(connection: Connection, session_ids: Sequence[SessionId]) -> None:
    """Forget how the sessions' runs came about; nobody goes on with them."""
    connection.execute(delete(t.request).where(t.request.c.session_id.in_(session_ids)))
    of_sessions = t.run.c.session_id.in_(session_ids) & t.run.c.snapshot_digest.is_not(None)
    for digest in connection.execute(select(t.run.c.snapshot_digest).where(of_sessions)).scalars():
        doom(connection, digest)
    connection.execute(update(t.run).where(of_sessions).values(snapshot_digest=None))
