"""Deletes bytes that no record needs any more. Lives on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from openmint.catalog.catalog import Catalog
from openmint.errors import StoreFailed
from openmint.store.blobs import BlobStore
from openmint.types import Digest


class Collector:
    """Follows the catalogue, but never between the writing of bytes and of their record."""

    def __init__(self, catalog: Catalog, store: BlobStore, grace_seconds: float) -> None:
        self._catalog, self._store = catalog, store
        self.grace_seconds = grace_seconds
        self._num_saving = 0
        self._deleted: frozenset[Digest] = frozenset()
        """What the last collection took, or takes now. Saves in progress began after it did."""
        self._deleting = asyncio.Lock()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Hold the next collection off: what is saved inside may equal bytes that are doomed."""
        self._num_saving += 1
        try:
            yield
        finally:
            self._num_saving -= 1

    async def spare(self, digest: Digest) -> None:
        """Between bytes and their record, inside `saving`: returns once they stay.

        Raises StoreFailed when a deletion that was under way when the save began took them.
        """
        if digest not in self._deleted:
            return
        async with self._deleting:
            is_there = await asyncio.to_thread(self._store.exists, digest)
        if not is_there:
            raise StoreFailed(f"{digest} was deleted while equal bytes were saved; save again")

    async def collect(self) -> None:
        """Let the unnamed revisions of ended sessions go, then the bytes that nothing uses."""
        await asyncio.to_thread(self._catalog.delete_ephemeral_of_ended)
        async with self._deleting:
            if self._num_saving:
                return
            # No await from here to the last deletion, so that no save begins in between. A store
            # that deletes over the network does so afterwards; what is saved meanwhile is spared.
            unused = self._catalog.unused_blobs(self.grace_seconds)
            self._deleted = frozenset(unused)
            for digest in unused:
                self._store.delete(digest)
            if unused:
                await asyncio.to_thread(self._store.sync_deletions)
                await asyncio.to_thread(self._catalog.forget_blobs, unused)
                await asyncio.to_thread(self._store.compact)
