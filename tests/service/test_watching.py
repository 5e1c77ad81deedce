"""Watches at work: who loses traffic, where it goes, and what is left to read about it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Observation
from openmint.errors import InvalidRequest
from openmint.service import watching as module
from openmint.service.watching import FAILED, Watching
from openmint.types import Digest
from tests.catalog.made import ANN, RUN, add_run, blob, digest_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """Policy `math`: `prod` names 2, and named 1 before."""
    catalog = Catalog.open(f"sqlite:///{tmp_path / 'openmint.db'}")
    add_run(catalog)
    for i in (1, 2, 3):
        catalog.add_run_revision(ANN, RUN, blob(i), ephemeral=False)
    for i in (1, 2):
        catalog.promote(ANN, "math", "prod", digest_of(i), actor="ann")
    yield catalog
    catalog.close()


class Later(datetime):
    """A clock of which each look is a span later than the one before."""

    looks = itertools.count(1)

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=6 * next(cls.looks))


class Prewarmed:
    def __init__(self) -> None:
        self.digests: list[Digest] = []

    def after_move(self, tenant: str, policy: str, digest: Digest) -> None:
        self.digests.append(digest)


class Counted:
    def __init__(self) -> None:
        self.actions: list[str] = []

    def observe_watch(self, action: str) -> None:
        self.actions.append(action)


@pytest.fixture
def watching(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> Watching:
    monkeypatch.setattr(module, "datetime", Later)
    made = Watching(catalog, Prewarmed())  # type: ignore[arg-type]
    made.counter = Counted()
    return made


async def watch(watching: Watching, metric: str = "thumbs", at_most: float | None = None) -> None:
    await watching.add(
        ANN,
        "math",
        "prod",
        metric,
        at_least=None if at_most else 0.8,
        at_most=at_most,
        confidence=0.95,
        min_observations=10,
        window_seconds=3600,
        actor="ann",
    )


async def observe(watching: Watching, word: int, num: int, value: float) -> int:
    seen = [Observation("math", digest_of(word), "thumbs", 1, value)] * num
    return await watching.observe(ANN, seen)


def actions(watching: Watching) -> list[str]:
    assert isinstance(watching.counter, Counted)
    return watching.counter.actions


async def test_a_failing_revision_is_rolled_back(watching: Watching, catalog: Catalog) -> None:
    await watch(watching)
    assert await observe(watching, 2, 9, 0.0) == 9
    assert catalog.alias(ANN, "math", "prod").digest == digest_of(2)
    await observe(watching, 2, 1, 0.0)
    assert catalog.alias(ANN, "math", "prod").digest == digest_of(1)
    newest = catalog.alias_history(ANN, "math", "prod")[0]
    assert (newest.action, newest.actor) == ("rollback", "watch:1")
    assert "thumbs of at least 0.8: 0 in 10 observations" in newest.reason
    assert actions(watching) == ["rollback"]
    assert watching._prewarming.digests == [digest_of(1)]  # type: ignore[attr-defined]


async def test_a_failing_canary_is_aborted_and_nothing_else(
    watching: Watching, catalog: Catalog
) -> None:
    await watch(watching)
    catalog.set_canary(ANN, "math", "prod", digest_of(3), 0.1, actor="ann")
    await observe(watching, 3, 20, 0.0)
    after = catalog.alias(ANN, "math", "prod")
    assert (after.digest, after.canary_digest) == (digest_of(2), None)
    newest = catalog.alias_history(ANN, "math", "prod")[0]
    assert (newest.action, newest.actor) == ("canary_abort", "watch:1")
    assert actions(watching) == ["canary_abort"]
    assert await observe(watching, 3, 20, 0.0) == 0
    assert catalog.alias(ANN, "math", "prod").digest == digest_of(2)


async def test_a_failing_revision_loses_its_traffic_though_a_canary_runs(
    watching: Watching, catalog: Catalog
) -> None:
    await watch(watching)
    catalog.set_canary(ANN, "math", "prod", digest_of(3), 0.1, actor="ann")
    await observe(watching, 2, 20, 0.0)
    after = catalog.alias(ANN, "math", "prod")
    assert (after.digest, after.canary_digest) == (digest_of(1), None)


async def test_a_good_revision_keeps_its_traffic(watching: Watching, catalog: Catalog) -> None:
    await watch(watching)
    for _ in range(20):
        await observe(watching, 2, 9, 1.0)
        await observe(watching, 2, 1, 0.0)
    assert catalog.alias(ANN, "math", "prod").digest == digest_of(2)
    assert actions(watching) == []


async def test_what_has_nothing_before_it_stays(watching: Watching, catalog: Catalog) -> None:
    catalog.rollback(ANN, "math", "prod", actor="ann")
    await watch(watching)
    await observe(watching, 1, 20, 0.0)
    assert catalog.alias(ANN, "math", "prod").digest == digest_of(1)
    assert actions(watching) == ["nothing"]


async def test_the_service_counts_its_own_failures_where_somebody_watches(
    watching: Watching, catalog: Catalog
) -> None:
    def note(failed: bool) -> None:
        watching.note_answer(ANN, "math", digest_of(2), failed=failed)

    note(True)
    assert watching._own == {}
    await watch(watching, FAILED, at_most=0.05)
    for i in range(40):
        note(i % 4 == 0)
    await watching.flush()
    assert catalog.alias(ANN, "math", "prod").digest == digest_of(1)
    assert watching._own == {}
    (only,) = catalog.watches(ANN, "math", "prod")
    await watching.remove(ANN, "math", "prod", only.watch_id, actor="ann")
    note(True)
    assert watching._own == {}


async def test_the_services_own_metrics_are_not_a_clients(watching: Watching) -> None:
    with pytest.raises(InvalidRequest, match="itself"):
        await watching.observe(ANN, [Observation("math", digest_of(2), FAILED, 1, 1.0)])
    with pytest.raises(InvalidRequest, match=FAILED):
        await watch(watching, "service.unknown")


async def test_watches_are_known_after_a_restart(watching: Watching, catalog: Catalog) -> None:
    await watch(watching, FAILED, at_most=0.05)
    again = Watching(catalog, Prewarmed())  # type: ignore[arg-type]
    again.note_answer(ANN, "math", digest_of(2), failed=False)
    assert len(again._own) == 1
