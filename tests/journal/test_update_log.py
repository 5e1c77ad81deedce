"""What was said to be durable is found again, whatever happened to the file's end."""

import errno
import os
import queue
import shutil
from pathlib import Path

import pytest

from openmint.errors import StoreFailed
from openmint.journal import update_log
from openmint.journal.update_log import Segment, UpdateLog, segments
from openmint.types import Digest, RunId

BASE = Digest("sha256:" + "0" * 64)
RUN, OTHER = RunId("s:train:0"), RunId("s:train:1")


class Writer:
    """A log, and what it said of each update."""

    def __init__(self, folder, **settings):
        self.said = queue.SimpleQueue()
        self.log = UpdateLog(folder, BASE, lambda call: call(), **settings)

    def append(self, run, seq, gradient):
        self.start(run, seq, gradient)
        return self.said.get(timeout=10)

    def start(self, run, seq, gradient):
        body = memoryview(bytearray(gradient))
        self.log.append(run, seq, {"step": seq}, body, self.said.put)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "journal"


def write(folder, *updates):
    writer = Writer(folder)
    for run, seq, gradient in updates:
        assert writer.append(run, seq, gradient) is None
    writer.log.close()


def gradient(logged):
    memory = memoryview(bytearray(logged.frame.body_bytes))
    logged.read_into(memory)
    return bytes(memory)


def found(folder):
    """Everything that a new worker would find, by run and request."""
    log = UpdateLog(folder, BASE, lambda call: call())
    try:
        return {
            (run, seq): gradient(log.find(run, seq, must_be=False))
            for run, seqs in log.whole().items()
            for seq in seqs
        }
    finally:
        log.close()


def test_a_later_worker_finds_what_an_earlier_one_logged(folder):
    write(folder, (RUN, 1, b"one"), (OTHER, 1, b"other"))
    write(folder, (RUN, 2, b"two"))
    log = UpdateLog(folder, BASE, lambda call: call())
    assert log.epoch == 3
    logged = log.find(RUN, 1, must_be=False)
    assert gradient(logged) == b"one"
    assert logged.head == {"run": RUN, "seq": 1, "epoch": 1, "step": 1}
    assert log.whole() == {RUN: (1, 2), OTHER: (1,)}
    assert log.find(RUN, 3, must_be=False) is None
    with pytest.raises(StoreFailed, match="lacks the update"):
        log.find(RUN, 3, must_be=True)
    log.close()


def test_an_update_that_was_made_again_counts_in_its_later_form(folder):
    write(folder, (RUN, 1, b"first"))
    write(folder, (RUN, 1, b"again"))
    assert found(folder) == {(RUN, 1): b"again"}


def test_a_tail_cut_at_any_byte_takes_with_it_only_what_it_holds(folder):
    write(folder, (RUN, 1, b"kept"), (RUN, 2, b"torn"))
    (path,) = segments(folder)
    _, last = Segment.read(path, with_bodies=True).updates
    data = path.read_bytes()
    for size in range(last.offset, len(data)):
        path.write_bytes(data[:size])
        assert found(folder) == {(RUN, 1): b"kept"}, size
        for newer in segments(folder)[1:]:
            newer.unlink()


def test_a_tail_flipped_at_any_byte_is_cut_off(folder):
    write(folder, (RUN, 1, b"kept"), (RUN, 2, b"flipped"))
    (path,) = segments(folder)
    _, last = Segment.read(path, with_bodies=True).updates
    data = bytearray(path.read_bytes())
    for at in range(last.offset, len(data)):
        data[at] ^= 0xFF
        path.write_bytes(data)
        assert found(folder) == {(RUN, 1): b"kept"}, at
        data[at] ^= 0xFF
        for newer in segments(folder)[1:]:
            newer.unlink()


