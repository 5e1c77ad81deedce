"""Pins: which aliases they are of, what they name, and what is left of them in the audit trail."""

from __future__ import annotations

import pytest
from sqlalchemy.dialects import sqlite

from openmint.catalog import pins as module
from openmint.catalog.catalog import Catalog
from openmint.errors import Conflict, NotFound
from openmint.types import Tenant
from tests.catalog.made import ANN, BOB, RUN, add_run, blob, digest_of


@pytest.fixture
def trained(catalog: Catalog) -> Catalog:
    """Policy `math` with revisions 1 to 3; `prod` names 2, `staging` 1, `next` 3."""
    add_run(catalog)
    for i in (1, 2, 3):
        catalog.add_run_revision(ANN, RUN, blob(i), ephemeral=False)
    for alias, i in (("prod", 2), ("staging", 1), ("next", 3)):
        catalog.promote(ANN, "math", alias, digest_of(i), actor="ann")
    return catalog


def named(catalog: Catalog) -> list[tuple[str, list[object]]]:
    return [(pin.alias, [each.digest for each in pin.revisions]) for pin in catalog.pins()]


def test_a_pin_follows_its_alias_and_its_canary(trained: Catalog) -> None:
    trained.add_pin(ANN, "math", "prod", actor="ann")
    (pin,) = trained.pins()
    assert (pin.tenant, pin.policy_name, pin.alias) == (ANN, "math", "prod")
    assert pin.revisions[0].number == 2
    trained.set_canary(ANN, "math", "prod", digest_of(1), 0.1, actor="ann")
    assert named(trained) == [("prod", [digest_of(2), digest_of(1)])]
    trained.finish_canary(ANN, "math", "prod", actor="ann")
    assert named(trained) == [("prod", [digest_of(1)])]
    trained.rollback(ANN, "math", "prod", actor="ann")
    assert named(trained) == [("prod", [digest_of(2)])]


def test_pins_come_the_oldest_first_and_each_once(trained: Catalog) -> None:
    for alias in ("staging", "next", "staging", "prod"):
        trained.add_pin(ANN, "math", alias, actor="ann")
    numbers = {"staging": 1, "next": 3, "prod": 2}
    assert named(trained) == [(alias, [digest_of(n)]) for alias, n in numbers.items()]
    trained.remove_pin(ANN, "math", "next", actor="ann")
    assert [pin.alias for pin in trained.pins()] == ["staging", "prod"]


def test_two_policies_may_pin_one_revision(trained: Catalog) -> None:
    run = add_run(trained, BOB, "b0b")
    trained.add_run_revision(BOB, run, blob(2), ephemeral=False)
    trained.promote(BOB, "math", "prod", digest_of(2), actor="bob")
    trained.add_pin(ANN, "math", "prod", actor="ann")
    trained.add_pin(BOB, "math", "prod", actor="bob")
    assert [(pin.tenant, len(pin.revisions)) for pin in trained.pins()] == [(ANN, 1), (BOB, 1)]


def test_only_an_alias_that_is_there_is_pinned_or_unpinned(trained: Catalog) -> None:
    for change in (trained.add_pin, trained.remove_pin):
        for tenant, policy, alias in (
            (ANN, "math", "nobody"),
            (ANN, "nothing", "prod"),
            (BOB, "math", "prod"),
        ):
            with pytest.raises(NotFound):
                change(tenant, policy, alias, actor="x")
    assert trained.pins() == []


def test_the_trail_says_who_pinned_and_nothing_of_repetitions(trained: Catalog) -> None:
    for _ in range(2):
        trained.add_pin(ANN, "math", "prod", actor="ann")
    for _ in range(2):
        trained.remove_pin(ANN, "math", "prod", actor="bob")
    events = [each for each in trained.audit(ANN) if "pin" in each.action]
    assert [(each.action, each.actor, each.subject) for each in events] == [
        ("alias.unpin", "bob", "ann/math@prod"),
        ("alias.pin", "ann", "ann/math@prod"),
    ]


def test_a_tenant_has_so_many_pins_and_no_more(
    trained: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PINS", 2)
    for alias in ("prod", "staging", "staging"):
        trained.add_pin(ANN, "math", alias, actor="ann")
    with pytest.raises(Conflict, match="2 pins; unpin"):
        trained.add_pin(ANN, "math", "next", actor="ann")
    assert [pin.alias for pin in trained.pins()] == ["prod", "staging"]
    other = Tenant("cid")
    run = add_run(trained, other, "c1d")
    trained.add_run_revision(other, run, blob(9), ephemeral=False)
    trained.promote(other, "math", "prod", digest_of(9), actor="cid")
    trained.add_pin(other, "math", "prod", actor="cid")


def test_sqlite_begins_with_the_pins_however_many_aliases_there_are(
    trained: Catalog, kind: str
) -> None:
    if kind == "postgresql":
        pytest.skip("its statistics know which table is small")
    statement = str(module._PINS.compile(dialect=sqlite.dialect()))
    with trained._database.read() as connection:
        rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}").all()
    assert [row[3] for row in rows if row[3].startswith("SCAN")] == ["SCAN pin"]
