"""Small blobs in packs: what was put is found, whatever was torn, damaged, deleted or moved, by
whichever process; what was deleted isn't."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from openmint.errors import NotFound, StoreFailed
from openmint.store import packs
from openmint.store.blobs import digest_of
from openmint.store.folder_store import FolderStore
from openmint.store.pack_frames import BLOB, DEATH, HEADER, SMALL_BYTES, encode_frame
from openmint.store.packs import Packs
from tests.store.made import damage, flip, indexes_in, packs_in, raw

SMALL_PACK = 1000
"""With blobs of 100 bytes, a pack of six."""


def blob(number: int, num_bytes: int = 100) -> bytes:
    return number.to_bytes(4, "little") * (num_bytes // 4)


def num_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", SMALL_PACK)


@pytest.fixture
def num_syncs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often something was synced since this was last asked; a sync takes a while."""
    syncs: list[int] = []
    fdatasync = os.fdatasync

    def note(file: int) -> None:
        syncs.append(file)
        time.sleep(0.01)
        fdatasync(file)

    def count() -> int:
        found = len(syncs)
        syncs.clear()
        return found

    monkeypatch.setattr(os, "fdatasync", note)
    return count


# -- put and get ----------------------------------------------------------------------------------


def test_small_blobs_share_a_pack_and_large_ones_are_files(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    small = [store.put(blob(number, SMALL_BYTES - 4)) for number in range(3)]
    large = store.put(blob(9, SMALL_BYTES))
    assert len(packs_in(tmp_path)) == 1
    files = [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
    assert [path.name for path in files] == [large.removeprefix("sha256:")]
    for number, digest in enumerate(small):
        assert store.get(digest) == blob(number, SMALL_BYTES - 4)
        assert store.size(digest) == SMALL_BYTES - 4
    assert store.get(large) == blob(9, SMALL_BYTES)


def test_many_are_put_with_one_sync(tmp_path: Path, num_syncs: Callable[[], int]) -> None:
    store = FolderStore(tmp_path)
    store.put(b"makes the pack")
    num_syncs()
    data = [b"", *(blob(number) for number in range(500)), blob(7), blob(3, SMALL_BYTES)]
    assert store.put_many(data) == [digest_of(each) for each in data]
    assert num_syncs() == 1
    assert [store.get(digest_of(each)) for each in data] == data
    assert store.put_many([]) == []


def test_what_is_there_is_written_once(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put_many([blob(1), blob(2), blob(1)])
    store.put(blob(1))
    assert sum(path.stat().st_size for path in packs_in(tmp_path)) == 2 * (HEADER.size + 100)


def test_bytes_that_another_thread_has_not_synced_yet_are_waited_for(
    tmp_path: Path, num_syncs: Callable[[], int]
) -> None:
    store = FolderStore(tmp_path)
    first = store._packs._put(raw(digest_of(blob(1))), blob(1))
    num_syncs()
    assert first is not None
    store.put_many([blob(2), blob(1)])
    assert num_syncs() == 1
    store.put(blob(1))
    assert num_syncs() == 0
    store.put_many([blob(3), blob(1)])
    assert num_syncs() == 1


def test_bytes_that_another_process_may_take_back_are_not_relied_on(tmp_path: Path) -> None:
    store, other = FolderStore(tmp_path), FolderStore(tmp_path)
    digest = store.put(blob(1))
    other.put(blob(1))
    assert {copy.pack for copy in store._packs.find(raw(digest))} == {
        path.stem for path in packs_in(tmp_path)
    }
    assert len(packs_in(tmp_path)) == 2


def test_what_a_killed_process_had_not_synced_is_synced_by_who_goes_on(
    tmp_path: Path, num_syncs: Callable[[], int]
) -> None:
    store = FolderStore(tmp_path)
    store._packs._put(raw(digest_of(blob(1))), blob(1))
    del store
    num_syncs()
    store = FolderStore(tmp_path)
    store.put(blob(2))
    assert num_syncs() == 2
    store.put(blob(1))
    assert num_syncs() == 0


def test_a_sealed_pack_is_not_taken_over(tmp_path: Path, small_packs: None) -> None:
    """By a process that last saw it grow."""
    store, other = FolderStore(tmp_path), FolderStore(tmp_path)
    store.put(blob(1))
    (path,) = packs_in(tmp_path)
    assert other._packs._locked(path.stem) is None
    store.put_many(blob(number) for number in range(7))
    assert path.with_suffix(".idx").exists()
    assert other._packs._locked(path.stem) is None


def test_threads_that_put_at_once_share_syncs(tmp_path: Path, num_syncs: Callable[[], int]) -> None:
    store = FolderStore(tmp_path)
    with ThreadPoolExecutor(16) as pool:
        digests = list(pool.map(lambda number: store.put(blob(number)), range(160)))
    assert num_syncs() < 80
    assert [store.get(digest) for digest in digests] == [blob(n) for n in range(160)]


def test_small_blobs_in_files_of_an_older_store_stay_where_they_are(tmp_path: Path) -> None:
    store, digest = FolderStore(tmp_path), digest_of(blob(1))
    path = store._path(digest.removeprefix("sha256:"))
    path.parent.mkdir(parents=True)
    path.write_bytes(blob(1))
    assert store.put(blob(1)) == digest
    assert packs_in(tmp_path) == []
    assert (store.get(digest), store.size(digest), store.exists(digest)) == (blob(1), 100, True)
    store.delete(digest)
    assert not store.exists(digest)


def test_packs_are_sealed_when_full_and_found_by_who_opens_them_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "MAX_FRAMES", 3)
    store = FolderStore(tmp_path)
    digests = [store.put(blob(number)) for number in range(8)]
    assert (len(packs_in(tmp_path)), len(indexes_in(tmp_path))) == (3, 2)
    for reader in (store, FolderStore(tmp_path)):
        assert [reader.get(digest) for digest in digests] == [blob(n) for n in range(8)]


def test_few_files_are_open_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_packs: None
) -> None:
    monkeypatch.setattr(packs, "MAX_OPEN", 4)
    store = FolderStore(tmp_path)
    digests = store.put_many(blob(number) for number in range(100))
    before = num_open()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(store.get, digests * 5))
    assert found == [blob(number) for number in range(100)] * 5
    assert len(packs_in(tmp_path)) > 10
    assert num_open() - before <= 4


