"""Every change of the catalogue leaves an event in the same transaction."""

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Quota
from openmint.types import SessionId
from tests.catalog.made import ANN, BASE, SESSION, add_run, blob, digest_of


def test_a_life_leaves_an_event_for_each_change(catalog: Catalog) -> None:
    run = add_run(catalog)
    sampled = ("sampler_weights", "one")
    catalog.add_checkpoint(ANN, run, *sampled, blob(1))
    catalog.add_run_revision(ANN, run, blob(2), ephemeral=True)
    catalog.import_revision(ANN, "imported", BASE, blob(3), actor="key")
    catalog.promote(ANN, "math", "prod", digest_of(1), actor="key")
    catalog.promote(ANN, "math", "prod", digest_of(2), actor="key")
    catalog.rollback(ANN, "math", "prod", actor="key")
    catalog.set_checkpoint_public(ANN, run, *sampled, True, actor="key")
    catalog.set_checkpoint_ttl(ANN, run, *sampled, 3600.0)
    catalog.put_task(ANN, "task", digest_of("task"), {})
    catalog.set_session_project(ANN, SessionId(SESSION), "p")
    catalog.finish_session(ANN, SessionId(SESSION), reason="success")
    catalog.delete_checkpoint(ANN, run, *sampled, actor="key")
    catalog.delete_revision(ANN, "math", digest_of(2), actor="key")
    catalog.set_quota(ANN, Quota(1), actor="key")
    events = catalog.audit(ANN, limit=100)[::-1]
    assert [event.action for event in events] == [
        "session.create",
        "policy.create",
        "run.create",
        "checkpoint.create",
        "revision.create",
        "alias.set",
        "revision.create",
        "policy.create",
        "revision.create",
        "revision.import",
        "alias.set",
        "alias.promote",
        "alias.promote",
        "alias.rollback",
        "checkpoint.publish",
        "checkpoint.set_ttl",
        "task.create",
        "session.move",
        "session.finish",
        "checkpoint.delete",
        "revision.delete",
        "quota.set",
    ]
    assert all(event.tenant == ANN and event.subject for event in events)


def test_repeating_a_change_leaves_one_event(catalog: Catalog) -> None:
    for _ in range(2):
        run = add_run(catalog)
        catalog.add_run_revision(ANN, run, blob(2), ephemeral=True)
    actions = [event.action for event in catalog.audit(ANN)]
    assert sorted(actions) == ["policy.create", "revision.create", "run.create", "session.create"]