def test_a_flip_in_the_middle_is_seen_and_costs_no_other_update(folder):
    """Of a head: the update is not there. Of a body: it is refused. Never another gradient."""
    write(folder, (RUN, 1, b"one"), (RUN, 2, b"two"), (OTHER, 1, b"other"))
    (path,) = segments(folder)
    middle = Segment.read(path, with_bodies=True).updates[1]
    data = bytearray(path.read_bytes())
    for at in range(middle.offset, middle.end):
        data[at] ^= 0x01
        path.write_bytes(data)
        segment = Segment.read(path, with_bodies=True)
        assert [damage.is_tail for damage in segment.damages] == [False] * len(segment.damages)
        assert segment.damages or segment.bad_bodies == {middle.offset}
        assert found(folder) == {(RUN, 1): b"one", (OTHER, 1): b"other"}, at
        data[at] ^= 0x01
        for newer in segments(folder)[1:]:
            newer.unlink()


def test_a_damaged_gradient_is_refused_by_name(folder):
    write(folder, (RUN, 1, b"one"), (OTHER, 1, b"other"))
    (path,) = segments(folder)
    first = Segment.read(path, with_bodies=True).updates[0]
    data = bytearray(path.read_bytes())
    data[first.body_offset] ^= 1
    path.write_bytes(data)
    log = UpdateLog(folder, BASE, lambda call: call())
    with pytest.raises(StoreFailed, match=r"gradient of request 1 of s:train:0 is damaged"):
        gradient(log.find(RUN, 1, must_be=True))
    assert log.find(RUN, 1, must_be=False) is None, "it may never have been acknowledged"
    assert gradient(log.find(OTHER, 1, must_be=False)) == b"other"
    log.close()


