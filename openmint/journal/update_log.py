"""The log of updates: the gradient of each `optim_step`, durable before the step is acknowledged.

A worker writes it, one file after the other in the folder of its base; the next worker finds what
it holds. An update is made again from its gradient alone, to the bit and without a forward pass.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmint.errors import StoreFailed
from openmint.journal.frames import Damage, Frame, frame_start, is_whole, read_body, read_frames
from openmint.store.folders import sync_folder
from openmint.types import Digest, RunId

log = logging.getLogger(__name__)

FORMAT = "openmint-journal/1"
SUFFIX = ".redo"
SEGMENT_BYTES = 64 << 20
"""A file is closed once it is as long; whole files are deleted, never parts."""
LOCK_SECONDS, LOCK_RETRY_SECONDS = 60.0, 0.05

Then = Callable[[Exception | None], None]
Post = Callable[[Callable[[], None]], None]
"""Has something called on the thread that owns the log."""


def folder_of(data: Path, base: Digest) -> Path:
    """Where a base's log lies in the data folder."""
    return data / "journal" / base.removeprefix("sha256:")[:16]


@dataclass(frozen=True, slots=True)
class Logged:
    """An update in the log."""

    path: Path
    frame: Frame
    is_whole: bool
    """False when its gradient was found to be damaged."""

    @property
    def head(self) -> Mapping[str, Any]:
        return self.frame.head

    def read_into(self, memory: memoryview) -> None:
        """Read its gradient. Raises StoreFailed when it isn't what was logged, or of another
        size."""
        if memory.nbytes != self.frame.body_bytes:
            raise StoreFailed(
                f"a logged gradient has {self.frame.body_bytes} bytes, this run's {memory.nbytes}"
            )
        if not (self.is_whole and read_body(self.path, self.frame, memory.cast("B"))):
            raise StoreFailed(
                f"the logged gradient of request {self.head['seq']} of {self.head['run']} is "
                f"damaged ({self.path}, byte {self.frame.offset})"
            )


@dataclass(frozen=True, slots=True)
class Append:
    run_id: RunId
    seq: int
    head: dict[str, Any]
    body: memoryview
    then: Then


@dataclass(frozen=True, slots=True)
class Forget:
    run_id: RunId
    through_seq: int


