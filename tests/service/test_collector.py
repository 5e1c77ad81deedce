"""Doomed bytes go once nothing names them, and never under a save."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Keep
from openmint.service.collector import Collector
from openmint.service.retention import Retention
from openmint.store.blobs import BlobStore
from tests.catalog.made import ANN, BASE, RUN, Blob, add_run, digest_of

ORPHAN, NAMED = b"orphan", b"named"


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog.open(f"sqlite:///{tmp_path / 'openmint.db'}")
    yield catalog
    catalog.close()


def delete(catalog: Catalog, name: str) -> None:
    catalog.delete_checkpoint(ANN, RUN, "weights", name, actor="ann")


def test_doomed_bytes_go_and_others_stay(catalog: Catalog, tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    orphan, named = store.put(ORPHAN), store.put(NAMED)
    run_id = add_run(catalog)
    catalog.add_checkpoint(ANN, run_id, "weights", "gone", Blob(orphan))
    catalog.add_checkpoint(ANN, run_id, "weights", "kept", Blob(named))
    delete(catalog, "gone")
    asyncio.run(Collector(catalog, store, 0.0).collect())
    assert not store.exists(orphan)
    assert store.get(named) == NAMED
    assert catalog.unused_blobs() == []


def test_nothing_is_collected_between_bytes_and_their_record(
    catalog: Catalog, tmp_path: Path
) -> None:
    store = BlobStore(tmp_path)
    collector = Collector(catalog, store, 0.0)
    run_id = add_run(catalog)
    catalog.add_checkpoint(ANN, run_id, "weights", "gone", Blob(store.put(ORPHAN)))
    delete(catalog, "gone")
    with collector.saving():
        digest = store.put(ORPHAN)  # found in place, as equal bytes are there still
        asyncio.run(collector.collect())
        catalog.add_checkpoint(ANN, run_id, "weights", "again", Blob(digest))
    asyncio.run(collector.collect())
    assert store.get(digest) == ORPHAN


def test_bytes_of_a_deleted_revision_wait_and_a_state_goes_at_once(
    catalog: Catalog, tmp_path: Path
) -> None:
    store = BlobStore(tmp_path)
    revision, state = store.put(b"revision"), store.put(b"state")
    run_id = add_run(catalog)
    catalog.add_run_revision(ANN, run_id, Blob(revision), ephemeral=False)
    catalog.add_checkpoint(ANN, run_id, "weights", "gone", Blob(state))
    delete(catalog, "gone")
    catalog.delete_revision(ANN, "math", revision, actor="ann")
    asyncio.run(Collector(catalog, store, 3600.0).collect())
    assert store.exists(revision) and not store.exists(state)
    asyncio.run(Collector(catalog, store, 0.0).collect())
    assert not store.exists(revision)


def test_retention_goes_on_where_it_was_and_begins_anew(catalog: Catalog) -> None:
    for name in ("a", "b"):
        made = [(name, Blob(digest_of(f"{name}{n}"))) for n in range(3)]
        catalog.import_revisions(ANN, BASE, made, actor="key")
    retention = Retention(catalog, Keep(2, 0))
    assert [len(retention.plan(ANN, name).surplus) for name in ("a", "b")] == [1, 1]
    asyncio.run(retention.apply())
    assert [len(catalog.revisions(ANN, name)) for name in ("a", "b")] == [2, 2]
    plan = asyncio.run(retention.set(ANN, "b", 1, actor="key"))
    assert (plan.keep_revisions, len(plan.surplus)) == (1, 1)
    asyncio.run(retention.apply())
    assert [len(catalog.revisions(ANN, name)) for name in ("a", "b")] == [2, 1]
