"""Immutable bytes by digest in a local folder.

What is put is durable on return: it would survive a power cut. Small blobs lie in packs
(`packs.py`). Larger ones are files of their own: temporary file, fsync, rename, fsync of the
folder. Several processes may use one store at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from openmint.errors import NotFound, StoreFailed
from openmint.store.blobs import check, digest_of, name_of
from openmint.store.folders import read_hashed, sync_folder, write_whole
from openmint.store.pack_frames import SMALL_BYTES
from openmint.store.packs import Packs
from openmint.types import Digest


class FolderStore:
    """A `BlobStore` under `root`: `packs/<name>.pack`, for large blobs `blobs/ab/cd/<sha256>`."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._incoming = root / "blobs" / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._packs = Packs(root / "packs", self._incoming)
        self._dying: deque[Path] = deque()

    def start(self) -> None:
        with _saying("could not remove what was left half written"):
            for leftover in self._incoming.iterdir():
                leftover.unlink()

    def put(self, data: bytes) -> Digest:
        (digest,) = self.put_many([data])
        return digest

    def put_many(self, blobs: Iterable[bytes]) -> list[Digest]:
        """See `BlobStore`. Small ones are synced together."""
        digests: list[Digest] = []
        try:
            self._packs.put_all(self._small_ones(blobs, digests))
        except OSError as error:
            at = ", ".join(digests[-1:])
            raise StoreFailed(f"could not write {at} to the store: {error}") from error
        return digests

    def get(self, digest: Digest) -> memoryview:
        name = name_of(digest)
        with _saying(f"could not read {digest} from the store"):
            small = self._packs.get(bytes.fromhex(name))
            if small is not None:
                return memoryview(bytearray(small))
            try:
                data, sha256 = read_hashed(self._path(name))
            except FileNotFoundError:
                raise self._not_found(digest) from None
        check(Digest(f"sha256:{sha256}"), digest)
        return data

    def exists(self, digest: Digest) -> bool:
        name = name_of(digest)
        with _saying(f"could not look for {digest} in the store"):
            return bool(self._packs.find(bytes.fromhex(name))) or self._path(name).is_file()

    def size(self, digest: Digest) -> int:
        name = name_of(digest)
        with _saying(f"could not look for {digest} in the store"):
            if copies := self._packs.find(bytes.fromhex(name)):
                return copies[0].num_bytes
            try:
                return self._path(name).stat().st_size
            except FileNotFoundError:
                raise self._not_found(digest) from None

    def delete(self, digest: Digest) -> None:
        """See `BlobStore`. A power cut may bring them back until `sync_deletions` has returned. A
        large file is only moved away, as to free its room may take a third of a second."""
        name = name_of(digest)
        with _saying(f"could not delete {digest} from the store"):
            self._packs.delete(bytes.fromhex(name))
            dying = self._incoming / uuid4().hex
            with suppress(FileNotFoundError):
                self._path(name).rename(dying)
                self._dying.append(dying)

    def sync_deletions(self) -> None:
        with _saying("could not make deletions last"):
            with suppress(IndexError):
                while True:
                    self._dying.popleft().unlink(missing_ok=True)
            self._packs.sync()

    def compact(self) -> None:
        """See `BlobStore`. Room of small ones comes back once it is most of a pack."""
        with _saying("could not compact the store"):
            self._packs.compact()

    def _small_ones(
        self, blobs: Iterable[bytes], digests: list[Digest]
    ) -> Iterator[tuple[bytes, bytes]]:
        """Those that belong in packs. The others are put while this is iterated over, and all
        digests noted."""
        for data in blobs:
            digests.append(digest := digest_of(data))
            name = name_of(digest)
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


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Make what the system refuses an error of the store."""
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"{what}: {error}") from error
