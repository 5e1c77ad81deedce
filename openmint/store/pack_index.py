"""Where the copies of a blob lie: by digest, over all packs, with what was deleted left out.

A pack that grows is known by a dictionary. A sealed one has a file beside it, `<name>.idx`: rows of
48 bytes in the order of their digests, then the deaths that the pack holds, then a SHA-256. Rows
stay in memory as they are on disk, and one sorted array over all sealed packs points into them:
64 bytes a blob.
"""

from __future__ import annotations

import hashlib
import struct
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from openmint.store.pack_frames import HEADER, Frame

MAGIC = b"OMPIDX1\n"
PREFIX = struct.Struct("<8sIIQ")
ROW = struct.Struct("<32s8sII")
DIGEST_BYTES = 32
KEY_BYTES = 40
"""Digest and birth: what a death names."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One place where a blob lies."""

    pack: str
    digest: bytes
    birth: bytes
    offset: int
    """Of its frame."""
    num_bytes: int
    """Of the blob."""

    @property
    def key(self) -> bytes:
        return self.digest + self.birth

    @property
    def end(self) -> int:
        return self.offset + self.frame_bytes

    @property
    def frame_bytes(self) -> int:
        return HEADER.size + self.num_bytes


@dataclass(slots=True)
class Growing:
    """What a pack without an index file holds, as far as it was read."""

    name: str
    end: int = 0
    last: Frame | None = None
    num_frames: int = 0
    num_damaged_bytes: int = 0
    copies: dict[bytes, list[Copy]] = field(default_factory=lambda: defaultdict(list))
    deaths: list[bytes] = field(default_factory=list)

    def add(self, frame: Frame) -> None:
        if frame.is_death:
            self.deaths.append(frame.digest + frame.birth)
        else:
            copy = Copy(self.name, frame.digest, frame.birth, frame.offset, frame.num_bytes)
            self.copies[frame.digest].append(copy)
        self.end, self.last, self.num_frames = frame.end, frame, self.num_frames + 1


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a sealed pack holds: its index file."""

    name: str
    pack_bytes: int
    rows: bytes
    deaths: tuple[bytes, ...]

    @staticmethod
    def of(pack: Growing, pack_bytes: int) -> Sealed:
        rows = sorted(
            ROW.pack(copy.digest, copy.birth, copy.offset, copy.num_bytes)
            for copies in pack.copies.values()
            for copy in copies
        )
        return Sealed(pack.name, pack_bytes, b"".join(rows), tuple(pack.deaths))

    @staticmethod
    def decode(name: str, data: bytes) -> Sealed:
        """Raises ValueError for bytes that are no whole index file."""
        body, check = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
        if len(data) < PREFIX.size + DIGEST_BYTES or hashlib.sha256(body).digest() != check:
            raise ValueError("its digest is another")
        magic, num_rows, num_deaths, pack_bytes = PREFIX.unpack_from(body)
        start = PREFIX.size + num_rows * ROW.size
        if magic != MAGIC or start + num_deaths * KEY_BYTES != len(body):
            raise ValueError("its format is another")
        deaths = tuple(body[at : at + KEY_BYTES] for at in range(start, len(body), KEY_BYTES))
        return Sealed(name, pack_bytes, body[PREFIX.size : start], deaths)

    def encode(self) -> bytes:
        prefix = PREFIX.pack(MAGIC, self.num_rows, len(self.deaths), self.pack_bytes)
        body = b"".join((prefix, self.rows, *self.deaths))
        return body + hashlib.sha256(body).digest()

    @property
    def num_rows(self) -> int:
        return len(self.rows) // ROW.size

    @property
    def num_damaged_bytes(self) -> int:
        """Bytes of the pack that are in no frame of it."""
        sizes = np.frombuffer(self.rows, "<u4").reshape(-1, ROW.size // 4)[:, -1]
        num_frames = self.num_rows + len(self.deaths)
        return self.pack_bytes - num_frames * HEADER.size - int(sizes.sum(dtype=np.int64))

    def copy(self, row: int) -> Copy:
        return Copy(self.name, *ROW.unpack_from(self.rows, row * ROW.size))

    def all_copies(self) -> Iterator[Copy]:
        return (Copy(self.name, *row) for row in ROW.iter_unpack(self.rows))

    def prefixes(self) -> npt.NDArray[np.uint64]:
        """The first eight bytes of each row's digest, as a number."""
        words = np.frombuffer(self.rows, ">u8").reshape(-1, ROW.size // 8)
        return words[:, 0].astype(np.uint64)


class Index:
    """What all packs hold. Not thread-safe."""

    def __init__(self) -> None:
        self.growing: dict[str, Growing] = {}
        self.sealed: dict[str, Sealed] = {}
        self.dead_bytes: dict[str, int] = {}
        """Of each sealed pack, the frames of copies that are dead."""
        self._dead: set[bytes] = set()
        self._merge()

    def find(self, digest: bytes) -> list[Copy]:
        """The copies of a blob that nobody deleted."""
        return [copy for copy in self._copies(digest) if copy.key not in self._dead]

    def live_copies(self, name: str) -> list[Copy]:
        """Of a sealed pack, in the order in which they lie there."""
        live = [copy for copy in self.sealed[name].all_copies() if copy.key not in self._dead]
        return sorted(live, key=lambda copy: copy.offset)

    def needed_deaths(self, name: str) -> list[bytes]:
        """Deaths in a sealed pack that keep a copy in some other pack from being found."""
        return [key for key in self.sealed[name].deaths if self._lies_outside(key, name)]

    def kill(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if key not in self._dead:
                self._dead.add(key)
                for copy in self._sealed_copies(key[:DIGEST_BYTES]):
                    if copy.key == key:
                        self.dead_bytes[copy.pack] += copy.frame_bytes

    def seal(self, packs: list[Sealed]) -> None:
        """Take in packs that were sealed, known as growing ones or not at all."""
        new_deaths: set[bytes] = set()
        for pack in packs:
            known = self.growing.pop(pack.name, None)
            new_deaths |= set(pack.deaths) - set(known.deaths if known else ())
            copies = pack.all_copies() if self._dead else ()
            dead = (copy.frame_bytes for copy in copies if copy.key in self._dead)
            self.dead_bytes[pack.name] = sum(dead)
            self.sealed[pack.name] = pack
        self._merge()
        self.kill(new_deaths)

    def drop(self, names: Collection[str]) -> None:
        """Forget packs that are gone, and deaths that nothing is left of."""
        dropped = [self.sealed.pop(name) for name in names if name in self.sealed]
        for name in names:
            self.growing.pop(name, None)
        if dropped:
            self._merge()
        for pack in dropped:
            del self.dead_bytes[pack.name]
            gone = {copy.key for copy in pack.all_copies()} & self._dead
            self._dead -= {key for key in gone if not self._lies_outside(key, pack.name)}

    def _lies_outside(self, key: bytes, name: str) -> bool:
        copies = self._copies(key[:DIGEST_BYTES])
        return any(copy.key == key and copy.pack != name for copy in copies)

    def _copies(self, digest: bytes) -> Iterator[Copy]:
        for pack in self.growing.values():
            yield from pack.copies.get(digest, ())
        yield from self._sealed_copies(digest)

    def _sealed_copies(self, digest: bytes) -> Iterator[Copy]:
        prefix = np.uint64(int.from_bytes(digest[:8], "big"))
        at = int(self._prefixes.searchsorted(prefix))
        while at < len(self._prefixes) and self._prefixes[at] == prefix:
            number, row = divmod(int(self._places[at]), 1 << 32)
            copy = self._numbered[number].copy(row)
            if copy.digest == digest:
                yield copy
            at += 1

    def _merge(self) -> None:
        """Sort the prefixes of all sealed packs; each beside the number of its pack and its row."""
        self._numbered = list(self.sealed.values())
        none = np.empty(0, np.uint64)
        places = [
            np.arange(pack.num_rows, dtype=np.uint64) + np.uint64(number << 32)
            for number, pack in enumerate(self._numbered)
        ]
        prefixes = np.concatenate([none, *(pack.prefixes() for pack in self._numbered)])
        # Packs are sorted runs, which a stable sort merges.
        order = prefixes.argsort(kind="stable")
        self._prefixes = prefixes[order]
        self._places = np.concatenate([none, *places])[order]
