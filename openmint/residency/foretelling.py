"""Which revision of a worker's past is likely to be asked for next and isn't in memory yet.

A book beside `LeastWorth`, which knows the chances. It is asked while memory is free and nothing
else is to be loaded, and answers in a bounded time, as an engine waits. Once memory was full it is
closed: what is free between evictions is small, and guesses into it cost more than they spare.
"""

from __future__ import annotations

import heapq

from openmint.residency.eviction import HALF_LIVES, LeastWorth
from openmint.types import Digest

LEAST_CHANCE = 1 / HALF_LIVES[-1]
"""Of the next use; what has less is not likely to be used within the longest half-life, which is as
far as anything is remembered, so that its load would most likely be for nothing."""
NUM_LOOKED_AT = 32
"""The best ones, among which one must fit the free memory."""


class Foretelling:
    """Revisions that aren't resident, the one of the greatest worth first."""

    def __init__(self, order: LeastWorth) -> None:
        self.taken: Digest | None = None
        """The last one, until it is in memory or can't be."""
        self._order = order
        self._sizes: dict[Digest, int] = {}
        self._heap: list[tuple[float, Digest]] = []
        """By the worth when it was last looked at, which falls until the next use, so that the best
        are weighed anew before one is taken. Those that were dropped meanwhile are skipped."""
        self._in_vain_bytes = -1
        """None of those looked at fits so little."""

    def __len__(self) -> int:
        return len(self._sizes)

    def note(self, revision: Digest, num_bytes: int) -> None:
        """It isn't in memory, and would take so many bytes there."""
        if self._order.chance(revision) < LEAST_CHANCE:
            return
        self._sizes[revision] = num_bytes
        heapq.heappush(self._heap, self._entry(revision))
        self._in_vain_bytes = min(self._in_vain_bytes, num_bytes - 1)

    def drop(self, revision: Digest) -> None:
        """It is in memory, or can't be."""
        self._sizes.pop(revision, None)
        if revision == self.taken:
            self.taken = None

    def close(self) -> None:
        """Foretell nothing any more; what was taken last may still arrive."""
        self._sizes.clear()
        self._heap.clear()

    def take(self, free_bytes: int) -> Digest | None:
        """The one of the greatest worth that fits and has a real chance; it is dropped. None when
        there is none among the best."""
        if free_bytes <= self._in_vain_bytes:
            return None
        entries = sorted(self._entry(each) for each in self._pop_best())
        found = next((each for _, each in entries if self._sizes[each] <= free_bytes), None)
        for entry in entries:
            if entry[1] != found:
                heapq.heappush(self._heap, entry)
        if found is None:
            self._in_vain_bytes = free_bytes
        else:
            self.drop(found)
            self.taken = found
        return found

    def _pop_best(self) -> set[Digest]:
        """Out of the heap; those that have no chance any more are dropped."""
        best = set[Digest]()
        while self._heap and len(best) < NUM_LOOKED_AT:
            _, revision = heapq.heappop(self._heap)
            if revision not in self._sizes:
                continue
            if self._order.chance(revision) < LEAST_CHANCE:
                self.drop(revision)
            else:
                best.add(revision)
        return best

    def _entry(self, revision: Digest) -> tuple[float, Digest]:
        return -self._order.worth(revision, self._sizes[revision]), revision
