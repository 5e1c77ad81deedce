"""Clocks: the one furthest behind goes next, and idleness neither banks nor costs time."""

from __future__ import annotations

from dataclasses import dataclass

from openmint.scheduler.fairness import PhaseClock, TenantClock
from openmint.types import Tenant

A, B, C = Tenant("a"), Tenant("b"), Tenant("c")


@dataclass
class Item:
    tenant: Tenant
    name: str = ""


def order(clock: TenantClock, *tenants: Tenant) -> list[Tenant]:
    return [item.tenant for item in clock.in_order([Item(tenant) for tenant in tenants])]


def test_the_tenant_that_used_least_goes_first_and_each_in_its_own_order() -> None:
    clock = TenantClock()
    for tenant in (A, B):
        clock.arrive(tenant, [A])
    clock.charge(A, 10)
    items = [Item(A, "a1"), Item(B, "b1"), Item(A, "a2"), Item(B, "b2")]
    assert [item.name for item in clock.in_order(items)] == ["b1", "b2", "a1", "a2"]


def test_who_was_away_does_not_bank_time() -> None:
    clock = TenantClock()
    clock.arrive(A, [])
    clock.charge(A, 1000)
    clock.arrive(B, [A])
    clock.charge(B, 1)
    assert order(clock, A, B) == [A, B]


def test_who_used_an_idle_engine_owes_nothing_afterwards() -> None:
    clock = TenantClock()
    clock.arrive(A, [])
    clock.charge(A, 1_000_000)
    clock.arrive(B, [])
    clock.charge(B, 5)
    clock.arrive(A, [B])
    clock.charge(A, 1)
    assert order(clock, A, B) == [B, A]
    clock.charge(B, 2)
    assert order(clock, A, B) == [A, B]


def test_a_stream_of_requests_does_not_reset_its_own_clock() -> None:
    clock = TenantClock()
    clock.arrive(A, [])
    clock.arrive(B, [A])
    for _ in range(10):
        clock.arrive(A, [A, B])
        clock.charge(A, 10)
    assert order(clock, A, B) == [B, A]


def test_training_and_serving_share_seconds_evenly_while_both_wait() -> None:
    clock, train, serve = PhaseClock(), 0.0, 0.0
    for _ in range(1000):
        if clock.prefers_training():
            clock.charge_training(0.5, serving_waits=True)
            train += 0.5
        else:
            clock.charge_serving(0.03, training_waits=True)
            serve += 0.03
    assert abs(train - serve) <= 0.5
    assert (clock.train_seconds, round(clock.serve_seconds, 6)) == (train, round(serve, 6))


def test_seconds_used_alone_are_not_held_against_a_phase() -> None:
    clock = PhaseClock()
    clock.charge_training(100.0, serving_waits=False)
    assert clock.prefers_training()
    clock.charge_serving(100.0, training_waits=False)
    assert clock.prefers_training()
    clock.charge_training(1.0, serving_waits=True)
    assert not clock.prefers_training()
