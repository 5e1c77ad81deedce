"""What a memory of some size would have had to load, had these revisions been used in this order.

The eviction orders under test are those that workers run. `FarthestUse` knows the future: where all
loads cost the same it is the best there can be (Belady, "A study of replacement algorithms for a
virtual-storage computer", 1966), else a strong one to be compared with.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from openmint.residency.eviction import EvictionOrder, LeastFrequent, LeastRecent, LeastWorth
from openmint.residency.load_times import LoadTimes
from openmint.residency.tier import Tier
from openmint.types import Digest


@dataclass(frozen=True, slots=True)
class Use:
    """A request for a revision, and what it takes in memory."""

    revision: Digest
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Replayed:
    num_uses: int
    num_loads: int
    loaded_bytes: int
    load_seconds: float

    @property
    def hit_share(self) -> float:
        return 1.0 - self.num_loads / max(1, self.num_uses)


def orders(uses: Sequence[Use], times: LoadTimes, seed: int = 0) -> dict[str, EvictionOrder]:
    """Ours and those that it is compared with, each for one replay of these uses."""
    return {
        "ours": LeastWorth(times, seed),
        "lru": LeastRecent(),
        "lfu": LeastFrequent(),
        "belady": FarthestUse(uses),
    }


def replay(
    uses: Sequence[Use],
    order: EvictionOrder,
    budget_bytes: int,
    load: Callable[[Use], float],
) -> Replayed:
    """The loads that these uses cause in an empty memory; `load` says, or finds out, how many
    seconds each takes."""
    tier = Tier(budget_bytes, order)
    num_loads, loaded_bytes, load_seconds = 0, 0, 0.0
    for use in uses:
        tier.use(use.revision)
        if use.revision in tier:
            continue
        num_loads += 1
        loaded_bytes += use.num_bytes
        load_seconds += load(use)
        leaving = tier.room_for(use.num_bytes)
        assert leaving is not None, "a revision is larger than the memory"
        for revision in leaving:
            tier.evict(revision)
        tier.admit(use.revision, use.num_bytes)
    return Replayed(len(uses), num_loads, loaded_bytes, load_seconds)


class FarthestUse:
    """Belady's: the resident whose next use is farthest away. For `replay` of the same uses."""

    def __init__(self, uses: Sequence[Use]) -> None:
        self._next_S = _next_uses(uses)
        self._at = -1
        self._next: dict[Digest, int] = {}
        """Of each resident."""
        self._heap: list[tuple[int, Digest]] = []
        """By the next use, the farthest first; those that are out of date are skipped."""

    def use(self, revision: Digest) -> None:
        self._at += 1
        if revision in self._next:
            self._note(revision)

    def admit(self, revision: Digest, num_bytes: int) -> None:
        self._note(revision)

    def evict(self, revision: Digest) -> None:
        del self._next[revision]

    def leaving(self) -> Iterator[Digest]:
        self._drop_old()
        taken = []
        try:
            while self._heap:
                taken.append(heapq.heappop(self._heap))
                yield taken[-1][1]
                self._drop_old()
        finally:
            for entry in taken:
                heapq.heappush(self._heap, entry)

    def _drop_old(self) -> None:
        while self._heap and self._next.get(self._heap[0][1]) != -self._heap[0][0]:
            heapq.heappop(self._heap)

    def _note(self, revision: Digest) -> None:
        self._next[revision] = self._next_S[self._at]
        heapq.heappush(self._heap, (-self._next_S[self._at], revision))


def _next_uses(uses: Sequence[Use]) -> list[int]:
    """Of each use, where the next one of its revision is; after the end where there is none."""
    found, seen = [len(uses)] * len(uses), dict[Digest, int]()
    for at in range(len(uses) - 1, -1, -1):
        found[at] = seen.get(uses[at].revision, len(uses))
        seen[uses[at].revision] = at
    return found
