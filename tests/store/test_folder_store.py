"""The folder: durable order of operations, a disk that refuses, leftovers.

What every store promises is in `test_blobs.py`, small blobs are in `test_packs.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from openmint.errors import StoreFailed
from openmint.store.blobs import digest_of
from openmint.store.folder_store import FolderStore
from openmint.store.pack_frames import SMALL_BYTES
from openmint.types import Digest

DATA = b"adapter bytes" * 30_000
assert len(DATA) > SMALL_BYTES


def file_of(root: Path, digest: Digest) -> Path:
    name = digest.removeprefix("sha256:")
    return root / "blobs" / name[:2] / name[2:4] / name


def test_bytes_are_synced_before_their_name_and_folders_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
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
    store = FolderStore(tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFailed, match="No space left"):
        store.put(DATA)
    assert not list((tmp_path / "blobs" / "incoming").iterdir())
    assert not store.exists(digest_of(DATA))


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    digest = store.put(DATA)
    (tmp_path / "blobs" / "incoming" / "tmp1234").write_bytes(DATA[:100])
    store.start()
    assert not list((tmp_path / "blobs" / "incoming").iterdir())
    assert store.get(digest) == DATA


def test_the_room_of_a_large_blob_is_freed_where_nobody_waits(tmp_path: Path) -> None:
    """`delete` is called on the event loop, `sync_deletions` is not."""
    store = FolderStore(tmp_path)
    digest = store.put(DATA)
    store.delete(digest)
    store.delete(digest)
    assert not store.exists(digest)
    (moved,) = (tmp_path / "blobs" / "incoming").iterdir()
    assert moved.stat().st_size == len(DATA)
    assert store.put(DATA) == digest  # nothing of it is taken from the dying one
    store.sync_deletions()
    assert not moved.exists()
    assert store.get(digest) == DATA
