"""Retention: which revisions of a policy are kept once there are more than it wants.

Kept are the newest that it wants, what an alias or its canary names, what the last moves of an
alias but `latest` may be rolled back to, and what a published checkpoint or one with a time to live
of its own holds. Unnamed saves are not counted: they go with their session. What is surplus is
deleted with its checkpoints, and its bytes wait out the grace that `garbage.py` gives them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Select, delete, func, or_, select, update

from openmint.catalog import tables as t
from openmint.catalog.address import LATEST
from openmint.catalog.aliases import past_of
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database
from openmint.catalog.policies import find_policy
from openmint.catalog.records import Keep, Policy, Revision
from openmint.catalog.revisions import delete_revision_row
from openmint.catalog.rows import MAX_LIST, POLICIES, REVISIONS, many, one
from openmint.catalog.stored import counted
from openmint.types import Digest, Tenant

ACTOR = "retention"


class RetentionRecords:
    """What every tenant keeps."""

    _database: Database

    def set_retention(
        self, tenant: Tenant, policy: str, keep_revisions: int | None, *, actor: str
    ) -> Policy:
        """The policy, which from now on keeps so many; None: what the service's settings say.

        Deletes nothing yet. Raises NotFound.
        """
        this = (t.policy.c.tenant == tenant) & (t.policy.c.name == policy)
        with self._database.write() as connection:
            find_policy(connection, tenant, policy)
            connection.execute(update(t.policy).where(this).values(keep_revisions=keep_revisions))
            details = {"keep_revisions": keep_revisions}
            note_event(connection, tenant, actor, "policy.retain", f"{tenant}/{policy}", details)
            return find_policy(connection, tenant, policy)

    def surplus_revisions(self, tenant: Tenant, policy: str, keep: Keep) -> list[Revision]:
        """What would be deleted now, oldest first, some of it. Raises NotFound."""
        with self._database.read() as connection:
            return _surplus(connection, find_policy(connection, tenant, policy), keep)

    def delete_surplus(self, keep: Keep, *, after: int, limit: int) -> tuple[int | None, int]:
        """Delete what is surplus in the next `limit` policies after that id.

        Returns where to go on, None at the end, and the number of revisions that were deleted.
        """
        with self._database.read() as connection:
            ids, crowded = _crowded(connection, keep, after, limit)
        num_deleted = sum(self._delete_surplus_of(policy_id, keep) for policy_id in crowded)
        return (ids[-1] if len(ids) == limit else None), num_deleted

    def _delete_surplus_of(self, policy_id: int, keep: Keep) -> int:
        with self._database.write() as connection:
            policy = one(connection, Policy, POLICIES.where(t.policy.c.policy_id == policy_id))
            assert policy is not None
            surplus = _surplus(connection, policy, keep)
            for revision in surplus:
                details = {"checkpoints": _delete_checkpoints(connection, revision)}
                delete_revision_row(connection, policy.tenant, policy_id, revision.digest)
                subject = f"{policy.tenant}/{policy.name}@{revision.digest}"
                note_event(connection, policy.tenant, ACTOR, "revision.delete", subject, details)
            return len(surplus)


def _crowded(
    connection: Connection, keep: Keep, after: int, limit: int
) -> tuple[list[int], list[int]]:
    """The next policies that keep a number of revisions, and those of them that have more."""
    policy, revision = t.policy.c, t.revision.c
    query = select(policy.policy_id, policy.keep_revisions).where(policy.policy_id > after)
    if not keep.revisions:
        query = query.where(policy.keep_revisions.is_not(None))
    rows = connection.execute(query.order_by(policy.policy_id).limit(limit)).all()
    most = {row.policy_id: row.keep_revisions or keep.revisions for row in rows}
    counts = (
        select(revision.policy_id, func.count())
        .where(revision.policy_id.in_(list(most)), *_counted())
        .group_by(revision.policy_id)
    )
    crowded = [i for i, number in connection.execute(counts) if number > most[i]]
    return list(most), sorted(crowded)


def _counted() -> tuple[Any, ...]:
    return t.revision.c.deleted_at.is_(None), t.revision.c.ephemeral.is_(False)


def _surplus(connection: Connection, policy: Policy, keep: Keep) -> list[Revision]:
    revision, alias = t.revision.c, t.alias.c
    wanted = policy.keep_revisions or keep.revisions
    if not wanted:
        return []
    mine = revision.policy_id == policy.policy_id
    newest = select(revision.number).where(mine, *_counted()).order_by(revision.number.desc())
    last_kept = newest.offset(wanted - 1).limit(1).scalar_subquery()
    named = select(alias.name).where(
        alias.policy_id == policy.policy_id,
        or_(alias.digest == revision.digest, alias.canary_digest == revision.digest),
    )
    query = REVISIONS.where(
        mine,
        *_counted(),
        revision.number < last_kept,
        ~named.exists(),
        ~_held(policy.policy_id).exists(),
        revision.digest.not_in(_rollback_targets(connection, policy.policy_id, keep.rollbacks)),
    )
    return many(connection, Revision, query.order_by(revision.number).limit(MAX_LIST))


def _held(policy_id: int) -> Select[Any]:
    """Checkpoints of the revision at hand that retention leaves alone."""
    checkpoint = t.checkpoint.c
    return (
        select(checkpoint.name)
        .join_from(t.checkpoint, t.run)
        .where(
            t.run.c.policy_id == policy_id,
            checkpoint.digest == t.revision.c.digest,
            or_(checkpoint.public.is_(True), checkpoint.expires_at.is_not(None)),
        )
        .correlate(t.revision)
    )


def _rollback_targets(connection: Connection, policy_id: int, depth: int) -> list[Digest]:
    """What the last moves of each alias but `latest` may be rolled back to."""
    names = select(t.alias.c.name).where(t.alias.c.policy_id == policy_id, t.alias.c.name != LATEST)
    found: set[Digest] = set()
    for name in connection.execute(names).scalars().all():
        found.update(past_of(connection, policy_id, name)[-depth - 1 :])
    return sorted(found)


def _delete_checkpoints(connection: Connection, revision: Revision) -> list[str]:
    """Take the checkpoints of the revision away; says which there were."""
    checkpoint = t.checkpoint.c
    runs = select(t.run.c.run_id).where(t.run.c.policy_id == revision.policy_id)
    its = (
        (checkpoint.digest == revision.digest)
        & (checkpoint.segment == "sampler_weights")
        & checkpoint.run_id.in_(runs)
    )
    rows = connection.execute(select(checkpoint.run_id, checkpoint.name).where(its)).all()
    with counted(connection, revision.tenant, [revision.digest]):
        connection.execute(delete(t.checkpoint).where(its))
    return [f"{run_id}/sampler_weights/{name}" for run_id, name in rows]
