"""What the catalogue names must be in the store, whole."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from openmint.cli.backup import NAMED_BLOBS
from openmint.errors import NotFound
from openmint.store.blobs import BlobStore
from openmint.types import Digest


def named_in(data: Path) -> set[Digest]:
    """All that the catalogue's records need now."""
    with closing(sqlite3.connect(data / "openmint.db", timeout=30)) as connection:
        return {Digest(digest) for (digest,) in connection.execute(NAMED_BLOBS)}


def check_named(data: Path, store: BlobStore) -> int:
    """Read all that is named, beside a service that may delete; how much that was.

    Raises StoreFailed for bytes that aren't whole, AssertionError for what is missing.
    """
    digests = named_in(data)
    for digest in digests:
        try:
            store.get(digest)
        except NotFound:  # fine when its last record went since
            assert digest not in named_in(data), f"{digest} is named and gone"
    return len(digests)
