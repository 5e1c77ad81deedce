"""Pins at work: what pinned aliases name stays in the host memory of all workers of its base.

Workers are told the whole set when it changes and when they start, and hold it by themselves. Pins
take at most a part of that memory; where aliases have moved to more, the newest pins wait.
Lives on the event loop; the catalogue is read in threads.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import structlog

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Pin, Revision
from openmint.config import Settings
from openmint.errors import Conflict, OpenMintError
from openmint.service.background import Background
from openmint.service.limits import Limits
from openmint.service.workers import Workers
from openmint.types import BaseInfo, Digest, Tenant

log = structlog.get_logger(__name__)

PinState = Literal["held", "loading", "over_limit", "no_worker"]
"""In memory of every worker of the base; on its way there; beyond what pins may take; of a base
that isn't resident."""


@dataclass(frozen=True, slots=True)
class PinStatus:
    """A pin, and of each of its revisions the state, and the bytes where the base is resident."""

    pin: Pin
    states: tuple[tuple[PinState, int | None], ...]


class Plan:
    """What is held for pins that are taken in one after another, within the bounds."""

    def __init__(self, most_bytes: int, most_tenant_bytes: int) -> None:
        self.held: defaultdict[Digest, dict[Digest, None]] = defaultdict(dict)
        """Of each base."""
        self.of_tenant: defaultdict[Tenant, set[Digest]] = defaultdict(set)
        self._most_bytes, self._most_tenant_bytes = most_bytes, most_tenant_bytes
        self._used, self._used_by = Counter[Digest](), Counter[tuple[Digest, Tenant]]()

    def take(self, tenant: Tenant, base: BaseInfo, revision: Revision) -> str | None:
        """Hold it, or say why not. What is held already costs nothing more."""
        if revision.digest not in self.held[base.digest]:
            num_bytes, key = base.adapter_bytes(revision.spec), (base.digest, tenant)
            for whose, setting, used, most in (
                ("pins", "pin_share", self._used[base.digest], self._most_bytes),
                (
                    f"pins of tenant {tenant!r}",
                    "tenant_pin_share",
                    self._used_by[key],
                    self._most_tenant_bytes,
                ),
            ):
                if used + num_bytes > most:
                    return (
                        f"{whose} may take {most} bytes of a worker's host memory "
                        f"(service.{setting} of worker.host_bytes) and have {used}; revision "
                        f"{revision.digest} needs {num_bytes}. Unpin an alias, or raise one of them"
                    )
            self._used[base.digest] += num_bytes
            self._used_by[key] += num_bytes
            self.held[base.digest][revision.digest] = None
        self.of_tenant[tenant].add(revision.digest)
        return None


