"""Which tokens of which sequences the next sampling step computes: continuous batching.

Owns the sequences and the page book; knows neither torch nor where adapters come from. A sequence
takes part in the steps in which its revision has a slot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from openmint.engine.plan import Chunk, ChunkOutcome, SampleBatch
from openmint.scheduler.fairness import TenantClock
from openmint.scheduler.pages import PagePool, page_keys
from openmint.scheduler.sequences import DecodeText, Sequence
from openmint.scheduler.waiting import Waiting
from openmint.types import Digest, Tenant

IsResident = Callable[[Digest], bool]
"""Whether a revision is in memory, or in a slot."""
RoutesOf = Callable[[list[int], int], bytes]
"""What the first tokens in these pages chose on their way."""


class Batcher:
    """Waiting and running sequences. Running ones decode first; prefill fills what is left."""

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        step_tokens: int,
        max_running: int,
        decode: DecodeText,
        routes: RoutesOf,
    ) -> None:
        self.pool = PagePool(num_pages)
        self.page_tokens = page_tokens
        self.waiting = Waiting()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._step_tokens, self._max_running, self._decode = step_tokens, max_running, decode
        self._routes = routes
        self._stops: dict[int, int] = {}

    @property
    def capacity_tokens(self) -> int:
        """Longest sequence that the pages can hold at all."""
        return self.pool.num_pages * self.page_tokens

    def add(self, sequence: Sequence) -> None:
        sequence.keys = page_keys(sequence.revision, sequence.tokens, self.page_tokens)
        self.waiting.add(sequence)

    def ready(self, is_resident: IsResident, fairness: TenantClock) -> list[Digest]:
        """Revisions in memory that the next step could use: of those that run, then of as many that
        wait as there are places, of which some are made for tenants with less than their share."""
        self._make_room(is_resident, fairness)
        num_places, num_pages = self._max_running - len(self.running), self.pool.num_free
        could_run = list(self.running)
        for sequence in self._next_in_line(fairness):
            if sequence.revision is not None and not is_resident(sequence.revision):
                continue
            # As `_admit` counts, but for what of it may be in the prefix cache.
            num_pages -= -(-len(sequence.tokens) // self.page_tokens) + (1 if could_run else 0)
            if len(could_run) - len(self.running) == num_places or num_pages < 0:
                break
            could_run.append(sequence)
        revisions = [sequence.revision for sequence in could_run]
        return list(dict.fromkeys(each for each in revisions if each is not None))

    def plan(self, has_slot: IsResident, fairness: TenantClock) -> SampleBatch | None:
        """The next step, or None when nothing can run. Call `finish` with its outcomes."""
        budget, chunks = self._step_tokens, list[Chunk]()
        started: set[bytes] = set()
        for sequence in list(self.running):
            if sequence.revision is not None and not has_slot(sequence.revision):
                continue
            if budget and sequence in self.running and self._grow(sequence):
                chunks.append(self._chunk(sequence, budget))
                budget -= len(chunks[-1].tokens_N)
                started.update(self._pending_key(sequence))
        # One that came later may have preempted an earlier one.
        running = {sequence.sequence_id for sequence in self.running}
        chunks = [chunk for chunk in chunks if chunk.sequence_id in running]
        for sequence in self._next_in_line(fairness):
            if not budget or len(self.running) >= self._max_running:
                break
            if sequence.revision is not None and not has_slot(sequence.revision):
                continue
            if started & self._pending_key(sequence):
                continue  # its prefix is being computed in this very step; share it in the next
            if not self._admit(sequence):
                break
            chunks.append(self._chunk(sequence, budget))
            budget -= len(chunks[-1].tokens_N)
            started.update(self._pending_key(sequence))
        self._stops = {c.sequence_id: c.start + len(c.tokens_N) for c in chunks}
        return SampleBatch(tuple(chunks)) if chunks else None

    def finish(self, outcomes: list[ChunkOutcome]) -> list[tuple[Sequence, ChunkOutcome]]:
        """Absorb a step. Returns each sequence that ran; those with a `stop_reason` are done and
        their pages free."""
        by_id = {sequence.sequence_id: sequence for sequence in self.running}
        ran = []
        for outcome in outcomes:
            sequence = by_id[outcome.sequence_id]
            sequence.absorb(outcome, self._stops[outcome.sequence_id], self._decode)
            self._offer_full_pages(sequence)
            ran.append((sequence, outcome))
            if sequence.stop_reason is not None:
                if sequence.work.routes:
                    sequence.routes = self._routes(sequence.pages, sequence.num_computed)
                self.remove(sequence)
        return ran

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or cancelled sequence; its pages are free."""
        self.pool.release(sequence.pages)
        sequence.pages = []
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def _next_in_line(self, fairness: TenantClock) -> Iterator[Sequence]:
        """Those that wait, in turn, while there are places."""
        if len(self.running) >= self._max_running:
            return
        for tenant in self._in_turn(fairness):
            yield from self.waiting.of(tenant)

    def _in_turn(self, fairness: TenantClock) -> list[Tenant]:
        """Tenants that wait, furthest behind first; of equals, who has fewer places."""
        places = Counter(sequence.tenant for sequence in self.running)
        order = [(fairness.used(each), places[each], each) for each in self.waiting.tenants]
        return [tenant for _, _, tenant in sorted(order)]

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        return sequence.chunk(min(len(sequence.tokens), sequence.num_computed + budget))

    def _pending_key(self, sequence: Sequence) -> set[bytes]:
        """The key of the first full page that this sequence has still to compute."""
        index = sequence.num_computed // self.page_tokens
        if not sequence.pages and not sequence.wants_scores:
            index = len(self.pool.match(sequence.keys))
        # The last page of a prompt that ends with it is computed for its logits anyway.
        return {sequence.keys[index]} if index < len(sequence.keys) else set()

    def _admit(self, sequence: Sequence) -> bool:
        """Move a waiting sequence to running if its pages fit."""
        cached = [] if sequence.wants_scores else self.pool.match(sequence.keys)
        # At least one token must be computed, as its logits are wanted.
        cached = cached[: (len(sequence.tokens) - 1) // self.page_tokens]
        total = -(-len(sequence.tokens) // self.page_tokens)
        self.pool.share(cached)
        # One page of slack lets the running ones take their next token.
        if self.pool.num_free < total - len(cached) + (1 if self.running else 0):
            self.pool.release(cached)
            return False
        sequence.pages = cached + [self.pool.take() for _ in range(total - len(cached))]
        sequence.num_computed = len(cached) * self.page_tokens
        if not sequence.was_admitted:
            # Once preempted it finds its own pages again, which spared nobody any work.
            sequence.num_cached, sequence.was_admitted = sequence.num_computed, True
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _make_room(self, is_resident: IsResident, fairness: TenantClock) -> None:
        """Send the youngest of tenants that have more than their share back to wait, as far as
        tenants that have less want places or pages."""
        tenants = self.waiting.tenants | {sequence.tenant for sequence in self.running}
        if not self.waiting or len(tenants) < 2:
            return
        place_share = max(1, self._max_running // len(tenants))
        page_share = self.pool.num_pages // len(tenants)
        num_free_places, num_free_pages = self._max_running - len(self.running), self.pool.num_free
        for sequence in self._with_less(place_share, is_resident, fairness):
            num_free_places -= 1
            num_free_pages -= -(-len(sequence.tokens) // self.page_tokens) + 1
            while num_free_places < 0 or num_free_pages < 0:
                greedy = self._greedy(sequence.tenant, place_share, page_share, fairness)
                if greedy is None:
                    return
                num_free_places += 1
                num_free_pages += len(greedy.pages)
                sequence.made_room = True
                self._preempt(greedy)

    def _with_less(
        self, place_share: int, is_resident: IsResident, fairness: TenantClock
    ) -> list[Sequence]:
        """Sequences for which others may have to wait, until their tenants have their shares."""
        places = Counter(sequence.tenant for sequence in self.running)
        found = []
        for tenant in self._in_turn(fairness):
            num_wanted = place_share - places[tenant]
            if num_wanted > 0:
                # Each makes room at most once, else two tenants could take turns without an end.
                line = [
                    sequence
                    for sequence in self.waiting.of(tenant)
                    if not sequence.was_admitted
                    and not sequence.made_room
                    and (sequence.revision is None or is_resident(sequence.revision))
                ]
                found += line[:num_wanted]
        return found

    def _greedy(
        self, beside: Tenant, place_share: int, page_share: int, fairness: TenantClock
    ) -> Sequence | None:
        """The youngest running sequence of the tenant that most exceeds its share, if one does that
        stands behind `beside` in turn: else it would be let in again first."""
        places, pages = Counter[Tenant](), Counter[Tenant]()
        for sequence in self.running:
            places[sequence.tenant] += 1
            pages[sequence.tenant] += len(sequence.pages)
        mine = (fairness.used(beside), places[beside])
        excess = {
            tenant: max(places[tenant] / place_share, pages[tenant] / max(1, page_share))
            for tenant in places
            if tenant != beside and (fairness.used(tenant), places[tenant]) > mine
        }
        worst = max(excess, key=excess.__getitem__, default=None)
        if worst is None or excess[worst] <= 1.0:
            return None
        return next(each for each in reversed(self.running) if each.tenant == worst)

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for the newest token, preempting the youngest when pages run out."""
        while len(sequence.pages) * self.page_tokens < len(sequence.tokens):
            if self.pool.num_free:
                sequence.pages.append(self.pool.take())
            elif len(self.running) < 2:
                return False
            else:
                self._preempt(self.running[-1])
                if sequence not in self.running:
                    return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait. Its full pages are offered to whom they may serve,
        itself first: it recomputes what of them is gone when it returns."""
        sequence.keys = page_keys(sequence.revision, sequence.tokens, self.page_tokens)
        self._offer_full_pages(sequence)
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.num_computed = [], 0
        self.waiting.add_first(sequence)
        self.num_preemptions += 1

    def _offer_full_pages(self, sequence: Sequence) -> None:
        """Full pages that have a key are offered for sharing."""
        num_full = min(sequence.num_computed // self.page_tokens, len(sequence.keys))
        for page, key in zip(sequence.pages[:num_full], sequence.keys[:num_full], strict=True):
            self.pool.remember(page, key)
