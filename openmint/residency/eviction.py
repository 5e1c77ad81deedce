"""Which resident revision leaves first: three orders of eviction.

Time is counted in uses, not in seconds, so that busy and idle hours rank alike and a log of uses
replays to the same decisions. Orders know residents and pasts; budgets and pins are the tier's.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from openmint.residency.load_times import LoadTimes
from openmint.types import Digest

HALF_LIVES = (64, 512, 4096, 32768)
"""Uses after which a use counts half, for each of the forecasters."""
FORGETTING = 0.002
"""Of the trust in each forecaster that is shared out anew at each use."""
UNSEEN = 1e-6
"""Chance of the next use that a forecaster gives to what it has not seen."""
MOST_PASTS = 65_536
"""Revisions whose uses are remembered, resident or not."""
NUM_COMPARED = 64
"""Residents of which the least worth is sought; among more, by chance."""


class EvictionOrder(Protocol):
    """Hears of every use, of residents and of others, and ranks the residents."""

    def use(self, revision: Digest) -> None: ...
    def admit(self, revision: Digest, num_bytes: int) -> None: ...
    def evict(self, revision: Digest) -> None: ...
    def leaving(self) -> Iterator[Digest]:
        """All residents, the least worth keeping first. Nothing may change meanwhile."""
        ...


class LeastRecent:
    """LRU: the one that was used longest ago."""

    def __init__(self) -> None:
        self._order: OrderedDict[Digest, None] = OrderedDict()

    def use(self, revision: Digest) -> None:
        if revision in self._order:
            self._order.move_to_end(revision)

    def admit(self, revision: Digest, num_bytes: int) -> None:
        self._order[revision] = None

    def evict(self, revision: Digest) -> None:
        del self._order[revision]

    def leaving(self) -> Iterator[Digest]:
        return iter(self._order)


class LeastFrequent:
    """LFU, with the uses before a revision's admission counted too; among equals the oldest."""

    def __init__(self) -> None:
        self._uses: dict[Digest, int] = {}
        self._residents: dict[Digest, None] = {}

    def use(self, revision: Digest) -> None:
        self._uses[revision] = self._uses.get(revision, 0) + 1

    def admit(self, revision: Digest, num_bytes: int) -> None:
        self._residents[revision] = None

    def evict(self, revision: Digest) -> None:
        del self._residents[revision]

    def leaving(self) -> Iterator[Digest]:
        order = [(self._uses.get(each, 0), age, each) for age, each in enumerate(self._residents)]
        heapq.heapify(order)
        while order:
            yield heapq.heappop(order)[2]


@dataclass(slots=True)
class Past:
    """A revision's uses, each counted half as much after every half-life of a forecaster."""

    counts: list[float] = field(default_factory=lambda: [0.0] * len(HALF_LIVES))
    at: int = 0

    def chances(self, clock: int) -> list[float]:
        """That it is used next, by each forecaster, up to one factor for all."""
        age = self.at - clock
        pairs = zip(self.counts, HALF_LIVES, strict=True)
        return [count * math.exp2(age / half_life) / half_life for count, half_life in pairs]

    def use(self, chances: list[float], clock: int) -> None:
        pairs = zip(chances, HALF_LIVES, strict=True)
        self.counts = [chance * half_life + 1.0 for chance, half_life in pairs]
        self.at = clock


class LeastWorth:
    """The one whose eviction is likely to cost least: seconds that a load of its size takes, times
    the chance that it is asked for next, by the byte that it frees.

    The chance is a mixture of forecasters, which count uses over half-lives of their own: steady
    favourites, a set that drifts and short bursts each have one that knows them. How far each is
    trusted follows from how well it foretold the uses so far (Bayes' rule with a fixed share, as in
    Herbster and Warmuth, "Tracking the Best Expert", 1998).
    """

    def __init__(self, times: LoadTimes, seed: int = 0) -> None:
        self._times = times
        self._clock = 0
        self._pasts: OrderedDict[Digest, Past] = OrderedDict()
        self._trust = [1 / len(HALF_LIVES)] * len(HALF_LIVES)
        self._residents: list[Digest] = []
        self._places: dict[Digest, int] = {}
        self._sizes: dict[Digest, int] = {}
        self._chance = random.Random(seed)

    def use(self, revision: Digest) -> None:
        self._clock += 1
        past = self._pasts.setdefault(revision, Past())
        self._pasts.move_to_end(revision)
        foretold = past.chances(self._clock)
        self._learn(foretold)
        past.use(foretold, self._clock)
        if len(self._pasts) > MOST_PASTS:
            self._pasts.popitem(last=False)

    def admit(self, revision: Digest, num_bytes: int) -> None:
        self._places[revision] = len(self._residents)
        self._residents.append(revision)
        self._sizes[revision] = num_bytes

    def evict(self, revision: Digest) -> None:
        place, last = self._places.pop(revision), self._residents.pop()
        if last != revision:
            self._residents[place], self._places[last] = last, place
        del self._sizes[revision]

    def leaving(self) -> Iterator[Digest]:
        compared = self._residents
        if len(compared) > NUM_COMPARED:
            compared = self._chance.sample(compared, NUM_COMPARED)
        yield from sorted(compared, key=self._worth_here)
        if len(compared) < len(self._residents):
            rest = set(self._residents) - set(compared)
            yield from sorted(rest, key=lambda each: (self._worth_here(each), each))

    def _worth_here(self, revision: Digest) -> float:
        return self.worth(revision, self._sizes[revision])

    def worth(self, revision: Digest, num_bytes: int) -> float:
        """Seconds of loading that having it is likely to spare at the next use, by the byte."""
        return self._times.seconds(num_bytes) / max(1, num_bytes) * self.chance(revision)

    def chance(self, revision: Digest) -> float:
        """That the next use is one of this revision."""
        chance = UNSEEN
        if (past := self._pasts.get(revision)) is not None:
            pairs = zip(self._trust, past.chances(self._clock), strict=True)
            chance += sum(trust * chance for trust, chance in pairs)
        return chance

    def _learn(self, foretold: list[float]) -> None:
        """Trust those more that gave this use a higher chance."""
        trust = [t * (chance + UNSEEN) for t, chance in zip(self._trust, foretold, strict=True)]
        total, share = sum(trust), FORGETTING / len(trust)
        self._trust = [(1 - FORGETTING) * each / total + share for each in trust]
