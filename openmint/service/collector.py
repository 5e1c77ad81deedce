"""Bytes that no record names any more, and when they may go. Lives on the event loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from openmint.catalog.catalog import Catalog
from openmint.store.blobs import BlobStore
from openmint.types import Digest


class Collector:
    """Deletes doomed bytes while nobody is between writing bytes and writing their record."""

    def __init__(self, catalog: Catalog, store: BlobStore) -> None:
        self._catalog, self._store = catalog, store
        self._doomed: set[Digest] = set()
        self._num_saving = 0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Hold the collection off: what is saved inside may equal bytes that are doomed."""
        self._num_saving += 1
        try:
            yield
        finally:
            self._num_saving -= 1

    def doom(self, digests: Iterable[Digest]) -> None:
        """Have these go unless a record names them by then."""
        self._doomed.update(digests)

    def collect(self) -> None:
        """Delete what is doomed, unless a save is under way. Never awaits, so that none begins."""
        while self._doomed and not self._num_saving:
            digest = self._doomed.pop()
            if not self._catalog.is_referenced(digest):
                self._store.delete(digest)