class UpdateLog:
    """One worker's log. Its methods are for one thread; a thread of its own writes and syncs.

    What comes while it syncs is synced together by the next one. A write that fails, fails that
    update alone. After a sync that failed nobody knows what the disk holds: what was not
    acknowledged is cut off, and every later update is refused until the worker is started again.
    """

    _path: Path
    """The file that is written."""
    _number: int
    _file: int
    _synced_bytes: int

    def __init__(self, folder: Path, base: Digest, post: Post, sync_every: int = 1) -> None:
        """Read what is there, then begin a file of a new epoch.

        `sync_every` n has every n-th update wait for the disk, the others for the system alone; 0
        has none logged at all.

        Raises StoreFailed when the folder can't be written, or another worker has it.
        """
        self._folder, self._base, self._post, self._sync_every = folder, base, post, sync_every
        self._guard = threading.Lock()
        self._updates: dict[RunId, dict[int, Logged]] = defaultdict(dict)
        self._sizes: dict[Path, int] = {}
        self._failure: StoreFailed | None = None
        self._num_unsynced = 0
        self._queue: queue.SimpleQueue[Append | Forget | None] = queue.SimpleQueue()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder)
            self._epoch = self._read_all() + 1
            self._begin_segment(0)
        except OSError as error:
            raise StoreFailed(f"the journal in {folder} can't be used: {error}") from error
        self._thread = threading.Thread(target=self._write_forever, name="journal", daemon=True)
        self._thread.start()

    # -- what it holds ----------------------------------------------------------------------------

    def whole(self) -> dict[RunId, tuple[int, ...]]:
        """For each run the requests whose gradient is here, as far as is known without reading."""
        with self._guard:
            return {
                run_id: tuple(seq for seq, logged in updates.items() if logged.is_whole)
                for run_id, updates in self._updates.items()
            }

    @property
    def epoch(self) -> int:
        """How many workers have had this log, this one included."""
        return self._epoch

    @property
    def is_sound(self) -> bool:
        """Whether updates can be acknowledged."""
        return self._failure is None

    @property
    def num_bytes(self) -> int:
        with self._guard:
            return sum(self._sizes.values())

    def find(self, run_id: RunId, seq: int, *, must_be: bool) -> Logged | None:
        """The update that this request made, if it was logged.

        Raises StoreFailed for one that `must_be` here and isn't, where every update waits for the
        disk. Otherwise a power cut may have taken it.
        """
        with self._guard:
            logged = self._updates.get(run_id, {}).get(seq)
        if logged is None and must_be and self._sync_every == 1:
            raise StoreFailed(f"the log lacks the update that request {seq} of {run_id} made")
        return logged if logged and (logged.is_whole or must_be) else None

    # -- writing ----------------------------------------------------------------------------------

    def append(
        self, run_id: RunId, seq: int, head: Mapping[str, Any], gradient: memoryview, then: Then
    ) -> None:
        """Have `then` called with None once the update is durable, else with what went wrong.

        The gradient must stay as it is until then.
        """
        if not self._sync_every:
            then(None)
            return
        full = {"run": run_id, "seq": seq, "epoch": self._epoch, **head}
        self._queue.put(Append(run_id, seq, full, gradient.cast("B"), then))

    def forget(self, run_id: RunId, through_seq: int) -> None:
        """The run's updates up to that request are not needed any more."""
        self._queue.put(Forget(run_id, through_seq))

    def close(self) -> None:
        """Write what was handed over, then let another have the folder."""
        self._queue.put(None)
        self._thread.join()
        os.close(self._file)
        os.close(self._lock)

    def _write_forever(self) -> None:
        while True:
            items = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    items.append(self._queue.get_nowait())
            appends = [item for item in items if isinstance(item, Append)]
            try:
                self._commit(appends)
                for item in items:
                    if isinstance(item, Forget):
                        self._drop(item)
            except Exception as error:  # a thread's edge: those that wait must hear
                self._fail(error)
                for each in appends:
                    self._call(each.then, self._failure)
            if None in items:
                return

    def _commit(self, appends: list[Append]) -> None:
        """Write them one after the other and sync once."""
        written: list[tuple[Append, Logged]] = []
        for item in appends:
            try:
                written.append((item, self._write(item)))
            except OSError as error:
                failed = StoreFailed(
                    f"the update could not be logged: {error}; nothing was applied"
                )
                self._call(item.then, failed)
            except StoreFailed as error:
                self._call(item.then, error)
        if self._num_unsynced >= self._sync_every:
            self._sync()
        for item, logged in written:
            if self._failure is None:
                with self._guard:
                    self._updates[item.run_id][item.seq] = logged
            self._call(item.then, self._failure)

    def _write(self, item: Append) -> Logged:
        if self._failure is not None:
            raise self._failure
        if self._sizes[self._path] >= SEGMENT_BYTES:
            self._sync()
            self._begin_segment(self._number + 1)
        frame = _append_frame(self._file, self._sizes[self._path], item.head, item.body)
        self._num_unsynced += 1
        with self._guard:
            self._sizes[self._path] = frame.end
        return Logged(self._path, frame, is_whole=True)

    def _sync(self) -> None:
        if not self._num_unsynced or self._failure is not None:
            return
        try:
            os.fdatasync(self._file)
        except OSError as error:
            self._fail(error)
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._synced_bytes)
            return
        self._num_unsynced = 0
        self._synced_bytes = self._sizes[self._path]

    def _fail(self, error: Exception) -> None:
        self._failure = StoreFailed(
            f"the journal in {self._folder} could not be synced: {error}. No update is "
            "acknowledged until the disk is mended and the service started again"
        )
        log.error("the journal in %s failed", self._folder, exc_info=error)

    def _call(self, then: Then, error: Exception | None) -> None:
        self._post(lambda: then(error))

    def _drop(self, item: Forget) -> None:
        with self._guard:
            updates = self._updates.get(item.run_id, {})
            for seq in [seq for seq in updates if seq <= item.through_seq]:
                del updates[seq]
            if not updates:
                self._updates.pop(item.run_id, None)
            used = {logged.path for of_run in self._updates.values() for logged in of_run.values()}
            unused = [path for path in self._sizes if path not in used and path != self._path]
            for path in unused:
                del self._sizes[path]
        for path in unused:
            path.unlink(missing_ok=True)

    # -- files ------------------------------------------------------------------------------------

    def _begin_segment(self, number: int) -> None:
        """Go on in a new file. Raises OSError, and goes on in the old one."""
        path = self._folder / f"{self._epoch:08}-{number:06}{SUFFIX}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            head = {"format": FORMAT, "base": self._base, "epoch": self._epoch}
            frame = _append_frame(file, 0, head, memoryview(b""))
            os.fdatasync(file)
            sync_folder(self._folder)
        except OSError:
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        if number:
            os.close(self._file)
        self._path, self._file, self._number = path, file, number
        with self._guard:
            self._sizes[path] = self._synced_bytes = frame.end

    def _read_all(self) -> int:
        """Take in the files of earlier workers; the highest epoch among them."""
        paths = segments(self._folder)
        for path in paths[-1:]:
            # A worker that was killed may have left there what only the system holds; what is made
            # again from it will be acknowledged.
            _sync_file(path)
        for path in paths:
            frames = Segment.read(path, with_bodies=path == paths[-1])
            if frames.base not in (None, self._base):
                raise StoreFailed(f"{path} belongs to base {frames.base}, not {self._base}")
            for damage in frames.damages:
                level, what = (
                    (logging.WARNING, "a torn end")
                    if damage.is_tail
                    else (logging.ERROR, "damage in the middle")
                )
                log.log(level, "%s of %s at byte %d", what, path, damage.offset)
            for frame in frames.updates:
                whole = frame.offset not in frames.bad_bodies
                logged = Logged(path, frame, whole)
                self._updates[RunId(frame.head["run"])][int(frame.head["seq"])] = logged
            self._sizes[path] = path.stat().st_size
        return max((int(path.name.split("-")[0]) for path in paths), default=0)


