"""Retention keeps what is new, named, held, or may be rolled back to, and deletes the rest."""

from __future__ import annotations

import time

import pytest

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Keep
from openmint.errors import NotFound
from openmint.types import SessionId
from tests.catalog.made import ANN, BASE, BOB, RUN, SESSION, add_run, blob, digest_of

ALL, THREE = Keep(0, 2), Keep(3, 2)


@pytest.fixture
def ten(catalog: Catalog) -> Catalog:
    """Ann's `math` with ten imported revisions; `latest` names the last."""
    catalog.import_revisions(ANN, BASE, [("math", blob(n)) for n in range(1, 11)], actor="key")
    return catalog


def surplus(catalog: Catalog, keep: Keep = ALL, policy: str = "math") -> list[int]:
    return [revision.number for revision in catalog.surplus_revisions(ANN, policy, keep)]


def left(catalog: Catalog, policy: str = "math") -> list[int]:
    return [revision.number for revision in catalog.revisions(ANN, policy)][::-1]


def delete_all_surplus(catalog: Catalog, keep: Keep = ALL, limit: int = 100) -> int:
    after: int | None = 0
    num_deleted = 0
    while after is not None:
        after, deleted = catalog.delete_surplus(keep, after=after, limit=limit)
        num_deleted += deleted
    return num_deleted


def test_all_are_kept_unless_a_number_is_set(ten: Catalog) -> None:
    assert surplus(ten) == []
    assert delete_all_surplus(ten) == 0
    assert surplus(ten, THREE) == [1, 2, 3, 4, 5, 6, 7]
    made = ten.set_retention(ANN, "math", 8, actor="key")
    assert made.keep_revisions == ten.policy(ANN, "math").keep_revisions == 8
    assert surplus(ten, THREE) == surplus(ten) == [1, 2]
    ten.set_retention(ANN, "math", None, actor="key")
    assert surplus(ten) == []
    assert ten.audit(ANN)[0].action == "policy.retain"
    with pytest.raises(NotFound):
        ten.set_retention(BOB, "math", 1, actor="bob")


def test_what_is_surplus_goes_and_is_audited_and_its_bytes_wait(ten: Catalog) -> None:
    ten.set_retention(ANN, "math", 8, actor="key")
    assert delete_all_surplus(ten) == 2
    assert left(ten) == list(range(3, 11))
    assert delete_all_surplus(ten) == 0
    event = ten.audit(ANN)[0]
    assert (event.action, event.actor) == ("revision.delete", "retention")
    assert ten.unused_blobs(grace_seconds=60) == []
    assert set(ten.unused_blobs()) == {digest_of(1), digest_of(2)}
    assert [each.digest for each in ten.doomed_blobs()] == sorted(ten.unused_blobs())


def test_what_an_alias_names_or_may_be_rolled_back_to_is_kept(ten: Catalog) -> None:
    for n in (1, 2, 3, 4):
        ten.promote(ANN, "math", "prod", digest_of(n), actor="ann")
    ten.set_alias(ANN, "math", "old", digest_of(6), actor="ann")
    assert surplus(ten, THREE) == [1, 5, 7]  # two rollbacks from 4: to 3, to 2
    assert delete_all_surplus(ten, THREE) == 3
    for n in (3, 2):
        assert ten.rollback(ANN, "math", "prod", actor="ann").digest == digest_of(n)
    assert surplus(ten, THREE) == [3, 4]


def test_a_canary_is_kept_while_it_has_traffic(ten: Catalog) -> None:
    ten.promote(ANN, "math", "prod", digest_of(10), actor="ann")
    ten.set_canary(ANN, "math", "prod", digest_of(2), 0.5, actor="ann")
    assert surplus(ten, THREE) == [1, 3, 4, 5, 6, 7]
    ten.abort_canary(ANN, "math", "prod", actor="ann")
    assert 2 in surplus(ten, THREE)


def test_latest_keeps_what_it_names_and_not_its_history(ten: Catalog) -> None:
    ten.set_alias(ANN, "math", "latest", digest_of(1), actor="ann")
    assert surplus(ten, Keep(1, 10)) == [2, 3, 4, 5, 6, 7, 8, 9]


