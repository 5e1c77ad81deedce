"""Immutable bytes by digest in a local folder.

What is put is durable on return: it would survive a power cut. Small blobs lie in packs
(`packs.py`). Larger ones are files of their own: temporary file, fsync, rename, fsync of the
folder. Several processes may use one store at once. Names come from digests alone, never from a
client.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from openmint.errors import NotFound, StoreFailed
from openmint.store.folders import sync_folder, write_whole
from openmint.store.pack_frames import SMALL_BYTES
from openmint.store.packs import Packs
from openmint.types import Digest

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest_of(data: bytes) -> Digest:
    return Digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


class BlobStore:
    """The store under `root`: `packs/<name>.pack`, and `blobs/ab/cd/<sha256>` for large blobs."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._incoming = root / "blobs" / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._packs = Packs(root / "packs", self._incoming)

    def put(self, data: bytes) -> Digest:
        """The digest under which `data` is now durable. Safe to repeat; heals damaged bytes.

        Raises StoreFailed when the disk refuses; nothing half is left behind then.
        """
        (digest,) = self.put_many([data])
        return digest

    def put_many(self, blobs: Iterable[bytes]) -> list[Digest]:
        """The digests under which all of them are now durable; small ones are synced together.

        Raises StoreFailed when the disk refuses; some may be stored then. Safe to repeat.
        """
        digests: list[Digest] = []
        try:
            self._packs.put_all(self._small_ones(blobs, digests))
        except OSError as error:
            at = ", ".join(digests[-1:])
            raise StoreFailed(f"could not write {at} to the store: {error}") from error
        return digests

    def get(self, digest: Digest) -> bytes:
        """The bytes, checked against their digest.

        Raises NotFound when the store has none of that name, StoreFailed when they were damaged.
        """
        name = _name_of(digest)
        with _saying(f"could not read {digest} from the store"):
            data = self._packs.get(bytes.fromhex(name))
            if data is not None:
                return data
            try:
                data = self._path(name).read_bytes()
            except FileNotFoundError:
                raise self._not_found(digest) from None
        if (found := digest_of(data)) != digest:
            raise StoreFailed(f"the store's bytes for {digest} are damaged: they hash to {found}")
        return data

    def exists(self, digest: Digest) -> bool:
        """Whether the bytes are there, damaged or not. Raises StoreFailed."""
        name = _name_of(digest)
        with _saying(f"could not look for {digest} in the store"):
            return bool(self._packs.find(bytes.fromhex(name))) or self._path(name).is_file()

    def size(self, digest: Digest) -> int:
        """Bytes of the blob. Raises NotFound, StoreFailed."""
        name = _name_of(digest)
        with _saying(f"could not look for {digest} in the store"):
            if copies := self._packs.find(bytes.fromhex(name)):
                return copies[0].num_bytes
            try:
                return self._path(name).stat().st_size
            except FileNotFoundError:
                raise self._not_found(digest) from None

    def delete(self, digest: Digest) -> None:
        """Remove the bytes; fine when they are gone already. Raises StoreFailed.

        A power cut may bring them back until `sync_deletions` has returned.
        """
        name = _name_of(digest)
        with _saying(f"could not delete {digest} from the store"):
            self._packs.delete(bytes.fromhex(name))
            self._path(name).unlink(missing_ok=True)

    def sync_deletions(self) -> None:
        """What this process deleted stays deleted. Raises StoreFailed when some of it may not; then
        all of it must be deleted again."""
        with _saying("could not make deletions last"):
            self._packs.sync()

    def compact(self) -> None:
        """Give the room of deleted small blobs back, once it is most of a pack.

        Raises StoreFailed when the disk refuses; then nothing is lost. Safe to repeat.
        """
        with _saying("could not compact the store"):
            self._packs.compact()

    def sweep_incoming(self) -> None:
        """Remove what killed writers left half written. Only for who starts alone on the folder."""
        for leftover in self._incoming.iterdir():
            leftover.unlink()

    def _small_ones(
        self, blobs: Iterable[bytes], digests: list[Digest]
    ) -> Iterator[tuple[bytes, bytes]]:
        """Those that belong in packs. The others are put while this is iterated over, and all
        digests noted."""
        for data in blobs:
            digests.append(digest := digest_of(data))
            name = _name_of(digest)
            path = self._path(name)
            # Stores from before there were packs have small blobs in files, too.
            if len(data) < SMALL_BYTES and not path.is_file():
                yield bytes.fromhex(name), data
            else:
                self._put_file(path, data)

    def _put_file(self, path: Path, data: bytes) -> None:
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data, self._incoming)
        # Also for bytes found in place: who wrote them may not have come this far yet.
        for folder in (path.parent, path.parent.parent, self._blobs):
            sync_folder(folder)

    def _path(self, name: str) -> Path:
        return self._blobs / name[:2] / name[2:4] / name

    def _not_found(self, digest: Digest) -> NotFound:
        lost = self._packs.num_damaged_bytes()
        note = f"; {lost} damaged bytes of its packs may have been them" if lost else ""
        return NotFound(f"the store has no bytes for {digest}{note}")


def _name_of(digest: Digest) -> str:
    """The 64 hex digits. Raises NotFound for what is no digest."""
    if not DIGEST.fullmatch(digest):
        raise NotFound(f"{digest!r} is not a digest; it reads sha256: and 64 hex digits")
    return digest.removeprefix("sha256:")


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Make what the system refuses an error of the store."""
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"{what}: {error}") from error
