"""Doomed bytes go once nothing names them, and never under a save."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from openmint.catalog.catalog import Catalog
from openmint.service.collector import Collector
from openmint.store.blobs import BlobStore
from tests.catalog.made import ANN, Blob, add_run

ORPHAN, NAMED = b"orphan", b"named"


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog.open(f"sqlite:///{tmp_path / 'openmint.db'}")
    yield catalog
    catalog.close()


def test_doomed_bytes_go_unless_a_record_names_them(catalog: Catalog, tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    orphan, named = store.put(ORPHAN), store.put(NAMED)
    run_id = add_run(catalog)
    catalog.add_checkpoint(ANN, run_id, "sampler_weights", "kept", Blob(named))
    collector = Collector(catalog, store)
    collector.doom([orphan, named])
    collector.collect()
    assert not store.exists(orphan)
    assert store.get(named) == NAMED


def test_nothing_is_collected_between_bytes_and_their_record(
    catalog: Catalog, tmp_path: Path
) -> None:
    store = BlobStore(tmp_path)
    collector = Collector(catalog, store)
    collector.doom([store.put(ORPHAN)])
    run_id = add_run(catalog)
    with collector.saving():
        digest = store.put(ORPHAN)  # found in place, as equal bytes are there already
        collector.collect()
        catalog.add_checkpoint(ANN, run_id, "sampler_weights", "again", Blob(digest))
    collector.collect()
    assert store.get(digest) == ORPHAN
