"""Immutable bytes by digest in a local folder.

`put` returns once the bytes would survive a power cut: temporary file, fsync, rename, fsync of the
folder. Several processes may use one store; equal bytes land in one file. Names come from digests
alone, never from a client.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

from openmint.errors import NotFound, StoreFailed
from openmint.store.folders import sync_folder
from openmint.types import Digest

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest_of(data: bytes) -> Digest:
    return Digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


class BlobStore:
    """The store under `root`: `blobs/ab/cd/<sha256>`, about 15 files a folder at 10^6 blobs."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._incoming = root / "blobs" / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> Digest:
        """The digest under which `data` is now durable. Safe to repeat; heals damaged bytes.

        Raises StoreFailed when the disk refuses; no temporary file is left behind then.
        """
        digest = digest_of(data)
        path = self._path(digest)
        try:
            if not path.is_file() or path.read_bytes() != data:
                self._write(path, data)
            # Also for bytes found in place: who wrote them may not have come this far yet.
            for folder in (path.parent, path.parent.parent, self._blobs):
                sync_folder(folder)
        except OSError as error:
            raise StoreFailed(f"could not write {len(data)} bytes to the store: {error}") from error
        return digest

    def get(self, digest: Digest) -> bytes:
        """The bytes, checked against their digest.

        Raises NotFound when the store has none of that name, StoreFailed when they were damaged.
        """
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"the store has no bytes for {digest}") from None
        except OSError as error:
            raise StoreFailed(f"could not read {digest} from the store: {error}") from error
        if (found := digest_of(data)) != digest:
            raise StoreFailed(f"the store's bytes for {digest} are damaged: they hash to {found}")
        return data

    def exists(self, digest: Digest) -> bool:
        return self._path(digest).is_file()

    def size(self, digest: Digest) -> int:
        """Bytes of the blob. Raises NotFound."""
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            raise NotFound(f"the store has no bytes for {digest}") from None

    def delete(self, digest: Digest) -> None:
        """Remove the bytes; fine when they are gone already."""
        self._path(digest).unlink(missing_ok=True)

    def sweep_incoming(self) -> None:
        """Remove what killed writers left half written. Only for who starts alone on the folder."""
        for leftover in self._incoming.iterdir():
            leftover.unlink()

    def _path(self, digest: Digest) -> Path:
        if not DIGEST.fullmatch(digest):
            raise NotFound(f"{digest!r} is not a digest; it reads sha256: and 64 hex digits")
        name = digest.removeprefix("sha256:")
        return self._blobs / name[:2] / name[2:4] / name

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self._incoming)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
