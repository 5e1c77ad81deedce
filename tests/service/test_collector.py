"""Doomed bytes go once nothing names them, and never under a save."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Keep
from openmint.errors import StoreFailed
from openmint.service.collector import Collector
from openmint.service.retention import Retention
from openmint.store.blobs import digest_of
from openmint.store.folder_store import FolderStore
from openmint.types import Digest
from tests.catalog.made import ANN, BASE, RUN, Blob, add_run

ORPHAN, NAMED = b"orphan", b"named"


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog.open(f"sqlite:///{tmp_path / 'openmint.db'}")
    yield catalog
    catalog.close()


def delete(catalog: Catalog, name: str) -> None:
    catalog.delete_checkpoint(ANN, RUN, "weights", name, actor="ann")


def test_doomed_bytes_go_and_others_stay(catalog: Catalog, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
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
    store = FolderStore(tmp_path)
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


class Slow(FolderStore):
    """Deletes later, as over a network; meanwhile whoever is told so saves."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.doomed: list[Digest] = []
        self.began, self.may_delete = threading.Event(), threading.Event()

    def delete(self, digest: Digest) -> None:
        self.doomed.append(digest)

    def sync_deletions(self) -> None:
        self.began.set()
        assert self.may_delete.wait(10)
        for digest in self.doomed:
            super().delete(digest)
        super().sync_deletions()


@pytest.mark.parametrize("is_put_last", [False, True])
def test_a_save_that_meets_a_deletion_under_way_fails_or_has_its_bytes(
    catalog: Catalog, tmp_path: Path, is_put_last: bool
) -> None:
    store = Slow(tmp_path)
    collector = Collector(catalog, store, 0.0)
    run_id = add_run(catalog)
    other = store.put(NAMED)
    catalog.add_checkpoint(ANN, run_id, "weights", "gone", Blob(store.put(ORPHAN)))
    delete(catalog, "gone")

    async def meet() -> None:
        collecting = asyncio.create_task(collector.collect())
        await asyncio.to_thread(store.began.wait, 10)
        with collector.saving():
            await collector.spare(other)  # waits for nobody
            digest = store.put(ORPHAN)
            sparing = asyncio.create_task(collector.spare(digest))
            await asyncio.sleep(0.05)
            assert not sparing.done()
            if is_put_last:
                store.doomed.clear()
            store.may_delete.set()
            await sparing
        await collecting

    if is_put_last:
        asyncio.run(meet())
        assert store.get(digest_of(ORPHAN)) == ORPHAN
        return
    with pytest.raises(StoreFailed, match="save again"):
        asyncio.run(meet())


def test_bytes_of_a_deleted_revision_wait_and_a_state_goes_at_once(
    catalog: Catalog, tmp_path: Path
) -> None:
    store = FolderStore(tmp_path)
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
        made = [(name, Blob(digest_of(f"{name}{n}".encode()))) for n in range(3)]
        catalog.import_revisions(ANN, BASE, made, actor="key")
    retention = Retention(catalog, Keep(2, 0))
    assert [len(retention.plan(ANN, name).surplus) for name in ("a", "b")] == [1, 1]
    asyncio.run(retention.apply())
    assert [len(catalog.revisions(ANN, name)) for name in ("a", "b")] == [2, 2]
    plan = asyncio.run(retention.set(ANN, "b", 1, actor="key"))
    assert (plan.keep_revisions, len(plan.surplus)) == (1, 1)
    asyncio.run(retention.apply())
    assert [len(catalog.revisions(ANN, name)) for name in ("a", "b")] == [2, 1]
