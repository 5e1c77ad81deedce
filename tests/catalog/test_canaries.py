"""Canaries: who goes there, what is told of it, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event

from openmint.catalog.canaries import is_on_canary
from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Alias
from openmint.errors import Conflict, GateFailed, InvalidRequest, NotFound
from openmint.types import Digest
from tests.catalog.conftest import NewUrl
from tests.catalog.made import ANN, BOB, RUN, SESSION, add_run, blob, digest_of

KEYS = [f"client {i}" for i in range(2000)]


def train(catalog: Catalog) -> Catalog:
    """Policy `math` with revisions 1 to 3; `prod` names 1."""
    add_run(catalog)
    for i in (1, 2, 3):
        catalog.add_run_revision(ANN, RUN, blob(i), ephemeral=False)
    catalog.promote(ANN, "math", "prod", digest_of(1), actor="ann")
    return catalog


@pytest.fixture
def trained(catalog: Catalog) -> Catalog:
    return train(catalog)


def start(catalog: Catalog, share: float, word: int | None = 2) -> Alias:
    digest = digest_of(word) if word else None
    return catalog.set_canary(ANN, "math", "prod", digest, share, actor="ann", reason="try")


def resolved(catalog: Catalog, key: str | None, address: str = "ann/math") -> Digest:
    return catalog.resolve(ANN, address, key).revision.digest


def on_canary(catalog: Catalog) -> set[str]:
    return {key for key in KEYS if resolved(catalog, key) == digest_of(2)}


@contextmanager
def counted_reads(catalog: Catalog) -> Iterator[list[str]]:
    statements: list[str] = []

    def note(_: object, __: object, statement: str, *rest: object) -> None:
        statements.append(statement)

    engine = catalog._database._server.readers
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(engine, "before_cursor_execute", note)


@given(st.text(), st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True))
def test_raising_the_share_takes_nobody_from_the_canary(key: str, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert is_on_canary(ANN, "math", "prod", key, low) <= is_on_canary(
        ANN, "math", "prod", key, high
    )
    assert is_on_canary(ANN, "math", "prod", key, 1.0)


def test_places_are_the_same_everywhere_and_for_ever() -> None:
    """Another process, machine or version must send the same client to the same side."""
    shares = [0.2203, 0.2204]
    assert [is_on_canary(ANN, "math", "prod", "client 0", share) for share in shares] == [
        False,
        True,
    ]


def test_aliases_are_split_independently() -> None:
    prod = {key for key in KEYS if is_on_canary(ANN, "math", "prod", key, 0.5)}
    other = {key for key in KEYS if is_on_canary(ANN, "math", "other", key, 0.5)}
    assert 400 < len(prod & other) < 600


def test_a_share_of_clients_goes_to_the_canary_and_stays_there(trained: Catalog) -> None:
    start(trained, 0.1)
    few = on_canary(trained)
    assert 140 < len(few) < 260
    assert on_canary(trained) == few
    start(trained, 0.4, word=None)
    more = on_canary(trained)
    assert few < more and 700 < len(more) < 900
    start(trained, 0.1)
    assert on_canary(trained) == few


def test_who_gives_no_key_or_names_a_revision_is_not_split(trained: Catalog) -> None:
    start(trained, 0.9999)
    assert resolved(trained, None) == digest_of(1)
    assert resolved(trained, "a") == digest_of(2)
    assert resolved(trained, "a", "ann/math@prod") == digest_of(2)
    assert resolved(trained, "a", f"ann/math@{digest_of(1)}") == digest_of(1)


def test_an_alias_without_canary_is_resolved_by_as_many_queries_as_before(
    trained: Catalog,
) -> None:
    with counted_reads(trained) as without_key:
        resolved(trained, None)
    with counted_reads(trained) as with_key:
        resolved(trained, "client")
    assert len(with_key) == len(without_key)
    start(trained, 1e-9)
    with counted_reads(trained) as other_side:
        resolved(trained, "client")
    assert len(other_side) == len(without_key)


def test_a_canary_is_finished_by_promotion(trained: Catalog) -> None:
    start(trained, 0.5)
    done = trained.finish_canary(ANN, "math", "prod", actor="ann", reason="good")
    assert (done.digest, done.canary_digest, done.canary_share) == (digest_of(2), None, None)
    assert {resolved(trained, key) for key in KEYS[:20]} == {digest_of(2)}
    assert [e.action for e in trained.alias_history(ANN, "math", "prod")] == [
        "promote",
        "canary_start",
        "promote",
    ]
    assert trained.rollback(ANN, "math", "prod", actor="ann").digest == digest_of(1)


def test_gates_hold_a_canary_back_when_it_is_finished(trained: Catalog) -> None:
    trained.put_task(ANN, "sums", digest_of("sums"), {"items": [1]})
    trained.add_gate(
        ANN,
        "math",
        "prod",
        "sums",
        min_score=0.5,
        margin=None,
        confidence=0.95,
        num_items=None,
        actor="ann",
    )
    start(trained, 0.5)
    with pytest.raises(GateFailed):
        trained.finish_canary(ANN, "math", "prod", actor="ann")
    assert trained.alias(ANN, "math", "prod").canary_digest == digest_of(2)
    moved = trained.finish_canary(ANN, "math", "prod", actor="ann", override_reason="hurry")
    assert moved.digest == digest_of(2)


def test_an_aborted_canary_gives_its_traffic_back(trained: Catalog) -> None:
    start(trained, 0.5)
    kept = trained.abort_canary(ANN, "math", "prod", actor="ann", reason="bad")
    assert (kept.digest, kept.canary_digest, kept.version) == (digest_of(1), None, 3)
    assert on_canary(trained) == set()
    newest = trained.alias_history(ANN, "math", "prod")[0]
    assert (newest.action, newest.reason) == ("canary_abort", "bad")
    assert (newest.from_digest, newest.to_digest) == (digest_of(2), digest_of(1))
    with pytest.raises(Conflict, match="no canary"):
        trained.abort_canary(ANN, "math", "prod", actor="ann")


def test_a_rollback_undoes_the_canary_first(trained: Catalog) -> None:
    trained.promote(ANN, "math", "prod", digest_of(3), actor="ann")
    start(trained, 0.5)
    assert trained.rollback(ANN, "math", "prod", actor="ann").digest == digest_of(3)
    assert on_canary(trained) == set()
    assert trained.rollback(ANN, "math", "prod", actor="ann").digest == digest_of(1)


def test_history_and_audit_tell_the_share(trained: Catalog) -> None:
    start(trained, 0.1)
    start(trained, 0.3, word=None)
    shares = [(e.action, e.share) for e in trained.alias_history(ANN, "math", "prod")][:2]
    assert shares == [("canary_share", 0.3), ("canary_start", 0.1)]
    event = trained.audit(ANN)[0]
    assert (event.action, event.subject) == ("alias.canary_share", "ann/math@prod")
    assert event.details["share"] == 0.3


def test_repeating_a_start_changes_nothing(trained: Catalog) -> None:
    first = start(trained, 0.1)
    assert start(trained, 0.1) == first
    assert len(trained.alias_history(ANN, "math", "prod")) == 2


def test_a_canary_expects_the_version_that_was_read(trained: Catalog) -> None:
    with pytest.raises(Conflict, match="version 1"):
        trained.set_canary(ANN, "math", "prod", digest_of(2), 0.5, actor="ann", expected_version=7)
    assert start(trained, 0.5).version == 2
    with pytest.raises(Conflict, match="version 2"):
        trained.finish_canary(ANN, "math", "prod", actor="ann", expected_version=1)
    with pytest.raises(Conflict, match="version 2"):
        trained.rollback(ANN, "math", "prod", actor="ann", expected_version=1)


def test_canaries_that_cannot_be_are_refused(trained: Catalog) -> None:
    for share in (0.0, -0.1, 1.0, 1.1, float("nan")):
        with pytest.raises(InvalidRequest, match="share"):
            start(trained, share)
    with pytest.raises(InvalidRequest, match="follows every save"):
        trained.set_canary(ANN, "math", "latest", digest_of(2), 0.5, actor="ann")
    with pytest.raises(Conflict, match="already"):
        start(trained, 0.5, word=1)
    with pytest.raises(Conflict, match="no canary"):
        start(trained, 0.5, word=None)
    with pytest.raises(NotFound):
        trained.set_canary(ANN, "math", "unknown", digest_of(2), 0.5, actor="ann")
    with pytest.raises(NotFound):
        trained.set_canary(BOB, "math", "prod", digest_of(2), 0.5, actor="bob")
    start(trained, 0.5)
    for change in (trained.promote, trained.set_alias):
        with pytest.raises(Conflict, match="is running"):
            change(ANN, "math", "prod", digest_of(3), actor="ann")
    with pytest.raises(Conflict, match="is running"):
        start(trained, 0.5, word=3)


def test_a_canary_keeps_its_revision(trained: Catalog) -> None:
    start(trained, 0.5)
    with pytest.raises(Conflict, match="names revision"):
        trained.delete_revision(ANN, "math", digest_of(2), actor="ann")
    trained.abort_canary(ANN, "math", "prod", actor="ann")
    trained.delete_revision(ANN, "math", digest_of(2), actor="ann")


def test_an_unnamed_save_outlives_its_session_as_a_canary(trained: Catalog) -> None:
    trained.add_run_revision(ANN, RUN, blob(4), ephemeral=True)
    start(trained, 0.5, word=4)
    trained.finish_session(ANN, SESSION, reason="done")
    trained.delete_ephemeral_of_ended()
    assert trained.revision(ANN, "math", digest_of(4)).deleted_at is None


def test_a_canary_outlives_a_restart(new_url: NewUrl) -> None:
    url = new_url()
    first = train(Catalog.open(url))
    start(first, 0.3)
    before = on_canary(first)
    first.close()
    again = Catalog.open(url)
    assert on_canary(again) == before
    again.close()
