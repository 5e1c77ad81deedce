"""What every store promises: one set of tests for the folder and for a real S3 server."""

from __future__ import annotations

import multiprocessing
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from openmint.errors import NotFound, StoreFailed
from openmint.store.blobs import BlobStore, digest_of
from openmint.store.opening import open_store
from openmint.store.pack_frames import SMALL_BYTES
from openmint.types import Digest
from tests.store.conftest import Place

DATA = b"adapter bytes" * 30_000
assert len(DATA) > SMALL_BYTES
LARGE = 12_000_000
"""Sent in parts."""


@pytest.mark.parametrize("data", [DATA, b"small", b""], ids=["large", "small", "empty"])
def test_what_is_put_can_be_read_sized_and_deleted(store: BlobStore, data: bytes) -> None:
    digest = store.put(data)
    assert digest == digest_of(data)
    assert store.get(digest) == data
    assert store.size(digest) == len(data)
    assert store.exists(digest)
    store.delete(digest)
    store.delete(digest)
    store.sync_deletions()
    store.compact()
    assert not store.exists(digest)
    for ask in (store.get, store.size):
        with pytest.raises(NotFound, match="no bytes"):
            ask(digest)
    store.delete(digest)
    store.sync_deletions()


def test_bytes_of_several_parts_come_back(store: BlobStore) -> None:
    data = random.Random(1).randbytes(LARGE)
    assert store.get(store.put(data)) == data


def test_many_are_put_and_deleted_at_once(place: Place) -> None:
    blobs = [
        number.to_bytes(4, "little") * (200_000 * (number % 7 == 0) + 1) for number in range(70)
    ]
    store = place.opened()
    digests = store.put_many(iter(blobs))
    assert digests == [digest_of(data) for data in blobs]
    other = place.opened()
    assert [other.get(digest) for digest in digests] == blobs
    for digest in digests[:60]:
        store.delete(digest)
    store.sync_deletions()
    assert [other.exists(digest) for digest in digests] == [False] * 60 + [True] * 10
    assert other.put_many([]) == []


def test_putting_twice_leaves_one_copy_and_nothing_else(place: Place) -> None:
    store = place.opened()
    assert store.put(DATA) == store.put(DATA)
    assert [Path(name).name for name in place.names()] == [digest_of(DATA).removeprefix("sha256:")]


@pytest.mark.parametrize("damage", [DATA[:-1], b"X" + DATA[1:], b""])
def test_damaged_bytes_are_refused_and_healed_by_putting_again(place: Place, damage: bytes) -> None:
    store = place.opened()
    digest = store.put(DATA)
    place.damage(digest, damage)
    with pytest.raises(StoreFailed, match=f"{digest} are damaged"):
        store.get(digest)
    assert store.exists(digest)
    store.put(DATA)
    assert store.get(digest) == DATA


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "sha256:" + "A" * 64, "sha256:" + "0" * 63, "sha256:\0"]
)
def test_only_digests_become_names(store: BlobStore, name: str) -> None:
    for ask in (store.get, store.size, store.exists, store.delete):
        with pytest.raises(NotFound, match="not a digest"):
            ask(Digest(name))


def test_threads_may_put_the_same_bytes_at_once(store: BlobStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda _: store.put(DATA), range(64)))
    assert digests == {digest_of(DATA)}
    assert store.get(digest_of(DATA)) == DATA


def put_numbers(url: str, folder: Path, count: int) -> None:
    store = open_store(url, folder)
    for number in range(count):
        store.put(number.to_bytes(4, "little") * 500)


def test_processes_share_one_store(place: Place) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [
        spawn.Process(target=put_numbers, args=(place.url, place.folder, 40)) for _ in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    store = place.opened()
    for number in range(40):
        data = number.to_bytes(4, "little") * 500
        assert store.get(digest_of(data)) == data
    # Small ones are in the folder's packs.
    assert len(place.names()) == (40 if place.url else 0)


def test_the_service_starts_on_it_and_leaves_nothing(place: Place) -> None:
    place.opened().start()
    assert place.names() == []