@dataclass(frozen=True, slots=True)
class Segment:
    """What one file of a log holds."""

    path: Path
    base: str | None
    """None when the file ends before it says so."""
    updates: tuple[Frame, ...]
    damages: tuple[Damage, ...]
    bad_bodies: frozenset[int]
    """Offsets of updates whose gradient isn't what was written."""

    @staticmethod
    def read(path: Path, *, with_bodies: bool) -> Segment:
        """Heads, and `with_bodies` also whether each gradient is whole. Damaged gradients at the
        very end are a cut-off tail like any other: they are damage, not updates."""
        parts = list(read_frames(path))
        frames = [part for part in parts if isinstance(part, Frame)]
        damages = [part for part in parts if isinstance(part, Damage)]
        base = next((frame.head["base"] for frame in frames if "format" in frame.head), None)
        updates = [frame for frame in frames if "run" in frame.head]
        bad = {f.offset for f in updates if with_bodies and not is_whole(path, f)}
        while updates and updates[-1].offset in bad:
            last = updates.pop()
            bad.discard(last.offset)
            damages.append(Damage(last.offset, last.end - last.offset, is_tail=True))
        return Segment(path, base, tuple(updates), tuple(damages), frozenset(bad))


def segments(folder: Path) -> list[Path]:
    """The files of a log, oldest first."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def _append_frame(file: int, offset: int, head: dict[str, Any], body: memoryview) -> Frame:
    """Write a frame at the end of the file, or leave the file as it was."""
    start = frame_start(head, body)
    try:
        for part in (memoryview(start), body):
            while part.nbytes:
                part = part[os.write(file, part) :]
    except OSError:
        os.ftruncate(file, offset)
        raise
    return Frame(head, offset, offset + len(start), body.nbytes, start[16:32])


def _sync_file(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(file)
    finally:
        os.close(file)


def _locked(folder: Path) -> int:
    """A lock on the folder that ends with this process. Waits for a worker that is ending."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise StoreFailed(
                    f"another worker has held {folder} for {LOCK_SECONDS:g} s; end it first"
                ) from None
        time.sleep(LOCK_RETRY_SECONDS)


class NoLog:
    """The log of an engine whose work nobody would miss: of a worker that only draws samples, or in
    a benchmark."""

    epoch = 0
    num_bytes = 0
    is_sound = True

    def whole(self) -> dict[RunId, tuple[int, ...]]:
        return {}

    def find(self, run_id: RunId, seq: int, *, must_be: bool) -> Logged | None:
        return None

    def append(
        self, run_id: RunId, seq: int, head: Mapping[str, Any], gradient: memoryview, then: Then
    ) -> None:
        then(None)

    def forget(self, run_id: RunId, through_seq: int) -> None:
        pass
