"""One tier of memory: which revisions are in it, who holds them there, and which leaves next.

A book only: bytes move elsewhere. Eviction frees memory, never the revision, which stays in the
store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from openmint.residency.eviction import EvictionOrder
from openmint.types import Digest


class Tier:
    """Resident revisions within a byte budget."""

    def __init__(self, budget_bytes: int, order: EvictionOrder) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._order = order
        self._sizes: dict[Digest, int] = {}
        self._pins: Counter[Digest] = Counter()

    def __contains__(self, revision: Digest) -> bool:
        return revision in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def resident(self) -> tuple[Digest, ...]:
        return tuple(self._sizes)

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.used_bytes

    def bytes_of(self, revision: Digest) -> int:
        """What it takes here; 0 when it isn't."""
        return self._sizes.get(revision, 0)

    def pin(self, revision: Digest) -> None:
        """Forbid eviction until the matching unpin. The revision need not be resident yet."""
        self._pins[revision] += 1

    def unpin(self, revision: Digest) -> None:
        self._pins[revision] -= 1
        if not self._pins[revision]:
            del self._pins[revision]

    def is_pinned(self, revision: Digest) -> bool:
        return revision in self._pins

    def use(self, revision: Digest) -> None:
        """This revision is asked for, resident or not."""
        self._order.use(revision)

    def room_for(
        self, num_bytes: int, stays: Callable[[Digest], bool] = lambda _: False
    ) -> list[Digest] | None:
        """Revisions to evict so that `num_bytes` fit; None while pins, or `stays`, forbid it."""
        leaving: list[Digest] = []
        free = self.free_bytes
        if free >= num_bytes:
            return leaving
        for revision in self._order.leaving():
            if not self.is_pinned(revision) and not stays(revision):
                leaving.append(revision)
                free += self._sizes[revision]
                if free >= num_bytes:
                    return leaving
        return None

    def admit(self, revision: Digest, num_bytes: int) -> None:
        self._sizes[revision] = num_bytes
        self.used_bytes += num_bytes
        self._order.admit(revision, num_bytes)

    def evict(self, revision: Digest) -> None:
        self.used_bytes -= self._sizes.pop(revision)
        self._order.evict(revision)

    def check_integrity(self) -> None:
        """Assert the invariants; tests call it after random operations."""
        assert self.used_bytes == sum(self._sizes.values())
        assert all(count > 0 for count in self._pins.values())
        assert set(self._order.leaving()) == set(self._sizes)
