import pytest

from openmint.catalog.catalog import Catalog
from openmint.errors import Conflict, InvalidRequest, NotFound
from openmint.types import Digest
from tests.catalog.made import ANN, BASE, BOB, SESSION, Blob, add_run, base_named, blob, digest_of


def test_revisions_are_numbered_and_know_their_parent(catalog: Catalog) -> None:
    run_id = add_run(catalog)
    made = [catalog.add_run_revision(ANN, run_id, blob(i, i), ephemeral=False) for i in (1, 2, 3)]
    assert [revision.number for revision in made] == [1, 2, 3]
    assert made[2].parent_digest == made[1].digest
    assert made[0].parent_digest is None
    assert catalog.lineage(ANN, "math", made[2].digest) == made[::-1]
    assert catalog.run(ANN, run_id).num_optim_steps == 3


def test_descendants_are_found_level_by_level(catalog: Catalog) -> None:
    run_id = add_run(catalog)

    def add(word: int, parent: int | None = None) -> Digest:
        above = None if parent is None else digest_of(parent)
        made = catalog.add_run_revision(
            ANN, run_id, blob(word), ephemeral=False, parent_digest=above
        )
        return made.digest

    for word, parent in ((1, None), (2, 1), (3, 1), (4, 2), (5, 4)):
        add(word, parent)

    def below(word: int, depth: int = 100) -> list[tuple[int, Digest]]:
        found = catalog.descendants(ANN, "math", digest_of(word), depth=depth)
        return [(distance, revision.digest) for distance, revision in found]

    at = [(1, digest_of(2)), (1, digest_of(3)), (2, digest_of(4)), (3, digest_of(5))]
    assert below(1) == at
    assert below(1, depth=2) == at[:3]
    assert below(5) == []
    catalog.delete_revision(ANN, "math", digest_of(2), actor="ann")
    assert below(1) == at
    up = catalog.lineage(ANN, "math", digest_of(5), depth=2)
    assert [revision.digest for revision in up] == [digest_of(word) for word in (5, 4, 2)]
    with pytest.raises(NotFound):
        catalog.descendants(BOB, "math", digest_of(1))


def test_a_loop_of_parents_ends(catalog: Catalog) -> None:
    run_id = add_run(catalog)
    for word, parent in ((1, 2), (2, 1)):
        catalog.add_run_revision(
            ANN, run_id, blob(word), ephemeral=False, parent_digest=digest_of(parent)
        )
    assert [d for d, _ in catalog.descendants(ANN, "math", digest_of(1))] == [1]
    assert len(catalog.lineage(ANN, "math", digest_of(1))) == 2


def test_the_same_bytes_are_the_same_revision(catalog: Catalog) -> None:
    run_id = add_run(catalog)
    first = catalog.add_run_revision(ANN, run_id, blob(1), ephemeral=False)
    assert catalog.add_run_revision(ANN, run_id, blob(1), ephemeral=True) == first


def test_two_runs_add_to_one_policy(catalog: Catalog) -> None:
    catalog.add_run_revision(ANN, add_run(catalog), blob(1), ephemeral=False)
    second = catalog.add_run_revision(ANN, add_run(catalog, n=1), blob(2), ephemeral=False)
    assert second.number == 2
    assert second.parent_digest is None


def test_a_named_save_keeps_an_ephemeral_revision(catalog: Catalog) -> None:
    run_id = add_run(catalog)
    catalog.add_run_revision(ANN, run_id, blob(1), ephemeral=True)
    assert catalog.revisions(ANN, "math") == []
    assert len(catalog.revisions(ANN, "math", ephemeral=True)) == 1
    catalog.add_checkpoint(ANN, run_id, "sampler_weights", "one", blob(1))
    assert len(catalog.revisions(ANN, "math")) == 1
    catalog.finish_session(ANN, SESSION, reason="success")
    catalog.delete_ephemeral_of_ended()
    assert catalog.unused_blobs() == []


def test_ephemeral_revisions_of_ended_sessions_go_but_what_an_alias_names(
    catalog: Catalog,
) -> None:
    run_id = add_run(catalog)
    for i in (1, 2, 3):
        catalog.add_run_revision(ANN, run_id, blob(i), ephemeral=True)
    catalog.set_alias(ANN, "math", "kept", digest_of(2), actor="ann")
    catalog.add_run_revision(ANN, add_run(catalog, session="other"), blob(9), ephemeral=True)
    catalog.delete_ephemeral_of_ended()
    assert catalog.unused_blobs() == []
    catalog.finish_session(ANN, SESSION, reason="success")
    catalog.delete_ephemeral_of_ended()
    assert set(catalog.unused_blobs()) == {digest_of(1), digest_of(3)}
    alive = catalog.revisions(ANN, "math", ephemeral=True)
    assert {revision.digest for revision in alive} == {digest_of(2), digest_of(9)}


