"""Small blobs, many to a file: packs that only grow, each written by one process alone.

A process appends to its own pack, on which it holds a lock from start to end, and seals it when it
is full. It reads everybody's. What others wrote, sealed or deleted is looked for at the begin of
every operation, which costs a `stat` of the folder and one of each pack that still grows.

A death names one copy (`pack_frames`), never a digest alone, and all good copies of a digest are
equal, so nothing here depends on the order of what several processes write.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

from openmint.errors import StoreFailed
from openmint.store.folders import sync_folder, write_whole
from openmint.store.pack_frames import (
    BLOB,
    DEATH,
    HEADER,
    Damage,
    Frame,
    encode_frame,
    is_still_there,
    is_whole,
    read_frames,
)
from openmint.store.pack_index import DIGEST_BYTES, Copy, Growing, Index, Sealed

log = logging.getLogger(__name__)

PACK_BYTES = 256 << 20
MAX_FRAMES = 1 << 16
"""A pack is sealed once it is as long, or holds as many: its index is a dictionary until then."""
MAX_OPEN = 64
BIRTH_BYTES = NAME_BYTES = 8
NAME = re.compile(r"[0-9a-f]{16}")
"""No name is ever given twice, so what was read of a pack can't come to mean another."""
SETTLED_NS = 50_000_000
"""A folder that changed this long ago shows its next change in its time of change; clocks of file
systems move every 10 ms or so."""


class OpenFile:
    """A file that is closed once nobody refers to it, so that who reads it needs no lock."""

    def __init__(self, path: Path, flags: int) -> None:
        self.number = -1
        self.number = os.open(path, flags, 0o600)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)

    def size(self) -> int:
        return os.fstat(self.number).st_size


class OpenPacks:
    """The packs that were read last, at most `MAX_OPEN`. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._guard = threading.Lock()
        self._files: OrderedDict[str, OpenFile] = OrderedDict()

    def get(self, name: str) -> OpenFile:
        """Raises FileNotFoundError for a pack that is gone, unless it is still open here."""
        with self._guard:
            if name not in self._files:
                self._files[name] = OpenFile(self._folder / f"{name}.pack", os.O_RDONLY)
            self._files.move_to_end(name)
            if len(self._files) > MAX_OPEN:
                self._files.popitem(last=False)
            return self._files[name]

    def forget(self, names: Iterable[str]) -> None:
        with self._guard:
            for name in names:
                self._files.pop(name, None)


class OwnPack:
    """The pack that this process appends to. Appending is for one thread at a time, syncing for
    any: threads that wait for the disk at once share one sync."""

    def __init__(self, file: OpenFile, contents: Growing) -> None:
        """All that is in `file` must have been synced."""
        self._file, self.contents = file, contents
        self.num_bytes = self.synced_bytes = file.size()
        self.failure: OSError | None = None
        """Of a sync: what isn't synced yet never will be."""
        self._syncing = threading.Lock()

    @property
    def name(self) -> str:
        return self.contents.name

    def has_room(self, num_bytes: int) -> bool:
        has_frames = self.contents.num_frames < MAX_FRAMES
        return has_frames and self.num_bytes + num_bytes <= PACK_BYTES

    def append(self, data: bytes) -> int:
        """Write a frame; returns its offset. Raises OSError, and half of it may be written."""
        offset, rest = self.num_bytes, memoryview(data)
        while rest:
            rest = rest[os.write(self._file.number, rest) :]
        self.num_bytes += len(data)
        return offset

    def sync(self, end: int) -> None:
        """Returns once all bytes up to `end` are durable. Raises OSError, for good: after a sync
        that failed nobody knows what the disk holds."""
        with self._syncing:
            if self.synced_bytes >= end:
                return
            if self.failure is not None:
                raise OSError(*self.failure.args)
            reached = self.num_bytes
            try:
                os.fdatasync(self._file.number)
            except OSError as error:
                self.failure = error
                raise
            self.synced_bytes = reached

    def give_up(self) -> None:
        """Cut off what can't be relied on, and let anyone take the pack over."""
        end = self.synced_bytes if self.failure is not None else self.num_bytes
        with contextlib.suppress(OSError):  # who takes it over cuts off what is no frame
            os.ftruncate(self._file.number, end)
        fcntl.flock(self._file.number, fcntl.LOCK_UN)


