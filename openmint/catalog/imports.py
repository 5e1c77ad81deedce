"""Imports of many revisions at once: few statements for all of them, one transaction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, func, select, update

from openmint.catalog import tables as t
from openmint.catalog.address import LATEST
from openmint.catalog.database import Database, now
from openmint.catalog.rows import MAX_LIST, SavedBytes, blob_values
from openmint.catalog.stored import counted
from openmint.errors import InvalidRequest
from openmint.types import BaseInfo, Digest, Tenant

Import = tuple[str, SavedBytes]
"""The name of a policy, and the bytes of its new revision."""


class ImportRecords:
    """Imports of every tenant."""

    _database: Database

    def policies_of_other_bases(
        self, tenant: Tenant, names: Iterable[str], base: BaseInfo
    ) -> set[str]:
        """Those of the names that are taken by policies of other bases."""
        owned = (t.policy.c.tenant == tenant) & t.policy.c.name.in_(list(names))
        query = select(t.policy.c.name).where(owned, t.policy.c.base_digest != base.digest)
        with self._database.read() as connection:
            return set(connection.execute(query).scalars())

    def import_revisions(
        self, tenant: Tenant, base: BaseInfo, imports: Sequence[Import], *, actor: str
    ) -> list[int]:
        """The revisions' numbers within their policies; durable on return, all or none.

        What `import_revision` would do for one after another, at most `MAX_LIST`, but each has one
        audit event, which says all of it. Raises InvalidRequest when a policy has another base.
        """
        assert len(imports) <= MAX_LIST
        with self._database.write() as connection:
            batch = _Batch(connection, tenant, base, actor)
            batch.find_policies({name for name, _ in imports})
            batch.find_revisions({blob.digest for _, blob in imports})
            numbers = [batch.add(name, blob) for name, blob in imports]
            with counted(connection, tenant, {blob.digest for _, blob in imports}):
                batch.write()
            return numbers


class _Batch:
    """What one transaction found and will write."""

    def __init__(self, connection: Connection, tenant: Tenant, base: BaseInfo, actor: str) -> None:
        self._connection, self._tenant = connection, tenant
        self._base, self._actor = base, actor
        self._created_at = now()
        self._policies: dict[str, int] = {}
        self._newest: dict[int, int] = {}
        """The number of each policy's newest revision."""
        self._numbers: dict[tuple[int, str], int] = {}
        self._latest: dict[int, tuple[Digest, int]] = {}
        """What `latest` names, and its version."""
        self._aliased: set[int] = set()
        """Policies that have a `latest` in the database."""
        self._moved: set[int] = set()
        self._revisions: list[dict[str, Any]] = []
        self._restored: list[dict[str, Any]] = []
        self._moves: list[dict[str, Any]] = []
        self._audit: list[dict[str, Any]] = []

    def find_policies(self, names: set[str]) -> None:
        """Raises InvalidRequest when one has another base; makes those that are not there."""
        self._read_policies(names)
        new = names - set(self._policies)
        made: list[dict[str, Any]] = [
            {
                "tenant": self._tenant,
                "name": name,
                "base_name": self._base.name,
                "base_digest": self._base.digest,
                "user_metadata": {},
                "created_at": self._created_at,
                "owner": self._actor,
            }
            for name in sorted(new)
        ]
        if made:
            self._connection.execute(t.policy.insert(), made)
            self._read_policies(new)
        alias = t.alias.c
        query = select(alias.policy_id, alias.digest, alias.version).where(
            alias.policy_id.in_(list(self._newest)), alias.name == LATEST
        )
        for policy_id, digest, version in self._connection.execute(query):
            self._latest[policy_id] = digest, version
        self._aliased = set(self._latest)

    def _read_policies(self, names: set[str]) -> None:
        policy, revision = t.policy.c, t.revision.c
        mine = revision.policy_id == policy.policy_id
        newest = select(func.max(revision.number)).where(mine).scalar_subquery()
        query = select(policy.name, policy.policy_id, policy.base_digest, newest).where(
            policy.tenant == self._tenant, policy.name.in_(list(names))
        )
        for name, policy_id, base_digest, number in self._connection.execute(query):
            if base_digest != self._base.digest:
                raise InvalidRequest(f"policy {name!r} belongs to another base")
            self._policies[name] = policy_id
            self._newest[policy_id] = number or 0

    def find_revisions(self, digests: set[Digest]) -> None:
        revision = t.revision.c
        query = select(revision.policy_id, revision.digest, revision.number)
        for policy_id, digest, number in self._connection.execute(
            query.where(revision.digest.in_(list(digests)))
        ):
            if policy_id in self._newest:
                self._numbers[policy_id, digest] = number
                self._restored.append({"of_policy": policy_id, "with_digest": digest})

    def add(self, name: str, blob: SavedBytes) -> int:
        """Its number, also when it is there already."""
        policy_id = self._policies[name]
        number = self._numbers.get((policy_id, blob.digest))
        if number is None:
            number = self._newest[policy_id] = self._newest[policy_id] + 1
            self._numbers[policy_id, blob.digest] = number
            self._revisions.append(
                {
                    "policy_id": policy_id,
                    "number": number,
                    **blob_values(blob),
                    "origin": "imported",
                    "ephemeral": False,
                    "user_metadata": {},
                    "created_at": self._created_at,
                    "owner": self._actor,
                }
            )
        self._note(name, blob.digest, number)
        self._move(policy_id, blob.digest)
        return number

    def _note(self, name: str, digest: Digest, number: int) -> None:
        self._audit.append(
            {
                "tenant": self._tenant,
                "actor": self._actor,
                "action": "revision.import",
                "subject": f"{self._tenant}/{name}@{digest}",
                "details": {"number": number, "alias": LATEST},
                "created_at": self._created_at,
            }
        )

    def _move(self, policy_id: int, digest: Digest) -> None:
        before, version = self._latest.get(policy_id, (None, 0))
        if before == digest:
            return
        self._latest[policy_id] = digest, version + 1
        self._moved.add(policy_id)
        self._moves.append(
            {
                "policy_id": policy_id,
                "alias": LATEST,
                "action": "set",
                "from_digest": before,
                "to_digest": digest,
                "actor": self._actor,
                "reason": "",
                "created_at": self._created_at,
            }
        )

    def write(self) -> None:
        revision, alias = t.revision.c, t.alias.c
        this = (revision.policy_id == bindparam("of_policy")) & (
            revision.digest == bindparam("with_digest")
        )
        kept = update(t.revision).where(this).values(deleted_at=None, ephemeral=False)
        named = (alias.policy_id == bindparam("of_policy")) & (alias.name == LATEST)
        moved = (
            update(t.alias)
            .where(named)
            .values(
                digest=bindparam("to_digest"),
                version=bindparam("to_version"),
                updated_at=self._created_at,
            )
        )
        self._execute(t.revision.insert(), self._revisions)
        self._execute(kept, self._restored)
        self._execute(t.alias.insert(), [self._alias(i) for i in self._moved - self._aliased])
        self._execute(moved, [self._target(i) for i in self._moved & self._aliased])
        self._execute(t.alias_event.insert(), self._moves)
        self._execute(t.audit_event.insert(), self._audit)

    def _alias(self, policy_id: int) -> dict[str, Any]:
        digest, version = self._latest[policy_id]
        return {
            "policy_id": policy_id,
            "name": LATEST,
            "digest": digest,
            "version": version,
            "updated_at": self._created_at,
        }

    def _target(self, policy_id: int) -> dict[str, Any]:
        digest, version = self._latest[policy_id]
        return {"of_policy": policy_id, "to_digest": digest, "to_version": version}

    def _execute(self, statement: Any, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            self._connection.execute(statement, rows)
