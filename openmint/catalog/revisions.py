"""Revisions: a policy's immutable weights, in the order in which they were added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, func, select, update

from openmint.catalog import tables as t
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database, now
from openmint.catalog.garbage import doom
from openmint.catalog.policies import find_policy, find_run
from openmint.catalog.records import Origin, Policy, Revision, Run
from openmint.catalog.rows import (
    MAX_LIST,
    REVISIONS,
    SavedBytes,
    blob_values,
    many,
    metadata,
    one,
)
from openmint.catalog.stored import counted
from openmint.errors import Conflict, InvalidRequest, NotFound
from openmint.types import Digest, RunId, Tenant

DIGEST_HEX = 71
"""Characters of a whole digest, `sha256:` included."""


def find_revision(connection: Connection, policy: Policy, digest: str) -> Revision | None:
    wanted = (t.revision.c.policy_id == policy.policy_id) & (t.revision.c.digest == digest)
    return one(connection, Revision, REVISIONS.where(wanted))


def find_live_revision(connection: Connection, policy: Policy, digest: str) -> Revision:
    """Raises NotFound for a revision that is not the policy's or was deleted."""
    found = find_revision(connection, policy, digest)
    if found is None:
        raise NotFound(f"policy {policy.name!r} has no revision {digest[:80]}")
    if found.deleted_at is not None:
        raise NotFound(f"revision {digest} of policy {policy.name!r} was deleted")
    return found


def find_by_prefix(connection: Connection, policy: Policy, prefix: str) -> Revision:
    """The policy's revision whose digest starts so. Raises NotFound, InvalidRequest for two."""
    if len(prefix) >= DIGEST_HEX:
        return find_live_revision(connection, policy, prefix)
    digest = t.revision.c.digest
    query = REVISIONS.where(
        t.revision.c.policy_id == policy.policy_id,
        t.revision.c.deleted_at.is_(None),
        digest >= prefix,
        digest < prefix + "g",  # the first letter after the hex digits
    )
    found = many(connection, Revision, query.limit(2))
    if not found:
        raise NotFound(f"policy {policy.name!r} has no revision {prefix}")
    if len(found) > 1:
        raise InvalidRequest(f"{prefix} begins several revisions; use more digits")
    return found[0]


def put_revision(
    connection: Connection,
    policy: Policy,
    blob: SavedBytes,
    *,
    run: Run | None,
    origin: Origin,
    ephemeral: bool,
    parent_digest: Digest | None = None,
    user_metadata: Mapping[str, str] | None = None,
    actor: str = "",
) -> Revision:
    """The policy's revision of these bytes; the one there was, restored when it was deleted.

    Its owner is the run's session, without a run `actor`.
    """
    known = find_revision(connection, policy, blob.digest)
    if known is not None:
        this = (t.revision.c.policy_id == policy.policy_id) & (t.revision.c.digest == blob.digest)
        kept = {"deleted_at": None, "ephemeral": known.ephemeral and ephemeral}
        with counted(connection, policy.tenant, [blob.digest]):
            connection.execute(update(t.revision).where(this).values(**kept))
    else:
        mine = t.revision.c.policy_id == policy.policy_id
        last = select(func.max(t.revision.c.number)).where(mine)
        if parent_digest is None and run is not None:
            parent_digest = _newest_of_run(connection, run)
        added = t.revision.insert().values(
            policy_id=policy.policy_id,
            number=(connection.execute(last).scalar() or 0) + 1,
            **blob_values(blob),
            parent_digest=parent_digest,
            run_id=run.run_id if run else None,
            origin=origin,
            ephemeral=ephemeral,
            user_metadata=metadata(user_metadata),
            created_at=now(),
            owner=run.session_id if run else actor,
        )
        with counted(connection, policy.tenant, [blob.digest]):
            connection.execute(added)
        maker = run.run_id if run else origin
        subject = f"{policy.tenant}/{policy.name}@{blob.digest}"
        note_event(connection, policy.tenant, maker, "revision.create", subject)
    if run is not None:
        note_steps(connection, run, blob)
    return find_live_revision(connection, policy, blob.digest)


def note_steps(connection: Connection, run: Run, blob: SavedBytes) -> None:
    """Let the run show how far it was trained when it was last saved."""
    values: dict[str, Any] = {"num_optim_steps": blob.num_optim_steps, "last_request_at": now()}
    connection.execute(update(t.run).where(t.run.c.run_id == run.run_id).values(**values))


def _newest_of_run(connection: Connection, run: Run) -> Digest | None:
    """What the run's next revision descends from: its last one, when it has one."""
    query = select(t.revision.c.digest).where(t.revision.c.run_id == run.run_id)
    newest = query.order_by(t.revision.c.number.desc()).limit(1)
    return connection.execute(newest).scalar()


def delete_revision_row(
    connection: Connection,
    tenant: Tenant,
    policy_id: int,
    digest: Digest,
    *,
    with_grace: bool = True,
) -> None:
    """Mark it deleted; its bytes go once nothing needs them, with grace a while later."""
    this = (t.revision.c.policy_id == policy_id) & (t.revision.c.digest == digest)
    with counted(connection, tenant, [digest]):
        connection.execute(update(t.revision).where(this).values(deleted_at=now()))
    doom(connection, digest, with_grace=with_grace)


def keep_revision(connection: Connection, policy: Policy, digest: str) -> None:
    """Let the revision outlive the session that made it."""
    this = (t.revision.c.policy_id == policy.policy_id) & (t.revision.c.digest == digest)
    connection.execute(update(t.revision).where(this).values(ephemeral=False))


