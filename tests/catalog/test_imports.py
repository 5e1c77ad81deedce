"""Many imports in one transaction leave what as many single ones would."""

import pytest

from openmint.catalog.catalog import Catalog
from openmint.catalog.imports import Import
from openmint.errors import InvalidRequest, NotFound
from tests.catalog.conftest import NewUrl
from tests.catalog.made import ANN, BASE, BOB, SESSION, add_run, base_named, blob, digest_of

MADE: list[Import] = [
    ("math", blob(1)),
    ("code", blob(2)),
    ("math", blob(3)),
    ("math", blob(1)),
    ("poems", blob(1)),
]


def test_a_batch_leaves_what_single_imports_would(new_url: NewUrl) -> None:
    def left(*, at_once: bool) -> object:
        catalog = Catalog.open(new_url())
        catalog.add_run_revision(ANN, add_run(catalog), blob(0), ephemeral=False)
        catalog.set_alias(ANN, "math", "latest", digest_of(0), actor="ann")
        if at_once:
            catalog.import_revisions(ANN, BASE, MADE, actor="key")
        else:
            for name, each in MADE:
                catalog.import_revision(ANN, name, BASE, each, actor="key")
        found = [
            (
                policy.name,
                [(r.number, r.digest, r.origin) for r in catalog.revisions(ANN, policy.name)],
                [(a.name, a.digest, a.version) for a in catalog.aliases(ANN, policy.name)],
                [
                    (e.action, e.from_digest, e.to_digest, e.actor)
                    for e in catalog.alias_history(ANN, policy.name)
                ],
            )
            for policy in catalog.policies(ANN).items
        ]
        catalog.close()
        return found

    assert left(at_once=True) == left(at_once=False)


def test_a_batch_says_the_numbers_and_audits_each(catalog: Catalog) -> None:
    assert catalog.import_revisions(ANN, BASE, MADE, actor="key") == [1, 1, 2, 1, 1]
    events = [event for event in catalog.audit(ANN) if event.action == "revision.import"]
    assert [event.subject for event in events[::-1]] == [
        f"ann/{name}@{each.digest}" for name, each in MADE
    ]
    assert {event.actor for event in events} == {"key"}


def test_a_batch_again_changes_nothing_and_restores_what_was_deleted(catalog: Catalog) -> None:
    catalog.import_revisions(ANN, BASE, MADE[:3], actor="key")
    before = catalog.alias(ANN, "math", "latest")
    catalog.delete_revision(ANN, "math", digest_of(1), actor="key")
    with pytest.raises(NotFound):
        catalog.revision(ANN, "math", digest_of(1))
    assert catalog.import_revisions(ANN, BASE, MADE[:3], actor="key") == [1, 1, 2]
    assert catalog.revision(ANN, "math", digest_of(1)).number == 1
    assert catalog.alias(ANN, "math", "latest").digest == before.digest
    assert catalog.unused_blobs() == []


def test_an_imported_ephemeral_revision_outlives_its_session(catalog: Catalog) -> None:
    catalog.add_run_revision(ANN, add_run(catalog), blob(1), ephemeral=True)
    catalog.import_revisions(ANN, BASE, [("math", blob(1))], actor="key")
    catalog.finish_session(ANN, SESSION, reason="success")
    catalog.delete_ephemeral_of_ended()
    assert catalog.revision(ANN, "math", digest_of(1)).ephemeral is False


def test_a_policy_of_another_base_lets_nothing_of_the_batch_in(catalog: Catalog) -> None:
    catalog.get_or_create_policy(ANN, "code", base_named("other"))
    assert catalog.policies_of_other_bases(ANN, ["math", "code"], BASE) == {"code"}
    assert catalog.policies_of_other_bases(BOB, ["math", "code"], BASE) == set()
    with pytest.raises(InvalidRequest, match="code"):
        catalog.import_revisions(ANN, BASE, MADE, actor="key")
    with pytest.raises(NotFound):
        catalog.policy(ANN, "math")


def test_tenants_import_the_same_bytes_apart(catalog: Catalog) -> None:
    catalog.import_revisions(ANN, BASE, MADE[:1], actor="key")
    assert catalog.import_revisions(BOB, BASE, [("math", blob(9)), *MADE[:1]], actor="key") == [
        1,
        2,
    ]
    assert catalog.revision(ANN, "math", digest_of(1)).number == 1
    with pytest.raises(NotFound):
        catalog.revision(ANN, "math", digest_of(9))
