"""Blobs: durable order of operations, healing, damage, and several writers of one folder.

Most of this is of files; `test_packs.py` is of small blobs.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from openmint.errors import NotFound, StoreFailed
from openmint.store.blobs import BlobStore, digest_of
from openmint.store.pack_frames import SMALL_BYTES
from openmint.types import Digest

DATA = b"adapter bytes" * 30_000
assert len(DATA) > SMALL_BYTES


def file_of(root: Path, digest: Digest) -> Path:
    name = digest.removeprefix("sha256:")
    return root / "blobs" / name[:2] / name[2:4] / name


def test_what_is_put_can_be_read_sized_and_deleted(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    digest = store.put(DATA)
    assert digest == digest_of(DATA)
    assert store.get(digest) == DATA
    assert store.size(digest) == len(DATA)
    assert store.exists(digest)
    store.delete(digest)
    store.delete(digest)
    assert not store.exists(digest)
    for ask in (store.get, store.size):
        with pytest.raises(NotFound):
            ask(digest)


def test_putting_twice_leaves_one_file_and_no_temporary(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    assert store.put(DATA) == store.put(DATA)
    files = [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
    assert files == [file_of(tmp_path, digest_of(DATA))]


@pytest.mark.parametrize("damage", [DATA[:-1], b"X" + DATA[1:], b""])
def test_damaged_bytes_are_refused_and_healed_by_putting_again(
    tmp_path: Path, damage: bytes
) -> None:
    store = BlobStore(tmp_path)
    digest = store.put(DATA)
    file_of(tmp_path, digest).write_bytes(damage)
    with pytest.raises(StoreFailed, match="damaged"):
        store.get(digest)
    store.put(DATA)
    assert store.get(digest) == DATA


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "sha256:" + "A" * 64, "sha256:" + "0" * 63, "sha256:\0"]
)
def test_only_digests_become_paths(tmp_path: Path, name: str) -> None:
    store = BlobStore(tmp_path)
    for ask in (store.get, store.size, store.exists, store.delete):
        with pytest.raises(NotFound):
            ask(Digest(name))


def test_bytes_are_synced_before_their_name_and_folders_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(tmp_path)
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        events.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().parent.name)
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    digest = store.put(DATA)
    shard = digest.removeprefix("sha256:")[:2]
    assert events == [
        "sync incoming",
        "rename",
        f"sync {shard}",
        "sync blobs",
        f"sync {tmp_path.name}",
    ]
    events.clear()
    store.put(DATA)
    assert events == [f"sync {shard}", "sync blobs", f"sync {tmp_path.name}"]


def test_a_disk_that_refuses_is_a_store_failure_without_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFailed, match="No space left"):
        store.put(DATA)
    assert not list((tmp_path / "blobs" / "incoming").iterdir())
    assert not store.exists(digest_of(DATA))


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    digest = store.put(DATA)
    (tmp_path / "blobs" / "incoming" / "tmp1234").write_bytes(DATA[:100])
    store.sweep_incoming()
    assert not list((tmp_path / "blobs" / "incoming").iterdir())
    assert store.get(digest) == DATA


def test_threads_may_put_the_same_bytes_at_once(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda _: store.put(DATA), range(64)))
    assert digests == {digest_of(DATA)}
    assert store.get(digest_of(DATA)) == DATA


def put_many(root: Path, count: int) -> None:
    store = BlobStore(root)
    for number in range(count):
        store.put(number.to_bytes(4, "little") * 500)


def test_processes_share_one_folder(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=put_many, args=(tmp_path, 40)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    store = BlobStore(tmp_path)
    for number in range(40):
        data = number.to_bytes(4, "little") * 500
        assert store.get(digest_of(data)) == data
    assert not list((tmp_path / "blobs" / "incoming").iterdir())
