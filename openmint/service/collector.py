"""Deletes bytes that no record needs any more. Lives on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from openmint.catalog.catalog import Catalog
from openmint.store.blobs import BlobStore


class Collector:
    """Follows the catalogue, but never between the writing of bytes and of their record."""

    def __init__(self, catalog: Catalog, store: BlobStore, grace_seconds: float) -> None:
        self._catalog, self._store = catalog, store
        self.grace_seconds = grace_seconds
        self._num_saving = 0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Hold the collection off: what is saved inside may equal bytes that are doomed."""
        self._num_saving += 1
        try:
            yield
        finally:
            self._num_saving -= 1

    async def collect(self) -> None:
        """Let the unnamed revisions of ended sessions go, then the bytes that nothing uses."""
        await asyncio.to_thread(self._catalog.delete_ephemeral_of_ended)
        if self._num_saving:
            return
        # No await from the question to the last deletion, so that no save begins in between.
        unused = self._catalog.unused_blobs(self.grace_seconds)
        for digest in unused:
            self._store.delete(digest)
        if unused:
            await asyncio.to_thread(self._store.sync_deletions)
            await asyncio.to_thread(self._catalog.forget_blobs, unused)
            await asyncio.to_thread(self._store.compact)
