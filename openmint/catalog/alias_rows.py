"""One alias's row, and how it changes: row, event and audit in the caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, update

from openmint.catalog import tables as t
from openmint.catalog.audit import note_event
from openmint.catalog.database import now
from openmint.catalog.records import Alias, AliasAction, GateFailure, Policy
from openmint.catalog.rows import ALIASES, one
from openmint.errors import Conflict, NotFound
from openmint.types import Digest

NO_CANARY: Mapping[str, Any] = {"canary_digest": None, "canary_share": None, "canary_since": None}


def find_alias(connection: Connection, policy_id: int, name: str) -> Alias | None:
    wanted = (t.alias.c.policy_id == policy_id) & (t.alias.c.name == name)
    return one(connection, Alias, ALIASES.where(wanted))


def known_alias(
    connection: Connection, policy: Policy, name: str, expected_version: int | None
) -> Alias:
    """Raises NotFound, Conflict when it is at another version."""
    found = find_alias(connection, policy.policy_id, name)
    if found is None:
        raise NotFound(f"policy {policy.name!r} has no alias {name[:200]!r}")
    check_version(policy, name, found, expected_version)
    return found


def check_version(
    policy: Policy, name: str, alias: Alias | None, expected_version: int | None
) -> None:
    """`expected_version` 0 means that the alias must be new. Raises Conflict."""
    version = alias.version if alias else 0
    if expected_version is not None and expected_version != version:
        raise Conflict(
            f"alias {name!r} of {policy.name!r} is at version {version}, not {expected_version}; "
            "read it again"
        )


def write_alias(
    connection: Connection,
    policy: Policy,
    name: str,
    before: Alias | None,
    values: Mapping[str, Any],
    action: AliasAction,
    from_digest: Digest | None,
    to_digest: Digest,
    *,
    actor: str,
    reason: str,
    share: float | None = None,
    overridden: Sequence[GateFailure] = (),
    override_reason: str | None = None,
) -> Alias:
    """The alias with these values, one version on; history and audit say how it came to that."""
    written = {**values, "version": before.version + 1 if before else 1, "updated_at": now()}
    if before is None:
        row = {"policy_id": policy.policy_id, "name": name, **written}
        connection.execute(t.alias.insert().values(**row))
    else:
        this = (t.alias.c.policy_id == policy.policy_id) & (t.alias.c.name == name)
        connection.execute(update(t.alias).where(this).values(**written))
    connection.execute(
        t.alias_event.insert().values(
            policy_id=policy.policy_id,
            alias=name,
            action=action,
            from_digest=from_digest,
            to_digest=to_digest,
            actor=actor,
            reason=reason,
            created_at=written["updated_at"],
            share=share,
            override_reason=override_reason if overridden else None,
        )
    )
    details: dict[str, Any] = {"from": from_digest, "to": to_digest, "reason": reason}
    if share is not None:
        details["share"] = share
    if overridden:
        details["override_reason"] = override_reason
        details["overridden"] = [asdict(failure) for failure in overridden]
    subject = f"{policy.tenant}/{policy.name}@{name}"
    note_event(connection, policy.tenant, actor, f"alias.{action}", subject, details)
    after = find_alias(connection, policy.policy_id, name)
    assert after is not None
    return after
