"""Pins: aliases whose revisions are to stay in host memory, whatever they name."""

from __future__ import annotations

from itertools import groupby

from sqlalchemy import ColumnElement, Connection, RowMapping, delete, select

from openmint.catalog import tables as t
from openmint.catalog.alias_rows import known_alias
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database, now
from openmint.catalog.policies import find_policy
from openmint.catalog.records import Pin, Policy, Revision
from openmint.catalog.rows import REVISIONS, to_record
from openmint.errors import Conflict
from openmint.types import Tenant

MAX_PINS = 1000
"""Of a tenant."""


class PinRecords:
    """The pins of every tenant's aliases."""

    _database: Database

    def add_pin(self, tenant: Tenant, policy: str, alias: str, *, actor: str) -> None:
        """Durable on return; an alias that is pinned stays as it is. Raises NotFound for the alias,
        Conflict when the tenant has too many pins."""
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            known_alias(connection, owner, alias, None)
            if connection.execute(select(t.pin).where(_this(owner, alias))).first():
                return
            owners = select(t.policy.c.tenant).join_from(t.pin, t.policy, isouter=True)
            if list(connection.execute(owners).scalars()).count(tenant) >= MAX_PINS:
                raise Conflict(f"tenant {tenant!r} has {MAX_PINS} pins; unpin an alias first")
            row = {"policy_id": owner.policy_id, "alias": alias, "created_at": now()}
            connection.execute(t.pin.insert().values(**row))
            _note(connection, owner, alias, actor, "alias.pin")

    def remove_pin(self, tenant: Tenant, policy: str, alias: str, *, actor: str) -> None:
        """Fine for an alias that isn't pinned. Raises NotFound for one that isn't there."""
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            known_alias(connection, owner, alias, None)
            if connection.execute(delete(t.pin).where(_this(owner, alias))).rowcount:
                _note(connection, owner, alias, actor, "alias.unpin")

    def pins(self) -> list[Pin]:
        """All, of every tenant, the oldest first, with what their aliases name now."""
        with self._database.read() as connection:
            rows = connection.execute(_PINS).mappings().all()
        return [
            _pin_of(list(group))
            for _, group in groupby(rows, lambda row: (row["policy_id"], row["alias"]))
        ]


def _pin_of(rows: list[RowMapping]) -> Pin:
    first = rows[0]
    return Pin(
        tenant=first["tenant"],
        policy_name=first["policy_name"],
        alias=first["alias"],
        created_at=first["pinned_at"],
        revisions=tuple(to_record(Revision, row) for row in rows),
    )


def _this(policy: Policy, alias: str) -> ColumnElement[bool]:
    return (t.pin.c.policy_id == policy.policy_id) & (t.pin.c.alias == alias)


def _note(connection: Connection, policy: Policy, alias: str, actor: str, action: str) -> None:
    subject = f"{policy.tenant}/{policy.name}@{alias}"
    note_event(connection, policy.tenant, actor, action, subject)


_OF_ALIAS = t.revision.c.digest.in_([t.alias.c.digest, t.alias.c.canary_digest])
_PINS = (
    select(*REVISIONS.selected_columns, t.pin.c.alias, t.pin.c.created_at.label("pinned_at"))
    # Outer joins, which all have their match, so that SQLite begins with the few pins.
    .join_from(t.pin, t.policy, isouter=True)
    .join(
        t.alias,
        (t.alias.c.policy_id == t.pin.c.policy_id) & (t.alias.c.name == t.pin.c.alias),
        isouter=True,
    )
    .join(t.revision, (t.revision.c.policy_id == t.pin.c.policy_id) & _OF_ALIAS, isouter=True)
    .order_by(
        t.pin.c.created_at,
        t.pin.c.policy_id,
        t.pin.c.alias,
        t.revision.c.digest != t.alias.c.digest,
    )
)
"""What pinned aliases name, and after it their canaries."""