def test_checkpoints_go_with_their_revisions_but_published_and_timed_ones_hold_them(
    catalog: Catalog,
) -> None:
    add_run(catalog)
    for n in range(1, 6):
        ttl_seconds = 1000.0 if n == 2 else None
        catalog.add_checkpoint(
            ANN, RUN, "sampler_weights", f"s{n}", blob(n), ttl_seconds=ttl_seconds
        )
    catalog.add_checkpoint(ANN, RUN, "weights", "state", blob("state"))
    catalog.set_checkpoint_public(ANN, RUN, "sampler_weights", "s1", True, actor="ann")
    assert delete_all_surplus(catalog, Keep(1, 10)) == 2
    names = {checkpoint.name for checkpoint in catalog.run_checkpoints(ANN, RUN)}
    assert names == {"s1", "s2", "s5", "state"}
    assert left(catalog) == [1, 2, 5]
    assert catalog.audit(ANN)[0].details == {"checkpoints": [f"{RUN}/sampler_weights/s4"]}
    assert set(catalog.unused_blobs()) == {digest_of(3), digest_of(4)}


def test_unnamed_saves_are_not_counted_and_stay_until_their_session_ends(catalog: Catalog) -> None:
    run_id = add_run(catalog)
    for n in range(1, 7):
        catalog.add_run_revision(ANN, run_id, blob(n), ephemeral=n % 2 == 0)
    assert delete_all_surplus(catalog, Keep(2, 10)) == 1
    alive = catalog.revisions(ANN, "math", ephemeral=True)
    assert [revision.number for revision in alive] == [6, 5, 4, 3, 2]
    catalog.finish_session(ANN, SESSION, reason="success")
    catalog.delete_ephemeral_of_ended()
    assert set(catalog.unused_blobs(grace_seconds=60)) == {digest_of(n) for n in (2, 4, 6)}


def test_policies_take_turns_and_each_has_its_own_number(catalog: Catalog) -> None:
    names = [f"p{n}" for n in range(5)]
    for name in names:
        made = [(name, blob(f"{name}{n}")) for n in range(4)]
        catalog.import_revisions(ANN, BASE, made, actor="key")
    catalog.set_retention(ANN, "p1", 1, actor="key")
    catalog.set_retention(ANN, "p3", 3, actor="key")
    assert delete_all_surplus(catalog, limit=1) == 4
    assert [len(left(catalog, name)) for name in names] == [4, 1, 4, 3, 4]
    assert delete_all_surplus(catalog, Keep(2, 0), limit=2) == 6
    assert [len(left(catalog, name)) for name in names] == [2, 1, 2, 3, 2]


def test_bytes_that_are_named_again_within_the_grace_stay(ten: Catalog) -> None:
    ten.delete_revision(ANN, "math", digest_of(1), actor="ann")
    ten.import_revision(ANN, "math", BASE, blob(1), actor="ann")
    assert ten.doomed_blobs() == ten.unused_blobs() == []
    ten.forget_blobs([])
    ten.set_alias(ANN, "math", "latest", digest_of(10), actor="ann")
    ten.delete_revision(ANN, "math", digest_of(1), actor="ann")
    assert ten.unused_blobs() == [digest_of(1)]


def test_the_grace_begins_with_the_last_deletion(ten: Catalog) -> None:
    ten.delete_revision(ANN, "math", digest_of(1), actor="ann")
    time.sleep(0.3)
    assert ten.unused_blobs(grace_seconds=0.2) == [digest_of(1)]
    ten.import_revision(BOB, "verse", BASE, blob(1), actor="bob")
    ten.import_revision(BOB, "verse", BASE, blob(2), actor="bob")
    ten.delete_revision(BOB, "verse", digest_of(1), actor="bob")
    assert ten.unused_blobs(grace_seconds=0.2) == []


def test_a_sampler_of_an_open_session_keeps_the_bytes_past_their_grace(catalog: Catalog) -> None:
    add_run(catalog)
    for n in (1, 2):
        catalog.add_run_revision(ANN, RUN, blob(n), ephemeral=False)
    catalog.add_sampler(
        ANN, f"{SESSION}:sample:0", session_id=SessionId(SESSION), base=BASE,
        revision=digest_of(1), model_path=None,
    )  # fmt: skip
    assert delete_all_surplus(catalog, Keep(1, 0)) == 1
    assert catalog.unused_blobs() == []
    catalog.finish_session(ANN, SessionId(SESSION), reason="success")
    assert catalog.unused_blobs() == [digest_of(1)]
