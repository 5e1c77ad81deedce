"""Who goes next: virtual clocks, as in weighted fair queueing (Demers, Keshav and Shenker, 1989).

Each flow's clock advances by what it used; the flow that is furthest behind goes first. A flow that
was idle does not bank time: on its return its clock jumps to the least of the busy ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from openmint.types import Tenant


class OfTenant(Protocol):
    @property
    def tenant(self) -> Tenant: ...


Item = TypeVar("Item", bound=OfTenant)


class TenantClock:
    """Tokens that each tenant has used, training and sampling together."""

    def __init__(self) -> None:
        self._used: dict[Tenant, float] = {}

    def arrive(self, tenant: Tenant, busy: Iterable[Tenant]) -> None:
        """A tenant has new work; `busy` are those with work already, itself perhaps included."""
        others = [self._used.get(other, 0.0) for other in busy]
        if not others:
            # Nobody competes: who used an idle engine owes nothing to those who come later.
            self._used.clear()
        self._used[tenant] = max(self._used.get(tenant, 0.0), min(others, default=0.0))

    def charge(self, tenant: Tenant, num_tokens: int) -> None:
        self._used[tenant] = self._used.get(tenant, 0.0) + num_tokens

    def used(self, tenant: Tenant) -> float:
        return self._used.get(tenant, 0.0)

    def in_order(self, items: Iterable[Item]) -> list[Item]:
        """Items of the tenant furthest behind first; first come, first served within a tenant."""
        return sorted(items, key=lambda item: self.used(item.tenant))


class PhaseClock:
    """Engine seconds given to training and to serving; the one with less goes next."""

    def __init__(self) -> None:
        self.train_seconds = 0.0
        self.serve_seconds = 0.0
        self._lead = 0.0
        """Seconds that training is ahead of serving since both last had work."""

    def prefers_training(self) -> bool:
        return self._lead <= 0.0

    def charge_training(self, seconds: float, serving_waits: bool) -> None:
        self.train_seconds += seconds
        self._lead = self._lead + seconds if serving_waits else 0.0

    def charge_serving(self, seconds: float, training_waits: bool) -> None:
        self.serve_seconds += seconds
        self._lead = self._lead - seconds if training_waits else 0.0
