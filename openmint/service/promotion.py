"""Which revision an alias names: promotion, canary and rollback, one transaction each. Tags, too.

The change holds for every request admitted after it returns; a request in flight keeps the revision
that it was admitted with. Lives on the event loop; writes run in threads.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from openmint.catalog.address import NAME, PolicyAddress
from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Alias, Revision
from openmint.errors import InvalidRequest
from openmint.service.prewarming import Prewarming
from openmint.types import Digest, Tenant

log = structlog.get_logger(__name__)

DEFAULT = "default"
"""In place of a reference: what `tenant/policy` alone serves."""


@dataclass(frozen=True, slots=True)
class Promotion:
    catalog: Catalog
    prewarming: Prewarming

    async def promote(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        reference: str,
        *,
        actor: str,
        reason: str,
        expected_version: int | None,
        override_reason: str | None,
    ) -> Alias:
        """Point `alias` at the revision that `reference` names within the policy.

        Durable on return. A retry is harmless: it adds an event that moves nothing. Raises
        NotFound, InvalidRequest for a malformed name, Conflict when the alias is not at
        `expected_version` any more, GateFailed without an `override_reason` when the revision does
        not pass the alias's gates.
        """
        revision = self.revision(tenant, policy, reference)
        moved = await asyncio.to_thread(
            self.catalog.promote,
            tenant,
            policy,
            check_alias(alias),
            revision.digest,
            actor=actor,
            reason=reason,
            expected_version=expected_version,
            override_reason=override_reason,
        )
        self.prewarming.after_move(tenant, policy, moved.digest)
        log.info("promoted", policy=f"{tenant}/{policy}", alias=alias, digest=moved.digest)
        return moved

    async def rollback(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        *,
        actor: str,
        reason: str,
        expected_version: int | None,
    ) -> Alias:
        """Undo what came last: abort a running canary, else point `alias` back at what it named
        before. Durable on return.

        Raises NotFound, Conflict when there is nothing before or the version has changed.
        """
        moved = await asyncio.to_thread(
            self.catalog.rollback,
            tenant,
            policy,
            alias,
            actor=actor,
            reason=reason,
            expected_version=expected_version,
        )
        self.prewarming.after_move(tenant, policy, moved.digest)
        log.info("rolled_back", policy=f"{tenant}/{policy}", alias=alias, digest=moved.digest)
        return moved

    async def set_canary(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        reference: str | None,
        share: float,
        *,
        actor: str,
        reason: str,
        expected_version: int | None,
    ) -> Alias:
        """Give a share of the alias's traffic to the revision that `reference` names, or to the one
        that has a share already. Durable on return; a retry changes nothing.

        Raises NotFound, InvalidRequest for a share outside (0, 1), Conflict while another canary
        runs or when the version has changed.
        """
        digest = self.revision(tenant, policy, reference).digest if reference else None
        changed = await asyncio.to_thread(
            self.catalog.set_canary,
            tenant,
            policy,
            alias,
            digest,
            share,
            actor=actor,
            reason=reason,
            expected_version=expected_version,
        )
        assert changed.canary_digest is not None
        self.prewarming.after_move(tenant, policy, changed.canary_digest)
        canary = changed.canary_digest
        log.info("canary", policy=f"{tenant}/{policy}", alias=alias, digest=canary, share=share)
        return changed

    async def finish_canary(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        *,
        actor: str,
        reason: str,
        expected_version: int | None,
        override_reason: str | None,
    ) -> Alias:
        """Promote the canary. Raises as `promote`, and Conflict when there is none."""
        moved = await asyncio.to_thread(
            self.catalog.finish_canary,
            tenant,
            policy,
            alias,
            actor=actor,
            reason=reason,
            expected_version=expected_version,
            override_reason=override_reason,
        )
        self.prewarming.after_move(tenant, policy, moved.digest)
        log.info("promoted", policy=f"{tenant}/{policy}", alias=alias, digest=moved.digest)
        return moved

    async def abort_canary(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        *,
        actor: str,
        reason: str,
        expected_version: int | None,
    ) -> Alias:
        """All traffic back to what the alias names. Durable on return.

        Raises NotFound, Conflict when there is no canary or the version has changed.
        """
        kept = await asyncio.to_thread(
            self.catalog.abort_canary,
            tenant,
            policy,
            alias,
            actor=actor,
            reason=reason,
            expected_version=expected_version,
        )
        self.prewarming.after_move(tenant, policy, kept.digest)
        log.info("canary_aborted", policy=f"{tenant}/{policy}", alias=alias, digest=kept.digest)
        return kept

    async def delete_revision(
        self, tenant: Tenant, policy: str, digest: Digest, *, actor: str
    ) -> None:
        """Mark the revision deleted. Raises NotFound, Conflict while an alias names it."""
        await asyncio.to_thread(self.catalog.delete_revision, tenant, policy, digest, actor=actor)

    async def set_tag(
        self, tenant: Tenant, policy: str, reference: str | None, tag: str, *, actor: str
    ) -> None:
        """Tag the policy, or the revision that `reference` names; durable on return.

        Raises NotFound, InvalidRequest for a malformed tag or reference, or too many tags.
        """
        if not NAME.fullmatch(tag):
            raise InvalidRequest(f"a tag matches {NAME.pattern}, got {tag[:200]!r}")
        digest = self._digest(tenant, policy, reference)
        await asyncio.to_thread(self.catalog.set_tag, tenant, policy, digest, tag, actor=actor)

    async def unset_tag(
        self, tenant: Tenant, policy: str, reference: str | None, tag: str, *, actor: str
    ) -> None:
        """Take a tag away; fine when it is not there. Raises as `set_tag`."""
        digest = self._digest(tenant, policy, reference)
        await asyncio.to_thread(self.catalog.unset_tag, tenant, policy, digest, tag, actor=actor)

    def _digest(self, tenant: Tenant, policy: str, reference: str | None) -> Digest | None:
        return None if reference is None else self.revision(tenant, policy, reference).digest

    def revision(self, tenant: Tenant, policy: str, reference: str) -> Revision:
        """The policy's revision by digest, the start of one, alias, or `default`.

        Raises NotFound, InvalidRequest for a malformed reference.
        """
        if reference == DEFAULT:
            address = PolicyAddress(tenant, policy)
        else:
            address = PolicyAddress.parse(f"{tenant}/{policy}@{reference}")
        return self.catalog.resolve(tenant, str(address)).revision


def check_alias(name: str) -> str:
    """An alias that may be made. Raises InvalidRequest with the rule."""
    if not NAME.fullmatch(name) or name == DEFAULT:
        raise InvalidRequest(f"an alias matches {NAME.pattern} and is not {DEFAULT!r}")
    return name


def parse_if_match(header: str | None) -> int | None:
    """The version in an `If-Match: "3"` header; None without one."""
    if header is None or header.strip() == "*":
        return None
    text = header.strip().removeprefix('"').removesuffix('"')
    if not text.isdecimal() or len(text) > 18:
        raise InvalidRequest(f'If-Match must be a version such as "3", got {header[:80]!r}')
    return int(text)


def full_digest(text: str) -> Digest:
    """A whole digest. Raises InvalidRequest for anything else."""
    if not text.startswith("sha256:") or len(text) != 71:
        raise InvalidRequest(f"{text[:100]!r} is not a digest: sha256: and 64 hex digits")
    return Digest(text)
