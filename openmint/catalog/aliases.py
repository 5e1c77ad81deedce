"""Aliases: movable names of revisions. A move is one transaction: row, event, audit.

The history of an alias is a stack. Setting and promoting push; a rollback goes back to what lay
below, so that rolling back twice does not return to what was rolled back first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, select, update

from openmint.catalog import tables as t
from openmint.catalog.address import LATEST, PolicyAddress
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database, now
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
)
from openmint.errors import Conflict, NotFound
from openmint.types import BaseInfo, Digest, Tenant

SERVED = "prod"


def find_alias(connection: Connection, policy_id: int, name: str) -> Alias | None:
    wanted = (t.alias.c.policy_id == policy_id) & (t.alias.c.name == name)
    return one(connection, Alias, ALIASES.where(wanted))


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
    """The alias, now naming `digest`; moving it where it is changes and records nothing.

    `expected_version` 0 means that the alias must be new. Raises NotFound for a revision that is
    not the policy's or was deleted, Conflict when the version is another one.
    """
    target = find_live_revision(connection, policy, digest)
    before = find_alias(connection, policy.policy_id, name)
    version = before.version if before else 0
    if expected_version is not None and expected_version != version:
        raise Conflict(
            f"alias {name!r} of {policy.name!r} is at version {version}, not {expected_version}; "
            "read it again"
        )
    if before and before.digest == digest:
        return before
    if target.ephemeral:
        keep_revision(connection, policy, digest)  # a later rollback may want it
    moved = {"digest": digest, "version": version + 1, "updated_at": now()}
    if before is None:
        row = {"policy_id": policy.policy_id, "name": name, **moved}
        connection.execute(t.alias.insert().values(**row))
    else:
        this = (t.alias.c.policy_id == policy.policy_id) & (t.alias.c.name == name)
        connection.execute(update(t.alias).where(this).values(**moved))
    came_from = before.digest if before else None
    connection.execute(
        t.alias_event.insert().values(
            policy_id=policy.policy_id,
            alias=name,
            action=action,
            from_digest=came_from,
            to_digest=digest,
            actor=actor,
            reason=reason,
            created_at=moved["updated_at"],
            override_reason=override_reason if overridden else None,
        )
    )
    details: dict[str, Any] = {"from": came_from, "to": digest, "reason": reason}
    if overridden:
        details["override_reason"] = override_reason
        details["overridden"] = [asdict(failure) for failure in overridden]
    subject = f"{policy.tenant}/{policy.name}@{name}"
    note_event(connection, policy.tenant, actor, f"alias.{action}", subject, details)
    after = find_alias(connection, policy.policy_id, name)
    assert after is not None
    return after


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
            target = find_by_prefix(connection, owner, digest).digest
            before = find_alias(connection, owner.policy_id, alias)
            current = before.digest if before else None
            overridden: list[GateFailure] = []
            if target != current:
                overridden = pass_gates(connection, owner, alias, target, current, override_reason)
            return move_alias(
                connection,
                owner,
                alias,
                target,
                action,
                actor=actor,
                reason=reason,
                expected_version=expected_version,
                overridden=overridden,
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
        """Go back to `to_digest`, or to what the alias named before and is not deleted.

        Raises NotFound for an unknown alias or revision, Conflict when nothing lies before, or
        when the alias is not at `expected_version`.
        """
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            if find_alias(connection, owner.policy_id, alias) is None:
                raise NotFound(f"policy {policy!r} has no alias {alias[:200]!r}")
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

    def resolve(self, tenant: Tenant, text: str) -> Resolved:
        """What an address means to `tenant` now; a bare policy is `prod` when set, else `latest`.

        Raises InvalidRequest for what is no address, NotFound, for another tenant's too.
        """
        address = PolicyAddress.parse(text)
        if address.tenant != tenant:
            raise NotFound(f"no policy {address!s}")
        with self._database.read() as connection:
            if address.digest_prefix is not None:
                owner = find_policy(connection, tenant, address.policy)
                return Resolved(find_by_prefix(connection, owner, address.digest_prefix), None)
            for name in (address.alias,) if address.alias else (SERVED, LATEST):
                if revision := _aliased(connection, tenant, address.policy, name):
                    return Resolved(revision, name)
            find_policy(connection, tenant, address.policy)
        raise NotFound(f"policy {address.policy!r} has no alias {address.alias or LATEST!r}")


def _aliased(connection: Connection, tenant: Tenant, policy: str, name: str) -> Revision | None:
    same = (t.alias.c.policy_id == t.revision.c.policy_id) & (
        t.alias.c.digest == t.revision.c.digest
    )
    query = REVISIONS.join(t.alias, same).where(
        t.policy.c.tenant == tenant, t.policy.c.name == policy, t.alias.c.name == name
    )
    return one(connection, Revision, query)


def _previous(connection: Connection, policy: Policy, alias: str) -> Digest:
    event, revision = t.alias_event.c, t.revision.c
    mine = (event.policy_id == policy.policy_id) & (event.alias == alias)
    query = select(event.action, event.to_digest).where(mine).order_by(event.event_id)
    stack: list[Digest] = []
    for action, target in connection.execute(query):
        if action == "rollback" and target in stack:
            while stack[-1] != target:
                stack.pop()
        else:
            stack.append(target)
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