def test_a_pack_is_synced_before_its_index_is_named_and_its_own_name_before_it_is_used(
    tmp_path: Path, small_packs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, events = FolderStore(tmp_path), list[str]()

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def note(first: Any, *rest: Any) -> Any:
            is_file = isinstance(first, int)
            path = Path(f"/proc/self/fd/{first}").readlink() if is_file else Path(rest[0])
            events.append(f"{name} {path.suffix or path.name}")
            return call(first, *rest)

        return note

    for name in ("write", "fsync", "fdatasync", "replace"):
        monkeypatch.setattr(os, name, noting(name, getattr(os, name)))
    store.put(blob(1))
    made = ["fdatasync .pack", "fsync packs", f"fsync {tmp_path.name}"]
    assert events == [*made, "write .pack", "fdatasync .pack"]
    events.clear()
    store.put_many(blob(number) for number in range(2, 8))
    sealed = ["fdatasync .pack", *events[6:7], "replace .idx", "fsync packs"]
    assert events[:5] == ["write .pack"] * 5
    assert events[5:9] == sealed
    assert events[9:] == [*made, "write .pack", "fdatasync .pack"]


# -- deletion -------------------------------------------------------------------------------------


def test_what_was_deleted_comes_back_only_by_another_put(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    digest = store.put(blob(1))
    for _ in range(3):
        store.delete(digest)
        store.delete(digest)
        for reader in (store, FolderStore(tmp_path)):
            assert not reader.exists(digest)
            with pytest.raises(NotFound):
                reader.get(digest)
        store.put(blob(1))
        for reader in (store, FolderStore(tmp_path)):
            assert reader.get(digest) == blob(1)


def test_one_process_deletes_what_others_put_and_they_put_it_again(tmp_path: Path) -> None:
    one, two = FolderStore(tmp_path), FolderStore(tmp_path)
    digest = one.put(blob(1))
    two.put(blob(1))  # a copy of its own
    for this, other in ((one, two), (two, one), (one, two)):
        this.delete(digest)
        assert not other.exists(digest)
        other.put(blob(1))
        assert this.get(digest) == blob(1)
    assert len(packs_in(tmp_path)) == 2


def test_deletions_share_a_sync(tmp_path: Path, num_syncs: Callable[[], int]) -> None:
    store = FolderStore(tmp_path)
    store.sync_deletions()
    digests = store.put_many(blob(number) for number in range(20))
    num_syncs()
    for digest in digests:
        store.delete(digest)
    assert num_syncs() == 0
    store.sync_deletions()
    store.sync_deletions()
    assert num_syncs() == 1


def test_deletions_last_also_if_a_write_failed_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_syncs: Callable[[], int]
) -> None:
    store = FolderStore(tmp_path)
    digest = store.put(blob(1))
    num_syncs()
    store.delete(digest)
    with monkeypatch.context() as patch:
        Refusing(patch, "write")
        with pytest.raises(StoreFailed, match="No space left"):
            store.put(blob(2))
    store.sync_deletions()
    assert num_syncs() == 1
    assert not FolderStore(tmp_path).exists(digest)


def test_deletions_that_a_failed_sync_undid_are_said_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = FolderStore(tmp_path), FolderStore(tmp_path)
    digest = store.put(blob(1))
    store.delete(digest)
    assert not other.exists(digest)
    with monkeypatch.context() as patch:
        Refusing(patch, "fdatasync")
        with pytest.raises(StoreFailed, match="No space left"):
            store.put(blob(2))
    assert store.exists(digest)
    assert other.exists(digest)
    with pytest.raises(StoreFailed, match=r"could not make deletions last: .*No space left"):
        store.sync_deletions()
    store.delete(digest)
    store.sync_deletions()
    for reader in (store, other, FolderStore(tmp_path)):
        assert not reader.exists(digest)


def test_a_death_inside_a_blob_kills_nobody(tmp_path: Path) -> None:
    """Who uploads bytes may write frames into them, and the header before them may be damaged."""
    store = FolderStore(tmp_path)
    victim = store.put(blob(1))
    (copy,) = store._packs.find(raw(victim))
    forged = encode_frame(DEATH, raw(victim), bytes(8)) * 3
    # It claims a payload that reaches over what others put later.
    forged += encode_frame(BLOB, bytes(32), bytes(8), bytes(1000))[: HEADER.size]
    evil = store.put(forged)
    last = store.put(blob(2))
    damage(tmp_path, evil, at=-HEADER.size)
    del store
    store = FolderStore(tmp_path)
    assert (store.get(victim), store.get(last)) == (blob(1), blob(2))
    store.put(blob(3))
    assert (store.get(victim), store.get(last)) == (blob(1), blob(2))
    assert copy.birth != bytes(8)


# -- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_sealed", [False, True])
def test_damaged_bytes_are_refused_and_healed_by_putting_again(
    tmp_path: Path, small_packs: None, is_sealed: bool
) -> None:
    store = FolderStore(tmp_path)
    digest = store.put(blob(1))
    if is_sealed:
        store.put_many(blob(number) for number in range(10, 20))
    damage(tmp_path, digest, at=50)
    with pytest.raises(StoreFailed, match=f"{digest} are damaged: .*pack at byte 0"):
        store.get(digest)
    assert store.exists(digest)
    assert store.put(blob(1)) == digest
    assert store.get(digest) == blob(1)
    del store
    store = FolderStore(tmp_path)
    assert store.get(digest) == blob(1)
    store.delete(digest)
    assert not store.exists(digest)


def life(root: Path) -> tuple[FolderStore, list[bytes]]:
    """A store with four small blobs and a deleted one, and what it holds."""
    store = FolderStore(root)
    gone = store.put(blob(9, 12))
    store.delete(gone)
    data = [blob(number, 12) for number in range(4)]
    store.put_many(data)
    return store, data


def opened_again(root: Path, data: list[bytes], num_lost: int) -> None:
    """All but the last blobs are found, those are right or not there, and all can be put again,
    after which a third process finds them."""
    reader = FolderStore(root)
    sound = data[: len(data) - num_lost]
    assert [reader.get(digest_of(each)) for each in sound] == sound
    for each in data:
        try:
            assert reader.get(digest_of(each)) == each
        except (NotFound, StoreFailed):
            assert each not in sound
    assert not reader.exists(digest_of(blob(9, 12)))
    writer = FolderStore(root)
    writer.put(b"more")
    assert [writer.get(digest_of(each)) for each in sound] == sound
    writer.put_many(data)
    del writer
    again = FolderStore(root)
    for store in (reader, again):
        assert [store.get(digest_of(each)) for each in data] == data
        assert store.get(digest_of(b"more")) == b"more"
        assert not store.exists(digest_of(blob(9, 12)))


FRAME_BYTES = HEADER.size + 12


@pytest.mark.parametrize("cut_bytes", range(1, 2 * FRAME_BYTES + 1))
def test_a_torn_end_is_cut_off_wherever_it_tore(tmp_path: Path, cut_bytes: int) -> None:
    store, data = life(tmp_path)
    (path,) = packs_in(tmp_path)
    del store
    os.truncate(path, path.stat().st_size - cut_bytes)
    opened_again(tmp_path, data, num_lost=1 if cut_bytes <= FRAME_BYTES else 2)
    assert len(packs_in(tmp_path)) == 1


@pytest.mark.parametrize("from_end", range(1, 2 * FRAME_BYTES + 1))
def test_a_flipped_bit_costs_at_most_its_own_blob(tmp_path: Path, from_end: int) -> None:
    store, data = life(tmp_path)
    (path,) = packs_in(tmp_path)
    del store
    flip(path, path.stat().st_size - from_end)
    hit = 3 if from_end <= FRAME_BYTES else 2
    order = [*(each for each in data if each != data[hit]), data[hit]]
    opened_again(tmp_path, order, num_lost=1)


def test_damage_in_the_middle_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, data = life(tmp_path)
    lost = digest_of(data[1])
    damage(tmp_path, lost, at=-1)
    del store
    for _ in range(2):  # as another process's, then as its own
        store = FolderStore(tmp_path)
        with caplog.at_level(logging.ERROR), pytest.raises(NotFound, match="64 damaged bytes"):
            store.get(lost)
        assert "64 bytes of pack" in caplog.text
        caplog.clear()
        assert [store.get(digest_of(each)) for each in data if each != data[1]]
        store.put(b"takes the pack over")
        with pytest.raises(NotFound, match="64 damaged bytes"):
            store.get(lost)
    store.put(data[1])
    assert store.get(lost) == data[1]


def test_a_tail_that_reads_as_written_but_is_not_is_cut_off_by_who_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a power cut a file may be as long as it was, with zeros where bytes were."""
    store, data = life(tmp_path)
    (path,) = packs_in(tmp_path)
    size = path.stat().st_size
    del store
    os.truncate(path, size - FRAME_BYTES - 12)
    os.truncate(path, size)
    store = FolderStore(tmp_path)
    with caplog.at_level(logging.WARNING):
        store.put(b"more")
    assert f"is torn, {2 * FRAME_BYTES} bytes" in caplog.text
    for each in data[:2]:
        assert store.get(digest_of(each)) == each
    for each in data[2:]:
        with pytest.raises(NotFound):
            store.get(digest_of(each))


def test_a_damaged_index_is_made_again(
    tmp_path: Path, small_packs: None, caplog: pytest.LogCaptureFixture
) -> None:
    store = FolderStore(tmp_path)
    digests = store.put_many(blob(number) for number in range(7))
    del store
    (path,) = indexes_in(tmp_path)
    whole = path.read_bytes()
    for size, offset in [(0, None), (10, None), (len(whole) - 1, None)] + [
        (len(whole), offset) for offset in range(0, len(whole), 7)
    ]:
        os.truncate(path, size)
        if offset is not None:
            flip(path, offset)
        caplog.clear()
        reader = FolderStore(tmp_path)
        assert [reader.get(digest) for digest in digests] == [blob(n) for n in range(7)]
        assert "it is made again" in caplog.text
        assert path.read_bytes() == whole


def test_an_index_without_its_pack_means_nothing(tmp_path: Path, small_packs: None) -> None:
    store = FolderStore(tmp_path)
    digests = store.put_many(blob(number) for number in range(7))
    (index,) = indexes_in(tmp_path)
    index.with_suffix(".pack").unlink()
    assert not store.exists(digests[0])
    assert FolderStore(tmp_path).get(digests[-1]) == blob(6)
    store.compact()
    assert indexes_in(tmp_path) == []


# -- a disk that refuses --------------------------------------------------------------------------


class Refusing:
    """Has one of the system's calls fail from now on, a write after half of its bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.on = True
        call: Any = getattr(os, name)

        def refuse(*arguments: Any) -> Any:
            if not self.on:
                return call(*arguments)
            if name == "write" and len(arguments[1]) > 50:
                return call(arguments[0], arguments[1][:50])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, name, refuse)


