"""Schedules: when an evaluation is due, and of what."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Schedule
from openmint.errors import Conflict, NotFound
from openmint.types import Digest
from tests.catalog.made import ANN, BOB, RUN, add_run, blob, digest_of


@pytest.fixture
def trained(catalog: Catalog) -> Catalog:
    """Policy `math` with a task and without revisions."""
    add_run(catalog)
    catalog.put_task(ANN, "sums", digest_of("sums"), {"items": [1]})
    return catalog


def add_schedule(
    catalog: Catalog, *, task: str = "sums", every_hours: float | None = None
) -> Schedule:
    return catalog.add_schedule(
        ANN, "math", "latest", task, every_hours=every_hours, num_items=5, actor="ann"
    )


def save(catalog: Catalog, word: int) -> None:
    catalog.add_checkpoint(ANN, RUN, "sampler_weights", f"s{word}", blob(word))


def due(catalog: Catalog, hours: float = 0.0) -> list[Digest]:
    at = datetime.now(UTC) + timedelta(hours=hours)
    found = catalog.due_evaluations(at)
    for each in found:
        assert (each.tenant, each.policy) == (ANN, "math")
        catalog.note_scheduled(each.schedule, each.digest, at)
    return [each.digest for each in found]


def test_each_new_revision_is_due_once(trained: Catalog) -> None:
    schedule = add_schedule(trained)
    assert due(trained) == []
    save(trained, 1)
    (found,) = trained.due_evaluations(datetime.now(UTC))
    assert found.schedule == schedule and found.digest == digest_of(1)
    assert due(trained) == [digest_of(1)]
    assert due(trained, hours=1000) == []
    save(trained, 2)
    save(trained, 3)
    assert due(trained) == [digest_of(3)]


def test_what_an_alias_names_is_due_when_the_hours_are_over(trained: Catalog) -> None:
    add_schedule(trained, every_hours=24)
    save(trained, 1)
    assert due(trained) == [digest_of(1)]
    save(trained, 2)
    assert due(trained, hours=23) == []
    assert due(trained, hours=25) == [digest_of(2)]
    assert due(trained, hours=25) == []
    assert due(trained, hours=50) == [digest_of(2)]


def test_a_schedule_is_listed_and_removed(trained: Catalog) -> None:
    schedule = add_schedule(trained)
    save(trained, 1)
    assert trained.schedules(ANN, "math", "latest") == [schedule]
    for tenant, alias in ((BOB, "latest"), (ANN, "prod")):
        with pytest.raises(NotFound):
            trained.remove_schedule(tenant, "math", alias, schedule.schedule_id, actor="x")
    trained.remove_schedule(ANN, "math", "latest", schedule.schedule_id, actor="ann")
    assert due(trained) == []
    actions = [event.action for event in trained.audit(ANN)]
    assert "schedule.create" in actions and actions[0] == "schedule.delete"


def test_schedules_that_cannot_be_are_refused(trained: Catalog) -> None:
    with pytest.raises(NotFound, match="task"):
        add_schedule(trained, task="unknown")
    for _ in range(16):
        add_schedule(trained)
    with pytest.raises(Conflict, match="16"):
        add_schedule(trained)
