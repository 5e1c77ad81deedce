"""Store, host memory, engine slots: brings revisions to where they are wanted, in time.

Reading, checking and decoding happen in the background, several at once; between two steps the
engine only takes over what is ready. What has a slot is in host memory too, so a slot is given up
without loss, and more revisions than there are slots take turns in them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from openmint.config import WorkerConfig
from openmint.errors import Overloaded
from openmint.residency.decisions import Decision, Recalled
from openmint.residency.eviction import LeastRecent, LeastWorth
from openmint.residency.foretelling import Foretelling
from openmint.residency.load_times import LoadTimes
from openmint.residency.loads import LoadQueue
from openmint.residency.tier import Tier
from openmint.scheduler.seams import Archive, Background, Decisions, EngineProtocol, Weights
from openmint.types import Digest, Priority

TURN_STEPS = 16
"""Steps that a revision keeps its slot while others wait for one. A step at 32 sequences takes ten
times as long as filling a slot, so turns this long cost under a hundredth."""


class Tiers:
    """What one worker holds of which revision. Called by the scheduler's thread alone."""

    def __init__(
        self,
        engine: EngineProtocol,
        archive: Archive,
        background: Background,
        config: WorkerConfig,
        decisions: Decisions,
        on_failed: Callable[[Digest, Exception], None],
    ) -> None:
        self._engine, self._archive, self._background = engine, archive, background
        self._decisions, self._on_failed = decisions, on_failed
        self.times = LoadTimes()
        order = LeastWorth(self.times)
        self.host = Tier(config.host_bytes, order)
        self.slots = Tier(config.serving_bytes, LeastRecent())
        self.loads = LoadQueue(config.parallel_loads, config.waiting_loads, self.times)
        self.counters = Counter[str]()
        self._foretelling = Foretelling(order)
        self._weights: dict[Digest, Weights] = {}
        self._landed: dict[Digest, Weights] = {}
        self._held: frozenset[Digest] = frozenset()
        self._queue: dict[Digest, None] = {}
        self._steps_in_slot: Counter[Digest] = Counter()

    # -- who wants what ---------------------------------------------------------------------------

    def want(self, revision: Digest, priority: Priority, deadline_at: float) -> None:
        """Hold the revision in memory until `release`, loading it if it isn't there.

        Raises Overloaded, with nothing to release, when it can't be there by the deadline.
        """
        self.host.use(revision)
        try:
            if not self.is_here(revision):
                self.loads.want(revision, priority, time.monotonic(), deadline_at)
        except Overloaded:
            self._decisions.note(Decision("refuse", revision))
            raise
        self._decisions.note(Decision("want", revision, self.host.bytes_of(revision)))
        self.host.pin(revision)
        self._start_loads()

    def release(self, revision: Digest) -> None:
        """One `want` of the revision is over."""
        self._decisions.note(Decision("release", revision))
        self.host.unpin(revision)
        if not self.host.is_pinned(revision):
            self.loads.give_up(revision)

    def hold(self, revisions: Sequence[Digest]) -> None:
        """Let exactly these never leave host memory from now on, loading those that aren't there
        after all that somebody waits for. Raises Overloaded, holding them nevertheless, when too
        many loads wait; doing it again tries again, and what failed too."""
        before, self._held = self._held, frozenset(revisions)
        for revision in self._held - before:
            self._decisions.note(Decision("hold", revision))
            self.host.pin(revision)
        try:
            for revision in revisions:
                if not self.is_here(revision):
                    self.loads.want(revision, Priority.PREFETCH, time.monotonic(), math.inf)
        finally:
            for revision in before - self._held:
                self.release(revision)
            self._start_loads()

    def held_bytes(self, but: Digest | None = None) -> int:
        """Of host memory, by held revisions, another than this."""
        there = self._held.intersection(self._weights) - {but}
        return sum(self._weights[revision].num_bytes for revision in there)

    def is_held(self, revision: Digest) -> bool:
        return revision in self._held

    def keep(self, revision: Digest, weights: Weights) -> None:
        """Weights that were just exported are likely to be sampled from: keep them, and give them a
        slot, as far as there is room."""
        if self.is_here(revision) or self._why_never(revision, weights) is not None:
            return
        if self._admit(revision, weights):
            self._fill_slot(revision, set(self.slots.resident))

    def is_here(self, revision: Digest) -> bool:
        """Whether it is in host memory, or as good as."""
        return revision in self.host or revision in self._landed

    # -- guesses ----------------------------------------------------------------------------------

    def recall(self, past: Recalled) -> None:
        """Learn what the worker before this one was asked for, and begin to bring it in."""
        if past.uses:
            self._decisions.note(Decision("recall", num_bytes=len(past.uses)))
        for revision in past.uses:
            self.host.use(revision)
        for revision, num_bytes in past.sizes.items():
            self._foretelling.note(revision, num_bytes)

    def stop_guessing(self) -> None:
        """From now on only what somebody wants is loaded."""
        self._foretelling.close()

    # -- before and after a step ------------------------------------------------------------------

    def take_in(self) -> None:
        """Give host memory to what was loaded, as far as held revisions leave room, and have the
        next ones loaded. What finds no room holds up loads: memory is bounded. What never could
        has failed."""
        for revision, weights in list(self._landed.items()):
            why_never = self._why_never(revision, weights)
            is_there = revision in self.host  # kept after an export while it was loaded
            is_over = is_there or self._is_guess_without_room(revision, weights)
            if is_over or why_never is not None or self._admit(revision, weights):
                self._foretelling.drop(revision)
                del self._landed[revision]
            if why_never is not None:
                self._on_failed(revision, why_never)
        self._start_loads()

    def fill_slots(self, wanted: Sequence[Digest]) -> None:
        """`wanted` are the revisions in host memory that could run in the coming step.

        Those without a slot queue for one; it is taken from a revision that isn't wanted, else from
        one that has had its turn.
        """
        missing = [each for each in wanted if each not in self.slots]
        still = set(missing)
        self._queue = dict.fromkeys([each for each in self._queue if each in still] + missing)
        for revision in list(self._queue):
            if not self._fill_slot(revision, set(wanted)):
                break
            del self._queue[revision]

    def ran(self, revisions: Iterable[Digest]) -> None:
        """A step used these slots."""
        for revision in revisions:
            self.slots.use(revision)
            self._steps_in_slot[revision] += 1

    def _fill_slot(self, revision: Digest, wanted: Container[Digest]) -> bool:
        """Whether there was room for it."""
        weights = self._weights[revision]
        size = self._engine.slot_bytes(weights)
        leaving = self.slots.room_for(
            size, lambda each: each in wanted and self._steps_in_slot[each] < TURN_STEPS
        )
        if leaving is None:
            return False
        for each in leaving:
            self._empty_slot(each)
        self.slots.admit(revision, size)
        self._engine.attach(revision, weights)
        return True

    def _empty_slot(self, revision: Digest) -> None:
        self.slots.evict(revision)
        self._engine.detach(revision)
        del self._steps_in_slot[revision]
        self.counters["slot_evictions"] += 1

    # -- host memory ------------------------------------------------------------------------------

    def _start_loads(self) -> None:
        while not self._landed and (revision := self.loads.start()) is not None:
            self._load(revision)
        if self.loads.is_idle and not self._landed:
            guess = self._foretelling.take(self.host.free_bytes)
            if guess is not None:
                self.counters["prefetches"] += 1
                self.loads.start_prefetch(guess)
                self._load(guess)

    def _is_guess_without_room(self, revision: Digest, weights: Weights) -> bool:
        """Whether nobody wants it, and memory isn't free any more: a guess sends nobody out."""
        is_guess = revision == self._foretelling.taken and not self.host.is_pinned(revision)
        return is_guess and weights.num_bytes > self.host.free_bytes

    def _load(self, revision: Digest) -> None:
        def load() -> tuple[Weights, float]:
            started = time.monotonic()
            return self._archive.load_revision(revision), time.monotonic() - started

        def loaded(value: Any, error: Exception | None) -> None:
            self.loads.end(revision)
            if error is None:
                weights, seconds = value
                self.counters["loads"] += 1
                self.times.learn(weights.num_bytes, seconds)
                self._decisions.note(Decision("load", revision, weights.num_bytes, seconds))
                self._landed[revision] = weights
            else:
                self._foretelling.drop(revision)
                self._on_failed(revision, error)
            self.take_in()

        self._background(load, loaded)

    def _admit(self, revision: Digest, weights: Weights) -> bool:
        """Whether there was room in host memory. Who leaves it leaves its slot too."""
        leaving = self.host.room_for(weights.num_bytes)
        if leaving is None:
            return False
        for each in leaving:
            if each in self.slots:
                self._empty_slot(each)
            self._decisions.note(Decision("evict", each))
            self.host.evict(each)
            del self._weights[each]
            self.counters["evictions"] += 1
            self._foretelling.close()
        self._decisions.note(Decision("admit", revision, weights.num_bytes))
        self.host.admit(revision, weights.num_bytes)
        self._foretelling.drop(revision)
        self._weights[revision] = weights
        return True

    def _why_never(self, revision: Digest, weights: Weights) -> Overloaded | None:
        """Why the weights could not be resident, were there nothing but what is held."""
        for needed, tier, held, setting in (
            (weights.num_bytes, self.host, self.held_bytes(but=revision), "host_bytes"),
            (self._engine.slot_bytes(weights), self.slots, 0, "serving_bytes"),
        ):
            if needed > tier.budget_bytes - held:
                beside = f" and {held} of them pinned; unpin, or" if held else ";"
                return Overloaded(
                    f"revision {revision} needs {needed} bytes of serving memory, the worker has "
                    f"{tier.budget_bytes}{beside} raise worker.{setting}"
                )
        return None