def test_a_full_disk_fails_one_update_and_leaves_the_file_whole(folder, monkeypatch):
    writer, write_now, is_full = Writer(folder), os.write, True

    def half_written(file, part):
        if not is_full:
            return write_now(file, part)
        if len(part) > 1:
            return write_now(file, part[: len(part) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    assert writer.append(RUN, 1, b"one") is None
    monkeypatch.setattr(update_log.os, "write", half_written)
    assert "No space left" in writer.append(RUN, 2, b"two").message
    is_full = False
    assert writer.append(OTHER, 1, b"other") is None
    writer.log.close()
    assert found(folder) == {(RUN, 1): b"one", (OTHER, 1): b"other"}


def test_after_a_failed_sync_nothing_is_acknowledged_and_nothing_of_it_stays(folder, monkeypatch):
    writer = Writer(folder)
    assert writer.append(RUN, 1, b"one") is None

    def fails(file):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(update_log.os, "fdatasync", fails)
        assert "could not be synced" in writer.append(RUN, 2, b"two").message
    assert "could not be synced" in writer.append(RUN, 3, b"three").message
    writer.log.close()
    assert found(folder) == {(RUN, 1): b"one"}


def test_updates_that_come_while_it_syncs_share_the_next_sync(folder, monkeypatch):
    writer, num_syncs, may_go_on = Writer(folder), 0, queue.SimpleQueue()
    sync_now = os.fdatasync

    def counted(file):
        nonlocal num_syncs
        num_syncs += 1
        may_go_on.get(timeout=10)
        sync_now(file)

    monkeypatch.setattr(update_log.os, "fdatasync", counted)
    writer.start(RUN, 1, b"one")
    while not num_syncs:
        pass
    for seq in range(2, 8):
        writer.start(RUN, seq, b"more")
    may_go_on.put(None)
    may_go_on.put(None)
    assert [writer.said.get(timeout=10) for _ in range(7)] == [None] * 7
    assert num_syncs == 2
    writer.log.close()


class Synced:
    """How much of each file was on disk at its last sync."""

    def __init__(self, monkeypatch):
        self.sizes, sync_now = {}, os.fdatasync

        def noted(file):
            sync_now(file)
            self.sizes[str(Path(f"/proc/self/fd/{file}").readlink())] = os.fstat(file).st_size

        monkeypatch.setattr(update_log.os, "fdatasync", noted)

    def check(self, folder):
        """Every byte of every file was synced."""
        found = {str(path): path.stat().st_size for path in segments(folder)}
        assert found == {path: self.sizes[path] for path in found}


def test_a_group_that_goes_over_into_a_new_file_is_synced_in_both(folder, monkeypatch):
    monkeypatch.setattr(update_log, "SEGMENT_BYTES", 2000)
    writer, synced = Writer(folder), Synced(monkeypatch)
    for seq in range(1, 30):
        writer.start(RUN, seq, bytes(300))
    assert [writer.said.get(timeout=10) for _ in range(29)] == [None] * 29
    assert len(segments(folder)) > 3
    synced.check(folder)
    writer.log.close()


def test_what_a_killed_worker_left_to_the_system_is_synced_before_it_is_used(folder, monkeypatch):
    writer = Writer(folder, sync_every=1000)
    assert writer.append(RUN, 1, b"one") is None
    writer.log.close()
    synced = Synced(monkeypatch)
    log = UpdateLog(folder, BASE, lambda call: call())
    synced.check(folder)
    log.close()


def test_a_new_file_that_can_not_be_begun_fails_one_update(folder, monkeypatch):
    monkeypatch.setattr(update_log, "SEGMENT_BYTES", 300)
    writer = Writer(folder)
    assert writer.append(RUN, 1, bytes(300)) is None

    def no_more_files(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(update_log, "sync_folder", no_more_files)
        assert "No space left" in writer.append(RUN, 2, b"two").message
    assert len(segments(folder)) == 1
    assert writer.append(RUN, 3, b"three") is None
    writer.log.close()
    assert found(folder) == {(RUN, 1): bytes(300), (RUN, 3): b"three"}


def test_an_error_that_nobody_expected_is_told_to_who_waits(folder, monkeypatch):
    writer = Writer(folder)

    def broken(*arguments):
        raise ValueError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(update_log, "_append_frame", broken)
        assert "a bug" in writer.append(RUN, 1, b"one").message
    assert not writer.log.is_sound
    assert "a bug" in writer.append(RUN, 2, b"two").message
    writer.log.close()


def test_files_go_once_nothing_in_them_is_needed(folder, monkeypatch):
    monkeypatch.setattr(update_log, "SEGMENT_BYTES", 500)
    writer = Writer(folder)
    for seq in range(1, 9):
        assert writer.append(RUN, seq, bytes(200)) is None
    assert writer.append(OTHER, 1, b"other") is None
    before = writer.log.num_bytes
    assert len(segments(folder)) > 3
    writer.log.forget(RUN, 6)
    assert writer.append(OTHER, 2, b"other") is None
    writer.log.close()
    assert writer.log.num_bytes < before
    assert writer.log.num_bytes == sum(path.stat().st_size for path in segments(folder))
    assert {(RUN, 7), (RUN, 8), (OTHER, 1), (OTHER, 2)} <= set(found(folder))


def test_two_workers_never_write_one_log(folder, monkeypatch):
    writer = Writer(folder)
    monkeypatch.setattr(update_log, "LOCK_SECONDS", 0.1)
    with pytest.raises(StoreFailed, match="another worker has held"):
        UpdateLog(folder, BASE, lambda call: call())
    writer.log.close()
    write(folder, (RUN, 1, b"one"))


def test_the_log_of_another_base_is_refused(folder):
    write(folder, (RUN, 1, b"one"))
    with pytest.raises(StoreFailed, match="belongs to base"):
        UpdateLog(folder, Digest("sha256:" + "1" * 64), lambda call: call())


def test_a_folder_that_is_no_folder_is_refused(folder):
    folder.write_text("a file")
    with pytest.raises(StoreFailed, match="can't be used"):
        UpdateLog(folder, BASE, lambda call: call())


def test_a_second_copy_of_a_folder_reads_the_same(folder, tmp_path):
    write(folder, (RUN, 1, b"one"))
    shutil.copytree(folder, tmp_path / "copy")
    assert found(tmp_path / "copy") == {(RUN, 1): b"one"}