@pytest.mark.parametrize("name", ["write", "fdatasync", "fsync", "ftruncate"])
def test_a_disk_that_refuses_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_packs: None, name: str
) -> None:
    store = FolderStore(tmp_path)
    kept = store.put(blob(1))
    refusing = Refusing(monkeypatch, name)
    if name == "ftruncate":
        Refusing(monkeypatch, "write").on = True
    for number in range(10, 30):
        with pytest.raises(StoreFailed, match="No space left"):
            store.put_many([blob(number + 100 * i) for i in range(10)])
    refusing.on = False
    monkeypatch.undo()
    monkeypatch.setattr(packs, "PACK_BYTES", SMALL_PACK)
    assert len(packs_in(tmp_path)) <= 4
    assert list((tmp_path / "blobs" / "incoming").iterdir()) == []
    assert store.get(kept) == blob(1)
    digests = store.put_many(blob(number) for number in range(10, 30))
    del store
    for reader in (FolderStore(tmp_path), FolderStore(tmp_path)):
        assert reader.get(kept) == blob(1)
        assert [reader.get(digest) for digest in digests] == [blob(n) for n in range(10, 30)]
        assert reader._packs.num_damaged_bytes() == 0
        reader.put(b"more")


def test_a_deletion_that_finds_no_room_is_a_store_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    digest = store.put(blob(1))
    refusing = Refusing(monkeypatch, "write")
    with pytest.raises(StoreFailed, match=f"could not delete {digest}.*No space left"):
        store.delete(digest)
    refusing.on = False
    assert store.get(digest) == blob(1)
    store.delete(digest)
    assert not store.exists(digest)


