"""Aliases: movable names of revisions. A move is one transaction: row, event, audit.

The history of an alias is a stack. Setting and promoting push; a rollback goes back to what lay
below, so that rolling back twice does not return to what was rolled back first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, select

from openmint.catalog import tables as t
from openmint.catalog.address import LATEST, PolicyAddress
from openmint.catalog.alias_rows import (
    NO_CANARY,
    check_version,
    find_alias,
    known_alias,
    write_alias,
)
from openmint.catalog.audit import note_event
from openmint.catalog.canaries import end_canary, is_on_canary, running_canary
from openmint.catalog.database import Database
from openmint.catalog.gates import pass_gates
from openmint.catalog.policies import find_policy, get_or_create
from openmint.catalog.records import (
    Alias,
    AliasAction,
    AliasEvent,
    GateFailure,
    Policy,
    Resolved,
    Revision,
)
from openmint.catalog.revisions import (
    find_by_prefix,
    find_live_revision,
    keep_revision,
    put_revision,
)
from openmint.catalog.rows import (
    ALIAS_EVENTS,
    ALIASES,
    MAX_LIST,
    REVISIONS,
    SavedBytes,
    many,
    one,
    to_record,
)
from openmint.errors import Conflict, NotFound
from openmint.types import BaseInfo, Digest, Tenant

SERVED = "prod"
CANARY = (t.alias.c.canary_digest, t.alias.c.canary_share)


def move_alias(
    connection: Connection,
    policy: Policy,
    name: str,
    digest: Digest,
    action: AliasAction,
    *,
    actor: str,
    reason: str = "",
    expected_version: int | None = None,
    overridden: Sequence[GateFailure] = (),
    override_reason: str | None = None,
) -> Alias:
    """The alias, now naming `digest` to everyone; moving it where it is changes and records
    nothing.

    `expected_version` 0 means that the alias must be new. Raises NotFound for a revision that is
    not the policy's or was deleted, Conflict when the version is another one, or while a canary of
    another revision runs.
    """
    target = find_live_revision(connection, policy, digest)
    before = find_alias(connection, policy.policy_id, name)
    check_version(policy, name, before, expected_version)
    if before and before.digest == digest:
        return before
    if before and action != "rollback" and before.canary_digest not in (None, digest):
        raise Conflict(
            f"canary {before.canary_digest} of alias {name!r} is running; finish or abort it first"
        )
    if target.ephemeral:
        keep_revision(connection, policy, digest)  # a later rollback may want it
    return write_alias(
        connection,
        policy,
        name,
        before,
        {"digest": digest, **NO_CANARY},
        action,
        before.digest if before else None,
        digest,
        actor=actor,
        reason=reason,
        overridden=overridden,
        override_reason=override_reason,
    )


def _move_through_gates(
    connection: Connection,
    policy: Policy,
    name: str,
    digest: Digest,
    action: AliasAction,
    *,
    actor: str,
    reason: str,
    expected_version: int | None,
    override_reason: str | None,
) -> Alias:
    before = find_alias(connection, policy.policy_id, name)
    current = before.digest if before else None
    overridden: list[GateFailure] = []
    if digest != current:
        overridden = pass_gates(connection, policy, name, digest, current, override_reason)
    return move_alias(
        connection,
        policy,
        name,
        digest,
        action,
        actor=actor,
        reason=reason,
        expected_version=expected_version,
        overridden=overridden,
        override_reason=override_reason,
    )


class AliasRecords:
    """The aliases of every tenant."""

    _database: Database

    def set_alias(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        digest: str,
        *,
        actor: str,
        reason: str = "",
        expected_version: int | None = None,
    ) -> Alias:
        """Let `alias` name a revision. `digest` may be its start. Durable on return.

        Raises NotFound, Conflict when the alias is not at `expected_version` (0: must be new),
        GateFailed.
        """
        return self._move(
            tenant, policy, alias, digest, "set", actor, reason, expected_version, None
        )

    def promote(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        digest: str,
        *,
        actor: str,
        reason: str = "",
        expected_version: int | None = None,
        override_reason: str | None = None,
    ) -> Alias:
        """Serve a revision under `alias`. As `set_alias`, with its own word in the history.

        With `override_reason` gates don't hold it back; the reason and what they found are kept.
        """
        return self._move(
            tenant,
            policy,
            alias,
            digest,
            "promote",
            actor,
            reason,
            expected_version,
            override_reason,
        )

    def _move(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        digest: str,
        action: AliasAction,
        actor: str,
        reason: str,
        expected_version: int | None,
        override_reason: str | None,
    ) -> Alias:
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            return _move_through_gates(
                connection,
                owner,
                alias,
                find_by_prefix(connection, owner, digest).digest,
                action,
                actor=actor,
                reason=reason,
                expected_version=expected_version,
                override_reason=override_reason,
            )

    def finish_canary(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        *,
        actor: str,
        reason: str = "",
        expected_version: int | None = None,
        override_reason: str | None = None,
    ) -> Alias:
        """Promote the alias's canary. Raises as `promote`, and Conflict when there is none."""
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            before = known_alias(connection, owner, alias, expected_version)
            return _move_through_gates(
                connection,
                owner,
                alias,
                running_canary(owner, before),
                "promote",
                actor=actor,
                reason=reason,
                expected_version=expected_version,
                override_reason=override_reason,
            )

    def rollback(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        *,
        to_digest: str | None = None,
        actor: str,
        reason: str = "",
        expected_version: int | None = None,
    ) -> Alias:
        """Go back to `to_digest`, or undo what came last: a running canary is aborted; without one
        the alias names what it named before and is not deleted.

        Raises NotFound for an unknown alias or revision, Conflict when nothing lies before, or
        when the alias is not at `expected_version`.
        """
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            before = known_alias(connection, owner, alias, expected_version)
            if to_digest is None and before.canary_digest is not None:
                return end_canary(connection, owner, before, actor=actor, reason=reason)
            if to_digest is None:
                target = _previous(connection, owner, alias)
            else:
                target = find_by_prefix(connection, owner, to_digest).digest
            return move_alias(
                connection,
                owner,
                alias,
                target,
                "rollback",
                actor=actor,
                reason=reason,
                expected_version=expected_version,
            )

    def import_revision(
        self,
        tenant: Tenant,
        policy: str,
        base: BaseInfo,
        blob: SavedBytes,
        *,
        actor: str,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Revision:
        """A revision that was trained elsewhere; alias `latest` moves to it.

        Makes the policy where there is none. Raises InvalidRequest when it has another base.
        """
        with self._database.write() as connection:
            owner = get_or_create(connection, tenant, policy, base, actor=actor)
            added = put_revision(
                connection,
                owner,
                blob,
                run=None,
                origin="imported",
                ephemeral=False,
                user_metadata=user_metadata,
                actor=actor,
            )
            subject = f"{tenant}/{policy}@{added.digest}"
            note_event(connection, tenant, actor, "revision.import", subject)
            move_alias(connection, owner, LATEST, added.digest, "set", actor=actor)
            return added

    def aliases(self, tenant: Tenant, policy: str) -> list[Alias]:
        """A policy's aliases by name. Raises NotFound for the policy."""
        with self._database.read() as connection:
            owner = find_policy(connection, tenant, policy)
            query = ALIASES.where(t.alias.c.policy_id == owner.policy_id)
            return many(connection, Alias, query.order_by(t.alias.c.name))

    def alias(self, tenant: Tenant, policy: str, name: str) -> Alias:
        """Raises NotFound."""
        with self._database.read() as connection:
            owner = find_policy(connection, tenant, policy)
            if found := find_alias(connection, owner.policy_id, name):
                return found
        raise NotFound(f"policy {policy!r} has no alias {name[:200]!r}")

    def alias_history(
        self,
        tenant: Tenant,
        policy: str,
        alias: str | None = None,
        *,
        limit: int = 100,
        before_id: int | None = None,
    ) -> list[AliasEvent]:
        """Moves of one alias, or of all the policy's, newest first. Raises NotFound."""
        with self._database.read() as connection:
            owner = find_policy(connection, tenant, policy)
            query = ALIAS_EVENTS.where(t.alias_event.c.policy_id == owner.policy_id)
            if alias is not None:
                query = query.where(t.alias_event.c.alias == alias)
            if before_id is not None:
                query = query.where(t.alias_event.c.event_id < before_id)
            query = query.order_by(t.alias_event.c.event_id.desc()).limit(min(limit, MAX_LIST))
            return many(connection, AliasEvent, query)

    def resolve(self, tenant: Tenant, text: str, split_key: str | None = None) -> Resolved:
        """What an address means to `tenant` now; a bare policy is `prod` when set, else `latest`.

        Where the alias has a canary, the request's `split_key` decides which of the two is meant;
        without a key it is never the canary.
        Raises InvalidRequest for what is no address, NotFound, for another tenant's too.
        """
        address = PolicyAddress.parse(text)
        if address.tenant != tenant:
            raise NotFound(f"no policy {address!s}")
        with self._database.read() as connection:
            if address.digest_prefix is not None:
                owner = find_policy(connection, tenant, address.policy)
                return Resolved(find_by_prefix(connection, owner, address.digest_prefix), None)
            names = (address.alias,) if address.alias else (SERVED, LATEST)
            if resolved := _aliased(connection, tenant, address.policy, names, split_key):
                return resolved
            find_policy(connection, tenant, address.policy)
        raise NotFound(f"policy {address.policy!r} has no alias {address.alias or LATEST!r}")


def _aliased(
    connection: Connection,
    tenant: Tenant,
    policy: str,
    names: Sequence[str],
    split_key: str | None,
) -> Resolved | None:
    """What the first of the aliases that is there means; a canary costs one further query, and only
    those that go there."""
    query = _ALIASED.where(
        t.policy.c.tenant == tenant, t.policy.c.name == policy, t.alias.c.name.in_(names)
    )
    found = {row["alias"]: row for row in connection.execute(query).mappings()}
    name = next((name for name in names if name in found), None)
    if name is None:
        return None
    row = found[name]
    canary, share = row["canary_digest"], row["canary_share"]
    if canary is None or split_key is None:
        return Resolved(to_record(Revision, row), name)
    if not is_on_canary(tenant, policy, name, split_key, share):
        return Resolved(to_record(Revision, row), name)
    this = (t.revision.c.policy_id == row["policy_id"]) & (t.revision.c.digest == canary)
    revision = one(connection, Revision, REVISIONS.where(this))
    assert revision is not None
    return Resolved(revision, name)


_ITS_REVISION = (t.revision.c.policy_id == t.alias.c.policy_id) & (
    t.revision.c.digest == t.alias.c.digest
)
# Every alias names a revision; but only so does no database read all revisions of the policy first,
# to see which of them has an alias.
_ALIASED = select(*REVISIONS.selected_columns, t.alias.c.name.label("alias"), *CANARY).select_from(
    t.policy.join(t.alias).outerjoin(t.revision, _ITS_REVISION)
)


def past_of(connection: Connection, policy_id: int, alias: str) -> list[Digest]:
    """What the alias names, last, above all that it may be rolled back to, one after another."""
    event = t.alias_event.c
    mine = (event.policy_id == policy_id) & (event.alias == alias)
    moves = mine & event.action.in_(("set", "promote", "rollback"))
    query = select(event.action, event.to_digest).where(moves).order_by(event.event_id)
    stack: list[Digest] = []
    for action, target in connection.execute(query):
        if action == "rollback" and target in stack:
            while stack[-1] != target:
                stack.pop()
        else:
            stack.append(target)
    return stack


def _previous(connection: Connection, policy: Policy, alias: str) -> Digest:
    revision = t.revision.c
    stack = past_of(connection, policy.policy_id, alias)
    current = stack.pop()
    live = (revision.policy_id == policy.policy_id) & revision.deleted_at.is_(None)
    usable = set(connection.execute(select(revision.digest).where(live)).scalars()) - {current}
    for target in reversed(stack):
        if target in usable:
            return target
    raise Conflict(
        f"alias {alias!r} of {policy.name!r} named nothing before that is still there; "
        "name a digest to roll back to"
    )
