"""Tags: words that a tenant puts on its policies and revisions, to find them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, delete, select

from openmint.catalog import tables as t
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database
from openmint.catalog.policies import find_policy
from openmint.catalog.revisions import find_live_revision
from openmint.errors import InvalidRequest
from openmint.types import Digest, Tenant

MAX_TAGS = 64
"""Of one policy or revision."""


class TagRecords:
    """The tags of every tenant."""

    _database: Database

    def set_tag(
        self, tenant: Tenant, policy: str, digest: Digest | None, tag: str, *, actor: str
    ) -> None:
        """Tag the policy, or its revision of that digest; safe to repeat, durable on return.

        Raises NotFound, InvalidRequest for one tag too many.
        """
        with self._database.write() as connection:
            place = _Place(connection, tenant, policy, digest)
            if tag in place.tags():
                return
            if len(place.tags()) >= MAX_TAGS:
                raise InvalidRequest(f"{place.subject} has {MAX_TAGS} tags; unset one first")
            connection.execute(place.table.insert().values(tag=tag, **place.values))
            note_event(connection, tenant, actor, f"{place.noun}.tag", place.subject, {"tag": tag})

    def unset_tag(
        self, tenant: Tenant, policy: str, digest: Digest | None, tag: str, *, actor: str
    ) -> None:
        """Take the tag away; fine when it is not there. Raises NotFound for what would have it."""
        with self._database.write() as connection:
            place = _Place(connection, tenant, policy, digest)
            if tag not in place.tags():
                return
            connection.execute(delete(place.table).where(place.mine, place.table.c.tag == tag))
            details = {"tag": tag}
            note_event(connection, tenant, actor, f"{place.noun}.untag", place.subject, details)

    def tags(self, tenant: Tenant, policy: str, digest: Digest | None = None) -> list[str]:
        """Of the policy, or of its revision. Raises NotFound."""
        with self._database.read() as connection:
            return _Place(connection, tenant, policy, digest).tags()


class _Place:
    """What has the tags. Raises NotFound when it isn't there."""

    def __init__(
        self, connection: Connection, tenant: Tenant, policy: str, digest: Digest | None
    ) -> None:
        self._connection = connection
        owner = find_policy(connection, tenant, policy)
        self.values: Mapping[str, Any] = {
            "tenant": tenant,
            "policy_name": policy,
            "policy_id": owner.policy_id,
        }
        self.noun, self.table, self.subject = "policy", t.policy_tag, f"{tenant}/{policy}"
        if digest is not None:
            found = find_live_revision(connection, owner, digest)
            self.noun, self.table = "revision", t.revision_tag
            self.subject += f"@{digest}"
            self.values = {**self.values, "number": found.number, "digest": digest}
        self.mine = self._mine(self.table, owner.policy_id, digest)

    @staticmethod
    def _mine(table: Table, policy_id: int, digest: Digest | None) -> ColumnElement[bool]:
        mine: ColumnElement[bool] = table.c.policy_id == policy_id
        return mine if digest is None else mine & (table.c.digest == digest)

    def tags(self) -> list[str]:
        query = select(self.table.c.tag).where(self.mine).order_by(self.table.c.tag)
        return list(self._connection.execute(query).scalars())
