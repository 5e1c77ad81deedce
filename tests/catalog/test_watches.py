"""Watches: which observations count, for how long, and what they find."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select

from openmint.catalog import tables as t
from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Observation, Watch, WatchFinding
from openmint.errors import Conflict, InvalidRequest, NotFound
from tests.catalog.made import ANN, BOB, RUN, add_run, blob, digest_of


@pytest.fixture
def trained(catalog: Catalog) -> Catalog:
    """Policy `math` with revisions 1 to 3; `prod` names 2, and named 1 before."""
    add_run(catalog)
    for i in (1, 2, 3):
        catalog.add_run_revision(ANN, RUN, blob(i), ephemeral=False)
    for i in (1, 2):
        catalog.promote(ANN, "math", "prod", digest_of(i), actor="ann")
    return catalog


def add_watch(
    catalog: Catalog,
    *,
    alias: str = "prod",
    at_least: float | None = 0.8,
    at_most: float | None = None,
    window_seconds: int = 3600,
) -> Watch:
    return catalog.add_watch(
        ANN,
        "math",
        alias,
        "thumbs",
        at_least=at_least,
        at_most=at_most,
        confidence=0.95,
        min_observations=10,
        window_seconds=window_seconds,
        actor="ann",
    )


def soon() -> datetime:
    """A moment of the next span: those of the present one may be from before a move."""
    return datetime.now(UTC) + timedelta(seconds=6)


def observe(catalog: Catalog, word: int, num: int, value: float, at: datetime | None = None) -> int:
    seen = [Observation("math", digest_of(word), "thumbs", 1, value)] * num
    return catalog.add_observations(ANN, seen, at or soon())


def only(catalog: Catalog) -> WatchFinding:
    (finding,) = catalog.judge(ANN, "math")
    return finding


def test_a_mean_that_is_surely_too_low_fails(trained: Catalog) -> None:
    add_watch(trained)
    assert not only(trained).failed
    observe(trained, 2, 9, 0.0)
    assert (only(trained).num, only(trained).failed) == (9, False)
    observe(trained, 2, 1, 0.0)
    found = only(trained)
    assert (found.num, found.mean, found.digest, found.failed) == (10, 0.0, digest_of(2), True)
    assert found.high < 0.8
    observe(trained, 2, 40, 1.0)
    assert (only(trained).mean, only(trained).failed) == (0.8, False)


def test_a_mean_that_is_surely_too_high_fails(trained: Catalog) -> None:
    add_watch(trained, at_least=None, at_most=0.1)
    observe(trained, 2, 20, 0.15)
    assert not only(trained).failed
    observe(trained, 2, 20, 0.9)
    assert only(trained).failed and only(trained).low > 0.1


def test_a_mean_on_the_edge_decides_nothing(trained: Catalog) -> None:
    add_watch(trained)
    for _ in range(50):
        observe(trained, 2, 3, 1.0)
        observe(trained, 2, 1, 0.0)
    assert (only(trained).mean, only(trained).failed) == (0.75, False)


def test_a_canary_is_judged_beside_what_is_named(trained: Catalog) -> None:
    add_watch(trained)
    trained.set_canary(ANN, "math", "prod", digest_of(3), 0.1, actor="ann")
    observe(trained, 2, 20, 1.0)
    observe(trained, 3, 20, 0.0)
    named, canary = trained.judge(ANN, "math")
    assert (named.digest, named.is_canary, named.failed) == (digest_of(2), False, False)
    assert (canary.digest, canary.is_canary, canary.failed) == (digest_of(3), True, True)


def test_what_is_not_served_by_an_alias_does_not_count(trained: Catalog) -> None:
    add_watch(trained)
    assert observe(trained, 1, 5, 0.0) == 0
    assert observe(trained, 2, 5, 0.0) == 5
    with trained._database.read() as connection:
        assert connection.execute(select(func.count()).select_from(t.observation)).scalar() == 1


def test_what_was_observed_before_a_revision_took_its_place_does_not_count(
    trained: Catalog,
) -> None:
    add_watch(trained)
    observe(trained, 2, 20, 0.0, at=datetime.now(UTC) - timedelta(seconds=30))
    assert only(trained).num == 0


def test_a_window_ends_and_what_no_window_reaches_is_deleted(trained: Catalog) -> None:
    add_watch(trained, window_seconds=60)
    past = datetime.now(UTC) - timedelta(seconds=90)
    with trained._database.write() as connection:
        connection.execute(t.alias.update().values(updated_at=past - timedelta(days=3)))
    observe(trained, 2, 5, 0.0, at=past - timedelta(days=2))
    observe(trained, 2, 7, 0.0, at=past)
    observe(trained, 2, 3, 0.0)
    assert only(trained).num == 3
    with trained._database.read() as connection:
        kept = connection.execute(select(func.sum(t.observation.c.num))).scalar()
    assert kept == 10


def test_observations_of_one_span_share_a_row(trained: Catalog) -> None:
    add_watch(trained)
    at = datetime(2030, 1, 1, 0, 0, 1, tzinfo=UTC)
    for i in range(3):
        observe(trained, 2, 100, 0.5, at=at + timedelta(seconds=i))
    with trained._database.read() as connection:
        rows = connection.execute(select(t.observation.c.num, t.observation.c.total)).all()
    assert [tuple(row) for row in rows] == [(300, 150.0)]


def test_only_what_is_watched_is_kept(trained: Catalog) -> None:
    with pytest.raises(NotFound, match="watched for 'thumbs'"):
        observe(trained, 2, 1, 0.0)
    add_watch(trained)
    with pytest.raises(NotFound):
        trained.add_observations(BOB, [Observation("math", digest_of(2), "thumbs", 1, 1.0)], soon())
    other = Observation("math", digest_of(2), "other", 1, 1.0)
    good = Observation("math", digest_of(2), "thumbs", 1, 1.0)
    with pytest.raises(NotFound, match="'other'"):
        trained.add_observations(ANN, [good, other], soon())
    assert only(trained).num == 0


def test_a_watch_is_listed_and_removed_by_its_alias(trained: Catalog) -> None:
    watch = add_watch(trained)
    assert trained.watches(ANN, "math", "prod") == [watch]
    assert trained.watched_policies("thumbs") == {(ANN, "math")}
    assert trained.watched_policies("other") == set()
    with pytest.raises(NotFound):
        trained.remove_watch(ANN, "math", "other", watch.watch_id, actor="ann")
    trained.remove_watch(ANN, "math", "prod", watch.watch_id, actor="ann")
    assert trained.judge(ANN, "math") == []
    actions = [event.action for event in trained.audit(ANN)]
    assert actions[:2] == ["watch.delete", "watch.create"]


def test_watches_that_cannot_be_are_refused(trained: Catalog) -> None:
    for at_least, at_most in ((None, None), (0.5, 0.5)):
        with pytest.raises(InvalidRequest, match="either"):
            add_watch(trained, at_least=at_least, at_most=at_most)
    with pytest.raises(InvalidRequest, match="follows every save"):
        add_watch(trained, alias="latest")
    for _ in range(16):
        add_watch(trained)
    with pytest.raises(Conflict, match="16"):
        add_watch(trained)