def test_all_who_wait_hear_of_a_sync_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    kept = store.put(blob(0))
    all_wrote = threading.Barrier(4)
    failed: list[str] = []
    put = Packs._put

    def put_together(self: Packs, digest: bytes, data: bytes) -> object:
        place = put(self, digest, data)
        all_wrote.wait()
        return place

    def put_one(number: int) -> None:
        with pytest.raises(StoreFailed, match="No space left"):
            store.put(blob(number))
        failed.append("")

    with monkeypatch.context() as patch:
        patch.setattr(Packs, "_put", put_together)
        Refusing(patch, "fdatasync")
        threads = [threading.Thread(target=put_one, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(failed) == 4
    assert store.get(kept) == blob(0)
    assert not any(store.exists(digest_of(blob(number))) for number in range(1, 5))
    assert store.get(store.put(blob(1))) == blob(1)


def test_a_reader_notices_that_a_write_was_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another blob of the same size stands where a process has seen the first one."""
    store, reader = FolderStore(tmp_path), FolderStore(tmp_path)
    kept = store.put(blob(0))
    fdatasync = os.fdatasync

    def refuse(file: int) -> None:
        assert reader.get(digest_of(blob(1))) == blob(1)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(StoreFailed, match="Input/output"):
        store.put(blob(1))
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    later = store.put(blob(2))
    assert len(packs_in(tmp_path)) == 1
    assert reader.get(later) == blob(2)
    assert reader.get(kept) == blob(0)
    assert not reader.exists(digest_of(blob(1)))


# -- compaction -----------------------------------------------------------------------------------


def sizes(root: Path) -> int:
    return sum(path.stat().st_size for path in packs_in(root))


def test_compaction_gives_room_back(tmp_path: Path, small_packs: None) -> None:
    store, other = FolderStore(tmp_path), FolderStore(tmp_path)
    digests = store.put_many(blob(number) for number in range(60))
    other.put(blob(100))
    kept = [number for number in range(60) if number % 6 == 0]
    for number, digest in enumerate(digests):
        if number not in kept:
            store.delete(digest)
    before = sizes(tmp_path)
    store.compact()
    assert sizes(tmp_path) < before / 2
    store.compact()
    for reader in (store, other, FolderStore(tmp_path)):
        for number, digest in enumerate(digests):
            assert reader.exists(digest) == (number in kept)
        assert [reader.get(digests[number]) for number in kept] == [blob(n) for n in kept]
        assert reader.get(digest_of(blob(100))) == blob(100)


def test_what_is_half_live_stays(tmp_path: Path, small_packs: None) -> None:
    store = FolderStore(tmp_path)
    digests = store.put_many(blob(number) for number in range(12))
    before = packs_in(tmp_path)
    store.delete(digests[0])
    store.compact()
    assert packs_in(tmp_path) == before


def test_deaths_go_once_nothing_is_left_to_kill(tmp_path: Path, small_packs: None) -> None:
    """Else a store in which much comes and goes would only grow."""
    store = FolderStore(tmp_path)
    for round_ in range(30):
        for digest in store.put_many(blob(100 * round_ + number) for number in range(10)):
            store.delete(digest)
        store.compact()
    assert sizes(tmp_path) < 8 * SMALL_PACK
    assert len(store._packs._index._dead) < 100


def test_who_has_the_old_pack_open_still_reads_it(tmp_path: Path, small_packs: None) -> None:
    store, reader = FolderStore(tmp_path), FolderStore(tmp_path)
    digests = store.put_many(blob(number) for number in range(7))
    assert reader.get(digests[0]) == blob(0)
    (copy,) = reader._packs.find(raw(digests[0]))
    for digest in digests[1:]:
        store.delete(digest)
    store.compact()
    assert not (tmp_path / "packs" / f"{copy.pack}.pack").exists()
    assert reader._packs._read(copy) == blob(0)
    assert reader.get(digests[0]) == blob(0)


def move_what_is_found(
    monkeypatch: pytest.MonkeyPatch, seeker: FolderStore, mover: FolderStore
) -> None:
    """Whatever `seeker` finds, `mover` compacts before it is read."""
    find = seeker._packs.find

    def find_and_move(digest: bytes) -> object:
        copies = find(digest)
        mover.compact()
        return copies

    monkeypatch.setattr(seeker._packs, "find", find_and_move)


def test_what_moves_while_it_is_read_is_looked_for_again(
    tmp_path: Path, small_packs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, reader = FolderStore(tmp_path), FolderStore(tmp_path)
    digests = store.put_many(blob(number) for number in range(7))
    for digest in digests[1:]:
        store.delete(digest)
    move_what_is_found(monkeypatch, reader, store)
    assert reader.get(digests[0]) == blob(0)


def test_bytes_that_move_while_they_are_put_again_stay(
    tmp_path: Path, small_packs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who doesn't find them where they were must not take them for damaged."""
    store, writer = FolderStore(tmp_path), FolderStore(tmp_path)
    digests = store.put_many(blob(number) for number in range(7))
    for digest in digests[1:]:
        store.delete(digest)
    move_what_is_found(monkeypatch, writer, store)
    writer.put(blob(0))
    assert len(store._packs.find(raw(digests[0]))) == 2


@pytest.mark.parametrize("is_put_again", [False, True])
def test_what_is_deleted_while_it_moves_stays_deleted(
    tmp_path: Path, small_packs: None, monkeypatch: pytest.MonkeyPatch, is_put_again: bool
) -> None:
    store, other = FolderStore(tmp_path), FolderStore(tmp_path)
    digests = store.put_many(blob(number) for number in range(7))
    for digest in digests[1:]:
        store.delete(digest)
    append = Packs._append

    def delete_first(self: Packs, magic: bytes, key: bytes, payload: bytes = b"") -> object:
        if self is store._packs and payload == blob(0):
            monkeypatch.setattr(Packs, "_append", append)
            other.delete(digests[0])
            if is_put_again:
                other.put(blob(0))
        return append(self, magic, key, payload)

    monkeypatch.setattr(Packs, "_append", delete_first)
    store.compact()
    for _ in range(3):
        store.put_many(os.urandom(100) for _ in range(20))
        store.compact()
        for reader in (store, other, FolderStore(tmp_path)):
            assert reader.exists(digests[0]) == is_put_again


def test_a_damaged_pack_is_not_compacted(
    tmp_path: Path, small_packs: None, caplog: pytest.LogCaptureFixture
) -> None:
    store = FolderStore(tmp_path)
    digests = store.put_many(blob(number) for number in range(7))
    for digest in digests[1:5]:
        store.delete(digest)
    damage(tmp_path, digests[0])
    store.compact()
    assert "stays as it is" in caplog.text
    assert store.get(digests[5]) == blob(5)
    with pytest.raises(StoreFailed, match="damaged"):
        store.get(digests[0])
    store.put(blob(0))
    before = packs_in(tmp_path)
    store.compact()
    assert packs_in(tmp_path) != before
    assert [store.get(digests[number]) for number in (0, 5, 6)] == [blob(0), blob(5), blob(6)]


def test_compactions_that_are_killed_do_not_pile_up_copies(
    tmp_path: Path, small_packs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    digests = store.put_many(blob(number) for number in range(7))
    for digest in digests[1:6]:
        store.delete(digest)
    with monkeypatch.context() as patch:
        patch.setattr(Packs, "_remove", lambda self, name: None)
        for _ in range(10):
            store.compact()
    assert len(store._packs.find(raw(digests[0]))) == 2
    store.compact()
    assert len(store._packs.find(raw(digests[0]))) == 1
    assert store.get(digests[0]) == blob(0)


def test_one_compaction_runs_at_a_time(
    tmp_path: Path, small_packs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = FolderStore(tmp_path), FolderStore(tmp_path)
    for digest in store.put_many(blob(number) for number in range(7)):
        store.delete(digest)
    before = packs_in(tmp_path)
    wasteful = Packs._wasteful

    def compact_beside(self: Packs) -> list[str]:
        if self is store._packs:
            other.compact()
            assert packs_in(tmp_path) == before
        return wasteful(self)

    monkeypatch.setattr(Packs, "_wasteful", compact_beside)
    store.compact()
    assert packs_in(tmp_path) != before


# -- a crash at every step ------------------------------------------------------------------------


class Crash(BaseException):
    """The process dies."""


CALLS = ("write", "fsync", "fdatasync", "ftruncate", "replace", "unlink")


class Crashing:
    """Has the n-th call that makes something durable, and every later one, raise; a write is made
    by half first. Knows how far each file was synced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies_at: int) -> None:
        self.left = dies_at
        self.synced: dict[int, int] = {}
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **more: Any) -> Any:
            self.left -= 1
            if self.left <= 0:
                if name == "write" and self.left == 0:
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Crash
            if name == "fdatasync":
                status = os.fstat(arguments[0])
                self.synced[status.st_ino] = status.st_size
            # What would really be synced matters to no test, and takes most of its time.
            return None if name in ("fsync", "fdatasync") else call(*arguments, **more)

        return counting

    def cut_power(self, root: Path) -> None:
        """Of packs that were written to, only what was synced is left."""
        for path in packs_in(root):
            os.truncate(path, self.synced.get(path.stat().st_ino, 0))


def work(store: FolderStore, model: dict[int, bool]) -> Iterator[None]:
    """A life of puts, deletions and compactions. The model says what was acknowledged: there, or
    deleted for good; what is under way is not in it."""
    for start in (0, 14):
        numbers = range(start, start + 14)
        store.put_many(blob(number) for number in numbers)
        model.update(dict.fromkeys(numbers, True))
        yield
        deleted = [number for number in numbers if number % 5]
        for number in deleted:
            del model[number]
            store.delete(digest_of(blob(number)))
            yield
        store.sync_deletions()
        model.update(dict.fromkeys(deleted, False))
        yield
        store.compact()
        yield
        del model[start + 1]
        store.put(blob(start + 1))
        model[start + 1] = True
        yield


@pytest.mark.parametrize("has_power", [True, False])
def test_a_crash_at_any_write_loses_nothing_and_shows_nothing_half(
    tmp_path: Path, small_packs: None, has_power: bool
) -> None:
    """Dies at the 1st, 2nd, 3rd ... call, until a life passes untouched."""
    dies_at, is_over = 0, False
    while not is_over:
        dies_at += 1
        root = tmp_path / str(dies_at)
        store, model = FolderStore(root), dict[int, bool]()
        with pytest.MonkeyPatch.context() as monkeypatch:
            crashing = Crashing(monkeypatch, dies_at)
            try:
                for _ in work(store, model):
                    pass
                is_over = True
            except Crash:
                pass
            del store
            if not has_power:
                crashing.cut_power(root)
            crashing.left = sys.maxsize
            check(root, model)
        shutil.rmtree(root)
    assert dies_at > 50


def check(root: Path, model: dict[int, bool]) -> None:
    for _ in range(2):
        store = FolderStore(root)
        store.start()
        for number, is_there in model.items():
            digest = digest_of(blob(number))
            assert store.exists(digest) == is_there
            if is_there:
                assert store.get(digest) == blob(number)
        assert store._packs.num_damaged_bytes() == 0
        store.put_many(blob(number) for number in range(1000, 1010))
        store.compact()
        del store
    assert all(path.with_suffix(".pack").exists() for path in indexes_in(root))


# -- several processes ----------------------------------------------------------------------------


def write_beside(root: Path, seed: int) -> None:
    """Puts what others put too and what is its own, deletes some, reads what others wrote."""
    packs.PACK_BYTES = 20 * SMALL_PACK
    store, order = FolderStore(root), random.Random(seed)
    for number in range(300):
        own = store.put(blob(1000 * seed + number))
        shared = order.randrange(50)
        store.put(blob(shared))
        assert store.get(own) == blob(1000 * seed + number)
        if number % 3 == 0:
            store.delete(own)
            assert not store.exists(own)
        if number % 50 == 0:
            store.compact()
        with_luck = digest_of(blob(order.randrange(50)))
        if store.exists(with_luck):
            store.get(with_luck)


def test_processes_write_and_compact_at_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write_beside, args=(tmp_path, seed)) for seed in (1, 2, 3)]
    watching = FolderStore(tmp_path)
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    for store in (watching, FolderStore(tmp_path)):
        for seed in (1, 2, 3):
            for number in range(300):
                data = blob(1000 * seed + number)
                assert store.exists(digest_of(data)) == (number % 3 != 0)
                if number % 3:
                    assert store.get(digest_of(data)) == data
        assert store._packs.num_damaged_bytes() == 0
    growing = [path for path in packs_in(tmp_path) if not path.with_suffix(".idx").exists()]
    assert len(growing) <= 3
