"""Doomed bytes go once nothing names them, and never under a save."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from openmint.catalog.catalog import Catalog
from openmint.service.collector import Collector
from openmint.store.blobs import BlobStore
from tests.catalog.made import ANN, RUN, Blob, add_run

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
    asyncio.run(Collector(catalog, store).collect())
    assert not store.exists(orphan)
    assert store.get(named) == NAMED
    assert catalog.unused_blobs() == []


def test_nothing_is_collected_between_bytes_and_their_record(
    catalog: Catalog, tmp_path: Path
) -> None:
    store = BlobStore(tmp_path)
    collector = Collector(catalog, store)
    run_id = add_run(catalog)
    catalog.add_checkpoint(ANN, run_id, "weights", "gone", Blob(store.put(ORPHAN)))
    delete(catalog, "gone")
    with collector.saving():
        digest = store.put(ORPHAN)  # found in place, as equal bytes are there still
        asyncio.run(collector.collect())
        catalog.add_checkpoint(ANN, run_id, "weights", "again", Blob(digest))
    asyncio.run(collector.collect())
    assert store.get(digest) == ORPHAN
