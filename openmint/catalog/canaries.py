"""Canaries: a second revision that an alias names for a share of its traffic.

Whose requests go there is decided by a hash of the alias and of a key that stays with the client.
A key's place in [0, 1) never changes, and the canary answers those below its share: raising the
share moves keys to the canary and none away from it.
"""

from __future__ import annotations

from hashlib import blake2b

from sqlalchemy import Connection

from openmint.catalog.address import LATEST
from openmint.catalog.alias_rows import NO_CANARY, known_alias, write_alias
from openmint.catalog.database import Database, now
from openmint.catalog.policies import find_policy
from openmint.catalog.records import Alias, Policy
from openmint.catalog.revisions import find_by_prefix, keep_revision
from openmint.errors import Conflict, InvalidRequest
from openmint.types import Digest, Tenant

PLACES = 1 << 64


def is_on_canary(tenant: Tenant, policy: str, alias: str, key: str, share: float) -> bool:
    """Whether a canary with this share of the alias answers requests with this key."""
    hashed = f"{tenant}/{policy}@{alias}\n{key}".encode("utf-8", "surrogatepass")
    place = int.from_bytes(blake2b(hashed, digest_size=8).digest(), "big")
    return place < share * PLACES


def end_canary(
    connection: Connection, policy: Policy, alias: Alias, *, actor: str, reason: str
) -> Alias:
    """The alias without its canary. Raises Conflict when it has none."""
    return write_alias(
        connection,
        policy,
        alias.name,
        alias,
        NO_CANARY,
        "canary_abort",
        running_canary(policy, alias),
        alias.digest,
        actor=actor,
        reason=reason,
    )


def running_canary(policy: Policy, alias: Alias) -> Digest:
    """The canary's revision. Raises Conflict when there is none."""
    if alias.canary_digest is None:
        raise Conflict(f"alias {alias.name!r} of {policy.name!r} has no canary")
    return alias.canary_digest


class CanaryRecords:
    """The canaries of every tenant's aliases."""

    _database: Database

    def set_canary(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        digest: str | None,
        share: float,
        *,
        actor: str,
        reason: str = "",
        expected_version: int | None = None,
    ) -> Alias:
        """Give a share of the alias's traffic to a revision, by its digest or the start of it, or
        to the one that is the canary already. Durable on return; a retry changes nothing.

        Raises NotFound for the alias or the revision, InvalidRequest for a share outside (0, 1) or
        a canary of `latest`, Conflict when another canary runs, when the alias names the revision
        to everyone, or is not at `expected_version`.
        """
        if not 0 < share < 1:
            raise InvalidRequest(
                f"a canary's share is above 0 and below 1, got {share:g}; to give it all traffic, "
                "finish it"
            )
        if alias == LATEST:
            raise InvalidRequest(f"alias {LATEST!r} follows every save; use another")
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            before = known_alias(connection, owner, alias, expected_version)
            if digest is None:
                target = running_canary(owner, before)
            else:
                target = find_by_prefix(connection, owner, digest).digest
            if before.canary_digest == target and before.canary_share == share:
                return before
            if before.digest == target:
                raise Conflict(f"alias {alias!r} of {policy!r} names {target} for everyone already")
            if before.canary_digest not in (None, target):
                running = f"canary {before.canary_digest} of alias {alias!r} is running"
                raise Conflict(f"{running}; finish or abort it first")
            keep_revision(connection, owner, target)
            since = before.canary_since or now()
            return write_alias(
                connection,
                owner,
                alias,
                before,
                {"canary_digest": target, "canary_share": share, "canary_since": since},
                "canary_share" if before.canary_digest else "canary_start",
                before.digest,
                target,
                actor=actor,
                reason=reason,
                share=share,
            )

    def abort_canary(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        *,
        actor: str,
        reason: str = "",
        expected_version: int | None = None,
    ) -> Alias:
        """All traffic back to what the alias names. Durable on return.

        Raises NotFound, Conflict when there is no canary or the version has changed.
        """
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            before = known_alias(connection, owner, alias, expected_version)
            return end_canary(connection, owner, before, actor=actor, reason=reason)
