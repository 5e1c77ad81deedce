"""Immutable bytes by digest: what every store of them promises.

`folder_store.py` keeps them in a local folder, `s3_store.py` in a bucket; `opening.py` opens the
one that is configured. Names come from digests alone, never from a client.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Protocol

from openmint.errors import NotFound, StoreFailed
from openmint.types import Digest

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class BlobStore(Protocol):
    """A store that several processes may use at once, and any thread of them."""

    def start(self) -> None:
        """Called first by the one service of this store, and by nobody else.

        Removes what killed writers left. Raises StoreFailed when the store can't be used.
        """

    def put(self, data: bytes) -> Digest:
        """The digest under which `data` is now durable. Safe to repeat; heals damaged bytes.

        Raises StoreFailed when the store refuses; nothing half can be read then.
        """

    def put_many(self, blobs: Iterable[bytes]) -> list[Digest]:
        """The digests under which all of them are now durable; sooner than one after the other.

        Raises StoreFailed when the store refuses; some may be stored then. Safe to repeat.
        """

    def get(self, digest: Digest) -> memoryview:
        """The bytes, checked against their digest, in memory that is the caller's alone and may be
        written.

        Raises NotFound when the store has none of that name, StoreFailed when they were damaged
        or can't be reached.
        """

    def exists(self, digest: Digest) -> bool:
        """Whether the bytes are there, damaged or not. Raises StoreFailed."""

    def size(self, digest: Digest) -> int:
        """Bytes of the blob. Raises NotFound, StoreFailed."""

    def delete(self, digest: Digest) -> None:
        """Remove the bytes; fine when they are gone already. Raises StoreFailed.

        Until `sync_deletions` has returned they may be there still, or come back. Waits for no
        network.
        """

    def sync_deletions(self) -> None:
        """What this process deleted is gone for good. Raises StoreFailed when some of it may not
        be; then all of it must be deleted again."""

    def compact(self) -> None:
        """Give the room of deleted blobs back where it takes work. Raises StoreFailed; then
        nothing is lost. Safe to repeat."""


def digest_of(data: bytes | memoryview) -> Digest:
    return Digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


def name_of(digest: Digest) -> str:
    """The 64 hex digits. Raises NotFound for what is no digest."""
    if not DIGEST.fullmatch(digest):
        raise NotFound(f"{digest!r} is not a digest; it reads sha256: and 64 hex digits")
    return digest.removeprefix("sha256:")


def check(found: Digest, digest: Digest) -> None:
    """Raises StoreFailed when what was read under a digest has another one."""
    if found != digest:
        raise StoreFailed(f"the store's bytes for {digest} are damaged: they hash to {found}")