def test_a_revision_saved_while_its_session_ended_goes_too(catalog: Catalog) -> None:
    run_id = add_run(catalog)
    catalog.finish_session(ANN, SESSION, reason="interrupted")
    catalog.add_run_revision(ANN, run_id, blob(1), ephemeral=True)
    catalog.delete_ephemeral_of_ended()
    assert catalog.unused_blobs() == [digest_of(1)]


def test_a_deleted_revision_is_gone_until_its_bytes_are_saved_again(catalog: Catalog) -> None:
    run_id = add_run(catalog)
    catalog.add_run_revision(ANN, run_id, blob(1), ephemeral=False)
    catalog.delete_revision(ANN, "math", digest_of(1), actor="ann")
    with pytest.raises(NotFound, match="was deleted"):
        catalog.revision(ANN, "math", digest_of(1))
    assert catalog.revisions(ANN, "math") == []
    assert len(catalog.revisions(ANN, "math", deleted=True)) == 1
    again = catalog.add_run_revision(ANN, run_id, blob(1), ephemeral=False)
    assert (again.number, again.deleted_at) == (1, None)
    assert catalog.audit(ANN)[0].action == "revision.delete"


def test_a_revision_that_an_alias_names_is_not_deleted(catalog: Catalog) -> None:
    catalog.add_checkpoint(ANN, add_run(catalog), "sampler_weights", "one", blob(1))
    with pytest.raises(Conflict, match="latest"):
        catalog.delete_revision(ANN, "math", digest_of(1), actor="ann")


def test_a_revision_is_found_by_the_start_of_its_digest(catalog: Catalog) -> None:
    run_id = add_run(catalog)
    twins = [Digest("sha256:" + "a" * 20 + last * 44) for last in "0f"]
    for digest in twins:
        catalog.add_run_revision(ANN, run_id, Blob(digest), ephemeral=False)
    assert catalog.revision(ANN, "math", twins[1][:28]).digest == twins[1]
    with pytest.raises(InvalidRequest, match="more digits"):
        catalog.revision(ANN, "math", twins[1][:19])
    with pytest.raises(NotFound):
        catalog.revision(ANN, "math", "sha256:" + "b" * 12)
    with pytest.raises(NotFound):
        catalog.revision(BOB, "math", twins[1])


def test_revisions_are_listed_newest_first_in_pages(catalog: Catalog) -> None:
    run_id = add_run(catalog)
    for i in range(4):
        catalog.add_run_revision(ANN, run_id, blob(i), ephemeral=False)
    page = catalog.revisions(ANN, "math", limit=3)
    assert [revision.number for revision in page] == [4, 3, 2]
    rest = catalog.revisions(ANN, "math", before=page[-1].number)
    assert [revision.number for revision in rest] == [1]


def test_an_import_makes_the_policy_and_becomes_its_latest(catalog: Catalog) -> None:
    made = catalog.import_revision(ANN, "math", BASE, blob(1), actor="key")
    assert (made.origin, made.run_id, made.number) == ("imported", None, 1)
    assert catalog.resolve(ANN, "ann/math").revision == made
    assert catalog.import_revision(ANN, "math", BASE, blob(1), actor="key") == made
    with pytest.raises(InvalidRequest):
        catalog.import_revision(ANN, "math", base_named("other"), blob(2), actor="key")


def test_an_ephemeral_revision_that_was_promoted_can_be_rolled_back_to(catalog: Catalog) -> None:
    run = add_run(catalog)
    first = catalog.add_run_revision(ANN, run, blob("a"), ephemeral=True)
    second = catalog.add_run_revision(ANN, run, blob("b"), ephemeral=False)
    for revision in (first, second):
        catalog.promote(ANN, "math", "prod", revision.digest, actor="ann")
    catalog.finish_session(ANN, SESSION, reason="success")
    catalog.delete_ephemeral_of_ended()
    assert catalog.unused_blobs() == []
    assert catalog.rollback(ANN, "math", "prod", actor="ann").digest == first.digest
