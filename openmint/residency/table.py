"""Which revisions hold an engine slot, who pins them, and which leaves next.

A book only: bytes move elsewhere. Eviction frees a slot, never the revision, which stays in the
store.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

from openmint.types import Digest


class SlotTable:
    """Resident revisions within a byte budget, least recently used first out."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._sizes: OrderedDict[Digest, int] = OrderedDict()
        self._pins: Counter[Digest] = Counter()

    def __contains__(self, revision: Digest) -> bool:
        return revision in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def resident(self) -> tuple[Digest, ...]:
        return tuple(self._sizes)

    def pin(self, revision: Digest) -> None:
        """Forbid eviction until the matching unpin. The revision need not be resident yet."""
        self._pins[revision] += 1

    def unpin(self, revision: Digest) -> None:
        self._pins[revision] -= 1
        if not self._pins[revision]:
            del self._pins[revision]

    def touch(self, revision: Digest) -> None:
        """This revision was just used."""
        self._sizes.move_to_end(revision)

    def room_for(self, num_bytes: int) -> list[Digest] | None:
        """Revisions to evict so that `num_bytes` fit; None while pins forbid it."""
        leaving: list[Digest] = []
        free = self.budget_bytes - self.used_bytes
        for revision, size in self._sizes.items():
            if free >= num_bytes:
                break
            if not self._pins[revision]:
                leaving.append(revision)
                free += size
        return leaving if free >= num_bytes else None

    def admit(self, revision: Digest, num_bytes: int) -> None:
        self._sizes[revision] = num_bytes
        self.used_bytes += num_bytes

    def evict(self, revision: Digest) -> None:
        self.used_bytes -= self._sizes.pop(revision)

    def check_integrity(self) -> None:
        """Assert the invariants; tests call it after random operations."""
        assert self.used_bytes == sum(self._sizes.values())
        assert all(count > 0 for count in self._pins.values())