Place = tuple[OwnPack, int]
"""A pack and a byte of it: through there it has to be synced."""


class Packs:
    """All packs of a folder, as this process sees and writes them. Thread-safe.

    Digests are the 32 bytes themselves. Methods raise OSError when the disk refuses.
    """

    def __init__(self, folder: Path, incoming: Path) -> None:
        """`incoming` is where index files are written before they get their names."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._incoming = folder, incoming
        self._files = OpenPacks(folder)
        self._writing = threading.Lock()
        """Held while the own pack is appended to, sealed or changed for another."""
        self._guard = threading.Lock()
        """Held while the index is; taken inside `_writing`, never around it."""
        self._index = Index()
        self._states: dict[str, tuple[int, int]] = {}
        """Size and time of change of each growing pack of others when it was last read."""
        self._listed_ns: int | None = None
        self._own: OwnPack | None = None
        self._lost: OSError | None = None
        """Why deletions since the last `sync` may be undone."""

    # -- reading ----------------------------------------------------------------------------------

    def find(self, digest: bytes) -> list[Copy]:
        """The copies of a blob; none when nobody put it, or somebody deleted it."""
        with self._guard:
            self._look()
            return self._index.find(digest)

    def get(self, digest: bytes) -> bytes | None:
        """The blob, checked against its digest; None when there is none.

        Raises StoreFailed when no copy of it is sound."""
        tried: list[Copy] = []
        while (copies := self.find(digest)) and copies != tried:
            for copy in copies:
                data = self._read(copy)
                if data is not None and hashlib.sha256(data).digest() == digest:
                    return data
            tried = copies  # unless somebody moved them meanwhile, they are damaged
        if copies:
            places = ", ".join(f"{copy.pack}.pack at byte {copy.offset}" for copy in copies)
            raise StoreFailed(f"the store's bytes for sha256:{digest.hex()} are damaged: {places}")
        return None

    def num_damaged_bytes(self) -> int:
        """Bytes of all packs that are in no frame, so that nobody can say whose they were."""
        with self._guard:
            of_sealed = sum(pack.num_damaged_bytes for pack in self._index.sealed.values())
            return of_sealed + sum(p.num_damaged_bytes for p in self._index.growing.values())

    def _read(self, copy: Copy) -> bytes | None:
        """What lies there; None when the pack is gone."""
        try:
            file = self._files.get(copy.pack)
        except FileNotFoundError:
            return None
        return os.pread(file.number, copy.num_bytes, copy.offset + HEADER.size)

    # -- writing ----------------------------------------------------------------------------------

    def put_all(self, blobs: Iterable[tuple[bytes, bytes]]) -> None:
        """Have each digest's bytes in a pack, durable on return, with one sync for all that one
        pack has room for. Safe to repeat; writes nothing for what is there, heals what is damaged.
        """
        self._sync_all(self._put(digest, data) for digest, data in blobs)

    def delete(self, digest: bytes) -> None:
        """Nobody finds the blob any more; fine when it is gone already. A power cut, or a sync that
        fails, may undo it until `sync` has returned."""
        with self._writing:
            for key in {copy.key for copy in self.find(digest)}:
                self._append(DEATH, key)

    def sync(self) -> None:
        """Have earlier deletions by this process last. Raises OSError when one of them may have
        been undone; then they must be repeated."""
        own = self._own
        if own is not None:
            self._sync(own, own.num_bytes)
        with self._guard:
            lost, self._lost = self._lost, None
        if lost is not None:
            raise OSError(*lost.args)

    def _put(self, digest: bytes, data: bytes) -> Place | None:
        """Where the bytes end, in a pack that is still to be synced; None when they are durable."""
        with self._writing:
            damaged = []
            for copy in self.find(digest):
                own = self._own if self._own is not None and copy.pack == self._own.name else None
                if own is None and copy.pack not in self._index.sealed:
                    continue  # another process may not have synced it, and may take it back
                found = self._read(copy)
                if found == data:
                    return None if own is None else (own, copy.end)
                if found is not None:
                    damaged.append(copy)
            place = self._append(BLOB, digest + secrets.token_bytes(BIRTH_BYTES), data)
            if damaged:
                self._sync_own(*place)
            for copy in damaged:
                place = self._append(DEATH, copy.key)
            return place

    def _append(self, magic: bytes, key: bytes, payload: bytes = b"") -> Place:
        """Write a frame to the own pack; where it ends. For who holds `_writing`."""
        digest, birth = key[:DIGEST_BYTES], key[DIGEST_BYTES:]
        data = encode_frame(magic, digest, birth, payload)
        pack = self._own
        if pack is not None and not pack.has_room(len(data)):
            self._seal(pack)
            pack = None
        pack = pack or self._take(len(data))
        try:
            offset = pack.append(data)
        except BaseException:
            self._give_up(pack)
            raise
        with self._guard:
            pack.contents.add(Frame(magic == DEATH, birth, digest, offset, len(payload)))
            if magic == DEATH:
                self._index.kill([key])
        return pack, pack.num_bytes

    def _sync_all(self, places: Iterable[Place | None]) -> None:
        """Sync what is written while this is iterated over: each pack once, as far as is needed."""
        last: OwnPack | None = None
        end = 0
        for place in places:
            if place is None:
                continue
            if last is not None and last is not place[0]:
                self._sync(last, end)
            end = max(end, place[1]) if last is place[0] else place[1]
            last = place[0]
        if last is not None:
            self._sync(last, end)

    def _sync(self, pack: OwnPack, end: int) -> None:
        try:
            pack.sync(end)
        except OSError:
            with self._writing:
                self._give_up(pack)
            raise

    def _sync_own(self, pack: OwnPack, end: int) -> None:
        """The same for who holds `_writing`."""
        try:
            pack.sync(end)
        except OSError:
            self._give_up(pack)
            raise

    def _give_up(self, pack: OwnPack) -> None:
        """Cut off what a failed write or sync left, and let anyone take the pack over."""
        if self._own is pack:
            with contextlib.suppress(OSError):  # deaths in it wait for no sync of their own
                pack.sync(pack.num_bytes)
            with self._guard:
                self._own, self._listed_ns = None, None
                self._index.growing.pop(pack.name)
                if pack.failure is not None:
                    self._lost = pack.failure
                    self._begin_anew()
            pack.give_up()

    # -- the own pack -----------------------------------------------------------------------------

    def _take(self, num_bytes: int) -> OwnPack:
        """A pack with so much room: one that nobody has, else a new one."""
        with self._guard:
            self._look()
            names = list(self._index.growing)
        for name in names:
            file = self._locked(name)
            if file is not None:
                pack = self._take_over(name, file)
                if pack.has_room(num_bytes):
                    return pack
                self._seal(pack)
        return self._create()

    def _create(self) -> OwnPack:
        while True:
            name = secrets.token_hex(NAME_BYTES)
            OpenFile(self._folder / f"{name}.pack", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            file = self._locked(name)
            if file is not None:  # else somebody was quick to take it over
                return self._take_over(name, file)

    def _take_over(self, name: str, file: OpenFile) -> OwnPack:
        """Go on where another process ended, or nobody has begun. A torn end is cut off; what is
        damaged further up stays, and is said."""
        size = file.size()
        parts = list(read_frames(file.number, 0, size))
        while parts and not (isinstance(parts[-1], Frame) and is_whole(file.number, parts[-1])):
            parts.pop()
        contents = Growing(name)
        _add_all(contents, parts)
        if contents.end < size:
            log.warning("the end of pack %s is torn, %d bytes", name, size - contents.end)
            os.ftruncate(file.number, contents.end)
        # Who had it before may have been killed before it synced.
        os.fdatasync(file.number)
        sync_folder(self._folder)
        sync_folder(self._folder.parent)
        return self._own_now(OwnPack(file, contents))

    def _own_now(self, pack: OwnPack) -> OwnPack:
        with self._guard:
            self._own = pack
            self._states.pop(pack.name, None)
            self._index.growing[pack.name] = pack.contents
            self._index.kill(pack.contents.deaths)
        return pack

    def _locked(self, name: str) -> OpenFile | None:
        """The pack, opened for appending and locked; None when another process has it, sealed it
        or rewrote it."""
        path = self._folder / f"{name}.pack"
        try:
            file = OpenFile(path, os.O_RDWR | os.O_APPEND)
            is_ours = _lock(file) and path.stat().st_ino == os.fstat(file.number).st_ino
        except FileNotFoundError:
            return None
        return file if is_ours and not path.with_suffix(".idx").exists() else None

    def _seal(self, pack: OwnPack) -> None:
        """Give the full pack its index file. Raises OSError, and the pack stays the own one."""
        self._sync_own(pack, pack.num_bytes)
        sealed = Sealed.of(pack.contents, pack.num_bytes)
        self._write_index(sealed)
        with self._guard:
            self._own = None
            self._index.seal([sealed])

    def _write_index(self, pack: Sealed) -> None:
        write_whole(self._folder / f"{pack.name}.idx", pack.encode(), self._incoming)
        sync_folder(self._folder)

    # -- what others did --------------------------------------------------------------------------

    def _look(self) -> None:
        """Bring the index up to date. Packs that are gone are dropped last: what was moved out of
        them is found by then, since it was moved before they went."""
        changed_ns, looked_ns = self._folder.stat().st_mtime_ns, time.time_ns()
        gone: set[str] = set()
        if changed_ns != self._listed_ns:
            gone = self._list()
            if gone:  # where they were moved to may be as new as that, and missed by this listing
                self._list()
        for name, pack in list(self._index.growing.items()):
            is_own = self._own is not None and name == self._own.name
            if not (is_own or name in gone or self._read_on(name, pack)):
                self._begin_anew()
                self._look()
                return
        if gone:
            self._index.drop(gone)
            self._files.forget(gone)
            for name in gone:
                self._states.pop(name, None)
        self._listed_ns = changed_ns if looked_ns - changed_ns > SETTLED_NS else None

    def _list(self) -> set[str]:
        """Take in new and newly sealed packs; the names of those that are gone."""
        entries = set(os.listdir(self._folder))  # noqa: PTH208 - names are wanted, not paths
        names = {entry[:-5] for entry in entries if entry.endswith(".pack")}
        names = {name for name in names if NAME.fullmatch(name)}
        own = self._own.name if self._own is not None else None
        known = self._index.sealed.keys()
        new = [name for name in names - known if name != own and f"{name}.idx" in entries]
        if sealed := [pack for name in new if (pack := self._load(name)) is not None]:
            self._index.seal(sealed)
        for name in names - self._index.sealed.keys() - self._index.growing.keys():
            self._index.growing[name] = Growing(name)
        return (self._index.sealed.keys() | self._index.growing.keys()) - names

    def _load(self, name: str) -> Sealed | None:
        """A sealed pack's index; made again from its frames when the file is damaged. None when the
        pack is gone."""
        try:
            return Sealed.decode(name, (self._folder / f"{name}.idx").read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.error("the index of pack %s is damaged (%s); it is made again", name, error)
        try:
            file = self._files.get(name)
        except FileNotFoundError:
            return None
        contents = Growing(name)
        _add_all(contents, read_frames(file.number, 0, file.size()))
        sealed = Sealed.of(contents, file.size())
        with contextlib.suppress(OSError):  # it can be read all the same, and made once more
            self._write_index(sealed)
        return sealed

    def _read_on(self, name: str, pack: Growing) -> bool:
        """Take in what another process appended to its pack since it was last read; False when it
        took back what had been read, as a sync failed."""
        try:
            now = (self._folder / f"{name}.pack").stat()
            state = (now.st_size, now.st_mtime_ns)
            if state == self._states.get(name):
                return True
            file = self._files.get(name)
        except FileNotFoundError:
            return True  # the next listing will say so
        if pack.last is not None and not is_still_there(file.number, pack.last):
            return False
        num_known = len(pack.deaths)
        in_doubt = pack.num_damaged_bytes > 0
        _add_all(pack, read_frames(file.number, pack.end, now.st_size, in_doubt=in_doubt))
        self._index.kill(pack.deaths[num_known:])
        self._states[name] = state
        return True

    def _begin_anew(self) -> None:
        """Forget what is known of other packs; the next look reads it."""
        self._index, self._listed_ns = Index(), None
        self._states.clear()
        if self._own is not None:
            self._index.growing[self._own.name] = self._own.contents
            self._index.kill(self._own.contents.deaths)

    # -- compaction -------------------------------------------------------------------------------

    def compact(self) -> None:
        """Give back the room of what was deleted.

        Sealed packs of which less than half is live are written anew, the emptiest first: what is
        live goes to the own pack, then they go. A crash between leaves some of it twice. Returns
        at once while another process is at it. Safe to repeat.
        """
        lock = OpenFile(self._folder / "compact.lock", os.O_RDWR | os.O_CREAT)
        if not _lock(lock):
            return
        try:
            self._remove_orphans()
            for name in self._wasteful():
                if self._move_out(name):
                    self._remove(name)
        finally:
            fcntl.flock(lock.number, fcntl.LOCK_UN)

    def _wasteful(self) -> list[str]:
        with self._guard:
            self._look()
            found = []
            for name, pack in self._index.sealed.items():
                dead_bytes = self._index.dead_bytes[name]
                if 2 * (dead_bytes + len(pack.deaths) * HEADER.size) <= pack.pack_bytes:
                    continue
                num_idle = len(pack.deaths) - len(self._index.needed_deaths(name))
                live_bytes = pack.pack_bytes - dead_bytes - num_idle * HEADER.size
                if 2 * live_bytes < pack.pack_bytes:
                    found.append((live_bytes, name))
        return [name for _, name in sorted(found)]

    def _move_out(self, name: str) -> bool:
        """Copy what is live in a sealed pack to the own one, durably; False when it must stay, as
        some of it is damaged."""
        with self._guard:
            self._look()
            pack = self._index.sealed.get(name)
            if pack is None:
                return False  # somebody else's hand took it
            copies, deaths = self._index.live_copies(name), self._index.needed_deaths(name)
        try:
            if pack.num_damaged_bytes:
                raise StoreFailed("some of its bytes are in no frame")
            self._sync_all(self._moved(copies, deaths))
        except StoreFailed as error:
            log.error("pack %s stays as it is: %s", name, error)
            return False
        return True

    def _moved(self, copies: list[Copy], deaths: list[bytes]) -> Iterator[Place]:
        """Write all that to the own pack while this is iterated over. Raises StoreFailed at the
        first copy that is damaged."""
        for copy in copies:
            if self._is_elsewhere(copy):
                continue
            data = self._read(copy)
            if data is None or hashlib.sha256(data).digest() != copy.digest:
                raise StoreFailed(f"its bytes for sha256:{copy.digest.hex()} are damaged")
            with self._writing:
                place = self._append(BLOB, copy.key, data)
            yield place
        for key in deaths:
            with self._writing:
                place = self._append(DEATH, key)
            yield place

    def _is_elsewhere(self, copy: Copy) -> bool:
        """Whether another pack has the blob too, durable and sound: a compaction was killed."""
        for other in self.find(copy.digest):
            own = self._own
            is_synced = own is not None and other.pack == own.name and other.end <= own.synced_bytes
            if other.pack != copy.pack and (is_synced or other.pack in self._index.sealed):
                data = self._read(other)
                if data is not None and hashlib.sha256(data).digest() == copy.digest:
                    return True
        return False

    def _remove(self, name: str) -> None:
        """The pack first: an index without its pack means nothing, a pack without its index would
        be taken over."""
        (self._folder / f"{name}.pack").unlink()
        sync_folder(self._folder)
        (self._folder / f"{name}.idx").unlink()

    def _remove_orphans(self) -> None:
        for path in self._folder.glob("*.idx"):
            if not path.with_suffix(".pack").exists():
                path.unlink()


def _lock(file: OpenFile) -> bool:
    """Lock the file for as long as it is open; False when another process has it locked."""
    try:
        fcntl.flock(file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _add_all(pack: Growing, parts: Iterable[Frame | Damage]) -> None:
    """Take in what was read of a pack; damage in its middle is counted, and logged."""
    for part in parts:
        if isinstance(part, Frame):
            pack.add(part)
        elif not part.is_tail:
            pack.num_damaged_bytes += part.num_bytes
            what = "%d bytes of pack %s are damaged, from byte %d on"
            log.error(what, part.num_bytes, pack.name, part.offset)
