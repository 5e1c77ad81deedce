"""Addresses as text: `tenant/policy[@alias | @sha256:…]` and `tinker://run/segment/name`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from openmint.catalog.records import Segment
from openmint.errors import InvalidRequest
from openmint.types import RunId, Tenant

SCHEME = "tinker://"
SEGMENTS: tuple[Segment, ...] = ("weights", "sampler_weights", "external_weights")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
DIGEST_PREFIX = re.compile(r"sha256:[0-9a-f]{12,64}")
SHOWN_CHARS = 300
LATEST = "latest"
"""The alias that follows every save and import of a policy."""


@dataclass(frozen=True, slots=True)
class PolicyAddress:
    """A policy, and what of it: an alias, a digest (or its start), or what is served by default."""

    tenant: Tenant
    policy: str
    alias: str | None = None
    digest_prefix: str | None = None

    def __str__(self) -> str:
        which = self.alias or self.digest_prefix
        return f"{self.tenant}/{self.policy}" + (f"@{which}" if which else "")

    @classmethod
    def parse(cls, text: str) -> PolicyAddress:
        """The parts of `text`. Raises InvalidRequest that shows the grammar."""
        path, at, which = text.partition("@")
        tenant, slash, policy = path.partition("/")
        if not (slash and NAME.fullmatch(tenant) and NAME.fullmatch(policy)):
            raise _not_an_address(text)
        if not at:
            return cls(Tenant(tenant), policy)
        if DIGEST_PREFIX.fullmatch(which):
            return cls(Tenant(tenant), policy, digest_prefix=which)
        if not NAME.fullmatch(which):
            raise _not_an_address(text)
        return cls(Tenant(tenant), policy, alias=which)


def _not_an_address(text: str) -> InvalidRequest:
    return InvalidRequest(
        f"{text[:SHOWN_CHARS]!r} is not tenant/policy, tenant/policy@alias or "
        "tenant/policy@sha256:<12 to 64 hex digits>"
    )


@dataclass(frozen=True, slots=True)
class TinkerPath:
    """`tinker://<run_id>/<segment>/<name>`."""

    run_id: RunId
    segment: Segment
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.run_id}/{self.segment}/{self.name}"

    @classmethod
    def parse(cls, path: str) -> TinkerPath:
        """The parts of `path`. Raises InvalidRequest that shows the grammar."""
        parts = path.removeprefix(SCHEME).split("/")
        if not path.startswith(SCHEME) or len(parts) != 3 or not all(parts):
            shown = path[:SHOWN_CHARS]
            raise InvalidRequest(f"path {shown!r} is not tinker://<run_id>/<segment>/<name>")
        return cls(RunId(parts[0]), segment_of(parts[1]), parts[2])


def segment_of(text: str) -> Segment:
    """A checkpoint segment. Raises InvalidRequest, naming the three there are."""
    if text not in SEGMENTS:
        raise InvalidRequest(f"segment {text[:80]!r} is unknown; use one of {', '.join(SEGMENTS)}")
    return text