class RevisionRecords:
    """The revisions of every tenant."""

    _database: Database

    def add_run_revision(
        self,
        tenant: Tenant,
        run_id: RunId,
        blob: SavedBytes,
        *,
        ephemeral: bool,
        parent_digest: Digest | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Revision:
        """A revision that a run made; its parent, unless given, is the run's one before.

        The same bytes again give the same revision. Raises NotFound for the run.
        """
        with self._database.write() as connection:
            run = find_run(connection, tenant, run_id)
            policy = find_policy(connection, tenant, run.policy_name)
            return put_revision(
                connection,
                policy,
                blob,
                run=run,
                origin="trained",
                ephemeral=ephemeral,
                parent_digest=parent_digest,
                user_metadata=user_metadata,
            )

    def revision(self, tenant: Tenant, policy: str, digest: str) -> Revision:
        """A revision by its digest or the start of it. Raises NotFound, also when deleted."""
        with self._database.read() as connection:
            owner = find_policy(connection, tenant, policy)
            return find_by_prefix(connection, owner, digest)

    def note_probe(
        self, tenant: Tenant, policy: str, digest: Digest, drift: float, base_difference: float
    ) -> None:
        """Keep what the revision's probe found. Raises NotFound for the policy."""
        values = {"drift": drift, "base_difference": base_difference}
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            mine = t.revision.c.policy_id == owner.policy_id
            this = mine & (t.revision.c.digest == digest)
            connection.execute(update(t.revision).where(this).values(**values))

    def revisions(
        self,
        tenant: Tenant,
        policy: str,
        *,
        limit: int = 100,
        before: int | None = None,
        ephemeral: bool = False,
        deleted: bool = False,
    ) -> list[Revision]:
        """A policy's revisions, newest first; `before` continues after a page's last number.

        Raises NotFound for the policy.
        """
        column = t.revision.c
        with self._database.read() as connection:
            owner = find_policy(connection, tenant, policy)
            query = REVISIONS.where(column.policy_id == owner.policy_id)
            if before is not None:
                query = query.where(column.number < before)
            if not ephemeral:
                query = query.where(column.ephemeral.is_(False))
            if not deleted:
                query = query.where(column.deleted_at.is_(None))
            newest = query.order_by(column.number.desc()).limit(min(limit, MAX_LIST))
            return many(connection, Revision, newest)

    def lineage(
        self, tenant: Tenant, policy: str, digest: str, *, depth: int = MAX_LIST
    ) -> list[Revision]:
        """The revision and what it descends from within the policy, nearest first and at most
        `depth` steps away, deleted ones included. Raises NotFound."""
        with self._database.read() as connection:
            owner = find_policy(connection, tenant, policy)
            chain = [find_by_prefix(connection, owner, digest)]
            seen = {chain[0].digest}
            while (parent := chain[-1].parent_digest) and parent not in seen:
                found = find_revision(connection, owner, parent)
                if found is None or len(chain) > depth:
                    break
                chain.append(found)
                seen.add(parent)
            return chain

    def descendants(
        self, tenant: Tenant, policy: str, digest: str, *, depth: int = MAX_LIST
    ) -> list[tuple[int, Revision]]:
        """What descends from the revision within the policy, each with its distance, nearest first
        and in the order of numbers, deleted ones included.

        At most `depth` steps away, and no more than `MAX_LIST`. Raises NotFound.
        """
        column = t.revision.c
        with self._database.read() as connection:
            owner = find_policy(connection, tenant, policy)
            first = find_by_prefix(connection, owner, digest)
            level, seen = [first.digest], {first.digest}
            found: list[tuple[int, Revision]] = []
            for distance in range(1, depth + 1):
                query = REVISIONS.where(
                    column.policy_id == owner.policy_id, column.parent_digest.in_(level)
                )
                room = MAX_LIST - len(found)
                children = many(connection, Revision, query.order_by(column.number).limit(room))
                new = [child for child in children if child.digest not in seen]
                found += [(distance, child) for child in new]
                level = [child.digest for child in new]
                seen.update(level)
                if not level:
                    break
            return found

    def delete_revision(self, tenant: Tenant, policy: str, digest: str, *, actor: str) -> Revision:
        """Mark a revision deleted; its bytes go when nothing else needs them.

        Raises NotFound, Conflict while an alias names it.
        """
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            found = find_by_prefix(connection, owner, digest)
            alias = t.alias.c
            named = (alias.digest == found.digest) | (alias.canary_digest == found.digest)
            of_policy = select(alias.name).where(alias.policy_id == owner.policy_id, named)
            names = connection.execute(of_policy).scalars().all()
            if names:
                raise Conflict(
                    f"alias {names[0]!r} names revision {found.digest}; move the alias first"
                )
            delete_revision_row(connection, tenant, owner.policy_id, found.digest)
            subject = f"{tenant}/{policy}@{found.digest}"
            note_event(connection, tenant, actor, "revision.delete", subject)
            return found

    def delete_ephemeral_of_ended(self) -> None:
        """Mark the ephemeral revisions of ended sessions deleted, but those that an alias names."""
        revision, alias = t.revision.c, t.alias.c
        ended = select(t.run.c.run_id).join_from(t.run, t.session)
        ended = ended.where(t.session.c.finished_at.is_not(None))
        named = (
            select(alias.name)
            .where(alias.policy_id == revision.policy_id, alias.digest == revision.digest)
            .exists()
        )
        over = select(revision.policy_id, revision.digest, t.policy.c.tenant).where(
            revision.policy_id == t.policy.c.policy_id,
            revision.ephemeral.is_(True),
            revision.deleted_at.is_(None),
            revision.run_id.in_(ended),
            ~named,
        )
        with self._database.write() as connection:
            for row in connection.execute(over).all():
                this = row.tenant, row.policy_id, row.digest
                delete_revision_row(connection, *this, with_grace=False)