class Pinning:
    """The pins of this gateway."""

    def __init__(
        self, catalog: Catalog, workers: Workers, limits: Limits, settings: Settings
    ) -> None:
        self._catalog, self._workers, self._limits = catalog, workers, limits
        host_bytes = settings.worker.host_bytes
        self._most_bytes = int(settings.service.pin_share * host_bytes)
        self._most_tenant_bytes = int(settings.service.tenant_pin_share * host_bytes)
        self._plan = Plan(self._most_bytes, self._most_tenant_bytes)
        self._over_limit: list[str] = []
        self._lock = asyncio.Lock()
        self._background = Background()

    async def pin(self, tenant: Tenant, policy: str, alias: str, *, actor: str) -> PinStatus:
        """Keep what the alias names in memory from now on, also after its moves. Durable on return;
        loads go on afterwards. A retry changes nothing.

        Raises NotFound for the alias, or a base that isn't resident, Conflict when pins would take
        more than they may, LimitReached for the tenant's quota of adapters.
        """
        async with self._lock:
            pins = await asyncio.to_thread(self._catalog.pins)
            if _find(pins, tenant, policy, alias) is None:
                self._check(pins, tenant, self._named(tenant, policy, alias))
            await asyncio.to_thread(self._catalog.add_pin, tenant, policy, alias, actor=actor)
        pins = await self.apply()
        log.info("pinned", alias=f"{tenant}/{policy}@{alias}")
        pinned = _find(pins, tenant, policy, alias)
        assert pinned is not None
        return self._status(pinned)

    async def unpin(self, tenant: Tenant, policy: str, alias: str, *, actor: str) -> None:
        """Let what the alias names leave memory like any other. Raises NotFound for the alias; fine
        when it isn't pinned."""
        await asyncio.to_thread(self._catalog.remove_pin, tenant, policy, alias, actor=actor)
        await self.apply()
        log.info("unpinned", alias=f"{tenant}/{policy}@{alias}")

    async def statuses(self, tenant: Tenant) -> list[PinStatus]:
        """The tenant's pins, the oldest first, as of about a second ago."""
        pins = await asyncio.to_thread(self._catalog.pins)
        return [self._status(pin) for pin in pins if pin.tenant == tenant]

    def revisions(self, tenant: Tenant) -> set[Digest]:
        """Those that are held for the tenant."""
        return self._plan.of_tenant.get(tenant, set())

    def follow(self) -> None:
        """An alias has changed: hold what it names now, soon."""
        self._background.start(self._follow())

    async def apply(self) -> list[Pin]:
        """Tell each worker what to hold by the pins as they are now. Cheap when nothing changed."""
        async with self._lock:
            pins = await asyncio.to_thread(self._catalog.pins)
            self._plan, over_limit = self._planned(pins)
            for client in self._workers.all():
                client.hold(tuple(self._plan.held[client.base.digest]))
        if over_limit != self._over_limit:
            self._over_limit = over_limit
            log.warning("pins_over_limit", reasons=over_limit)
        return pins

    async def _follow(self) -> None:
        try:
            await self.apply()
        except OpenMintError as error:  # the next sweep tries again
            log.warning("pins_not_applied", error=error.message)

    def _planned(self, pins: Sequence[Pin]) -> tuple[Plan, list[str]]:
        """What is held for these pins, and why what is left out is not."""
        plan, reasons = Plan(self._most_bytes, self._most_tenant_bytes), []
        bases = self._bases()
        for pin in pins:
            for revision in pin.revisions:
                base = bases.get(revision.base_digest)
                if base and (reason := plan.take(pin.tenant, base, revision)):
                    reasons.append(reason)
        return plan, reasons

    def _check(self, pins: Sequence[Pin], tenant: Tenant, revisions: Sequence[Revision]) -> None:
        plan, _ = self._planned(pins)
        for revision in revisions:
            base = self._workers.by_digest(revision.base_digest).base
            if reason := plan.take(tenant, base, revision):
                raise Conflict(reason)
        self._limits.check_pin(tenant, {revision.digest for revision in revisions})

    def _named(self, tenant: Tenant, policy: str, name: str) -> list[Revision]:
        """What the alias names, and its canary."""
        alias = self._catalog.alias(tenant, policy, name)
        digests = [alias.digest, *([alias.canary_digest] if alias.canary_digest else [])]
        addresses = [f"{tenant}/{policy}@{digest}" for digest in digests]
        return [self._catalog.resolve(tenant, address).revision for address in addresses]

    def _bases(self) -> dict[Digest, BaseInfo]:
        return {client.base.digest: client.base for client in self._workers.first()}

    def _status(self, pin: Pin) -> PinStatus:
        bases = self._bases()
        states: list[tuple[PinState, int | None]] = []
        for revision in pin.revisions:
            base = bases.get(revision.base_digest)
            num_bytes = base.adapter_bytes(revision.spec) if base else None
            states.append((self._state(revision), num_bytes))
        return PinStatus(pin, tuple(states))

    def _state(self, revision: Revision) -> PinState:
        base = revision.base_digest
        clients = [each for each in self._workers.all() if each.base.digest == base]
        if not clients:
            return "no_worker"
        if revision.digest not in self._plan.held[base]:
            return "over_limit"
        is_held = all(client.is_resident(revision.digest) for client in clients)
        return "held" if is_held else "loading"


def _find(pins: Sequence[Pin], tenant: Tenant, policy: str, alias: str) -> Pin | None:
    wanted = tenant, policy, alias
    found = (pin for pin in pins if (pin.tenant, pin.policy_name, pin.alias) == wanted)
    return next(found, None)
