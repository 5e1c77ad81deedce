"""Continuous batching with an engine that only draws numbers: who runs, how far, on which pages."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np

from openmint.engine.plan import ChunkOutcome, SampleBatch
from openmint.scheduler.batcher import Batcher
from openmint.scheduler.fairness import TenantClock
from openmint.scheduler.sequences import Sequence
from openmint.scheduler.work import SampleWork
from openmint.types import Digest, SamplingParams, Tenant

PAGE = 4


class Loop:
    """The sampling half of a worker: a batcher, a clock and a make-believe engine.

    The engine's cache holds, for each page position, the tokens whose keys and values would be
    there, so a sequence that is given a wrong or stale page is caught.
    """

    def __init__(self, num_pages: int = 64, step_tokens: int = 32, max_running: int = 8) -> None:
        decode = str
        self.batcher = Batcher(num_pages, PAGE, step_tokens, max_running, decode, lambda *_: b"")
        self.clock, self.step_tokens = TenantClock(), step_tokens
        self.resident: set[Digest] = set()
        self.cache: dict[tuple[int, int], tuple[Digest | None, tuple[int, ...]]] = {}
        self.done: list[Sequence] = []
        self.num_computed: Counter[int] = Counter()
        self.num_steps = self._next_id = 0

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        tenant: str = "t",
        revision: Digest | None = None,
        prompt_logprobs: bool = False,
    ) -> Sequence:
        self._next_id += 1
        work = SampleWork(
            Tenant(tenant),
            revision,
            np.array(prompt),
            SamplingParams(max_tokens),
            prompt_logprobs=prompt_logprobs,
        )
        busy = {s.tenant for s in (*self.batcher.waiting, *self.batcher.running)}
        self.clock.arrive(Tenant(tenant), busy)
        sequence = Sequence(self._next_id, self._next_id, 0, work, list(prompt), len(prompt))
        self.batcher.add(sequence)
        return sequence

    def step(self) -> SampleBatch | None:
        """One step, or None when nothing could run."""
        self.batcher.ready(self.resident.__contains__, self.clock)
        batch = self.batcher.plan(self.resident.__contains__, self.clock)
        self.batcher.pool.check_integrity()
        if batch is None:
            return None
        self.num_steps += 1
        assert sum(len(chunk.tokens_N) for chunk in batch.chunks) <= self.step_tokens
        running = {s.sequence_id: s for s in self.batcher.running}
        outcomes = []
        for chunk in batch.chunks:
            sequence = running[chunk.sequence_id]
            self.clock.charge(sequence.tenant, len(chunk.tokens_N))
            self.num_computed[chunk.sequence_id] += len(chunk.tokens_N)
            stop = chunk.start + len(chunk.tokens_N)
            for at in range(chunk.start, stop):
                content = (chunk.revision, tuple(sequence.tokens[: at + 1]))
                self.cache[chunk.pages[at // PAGE], at % PAGE] = content
        for chunk in batch.chunks:
            # Every chunk sees its whole past, as if all had written before any read.
            tokens, stop = running[chunk.sequence_id].tokens, chunk.start + len(chunk.tokens_N)
            for at in range(stop):
                seen = self.cache[chunk.pages[at // PAGE], at % PAGE]
                assert seen == (chunk.revision, tuple(tokens[: at + 1])), "foreign keys and values"
            token = next_token(tokens) if chunk.draw else None
            outcomes.append(
                ChunkOutcome(chunk.sequence_id, chunk.revision, token, -1.0, None, None)
            )
        for sequence, _ in self.batcher.finish(outcomes):
            if sequence.stop_reason is not None:
                self.done.append(sequence)
        self.batcher.pool.check_integrity()
        return batch

    def run(self) -> None:
        while self.step() is not None:
            assert self.num_steps < 5000
        assert not self.batcher.running

    def assert_empty(self) -> None:
        assert self.batcher.pool.num_used == 0
        assert not self.batcher.running
        assert not self.batcher.waiting


def next_token(tokens: list[int]) -> int:
    """What the make-believe model says after these tokens."""
    return int.from_bytes(hashlib.sha256(repr(tokens).encode()).digest()[:2], "little")


def completion(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 1000, length)]


def test_a_long_prompt_is_computed_in_chunks_of_the_step() -> None:
    loop = Loop(step_tokens=10)
    sequence = loop.add(prompt_of(35), max_tokens=2)
    sizes = [[len(chunk.tokens_N) for chunk in batch.chunks] for batch in iter(loop.step, None)]
    assert sizes == [[10], [10], [10], [5], [1]]
    assert sequence.tokens == completion(prompt_of(35), 2)
    loop.assert_empty()


def test_running_sequences_go_on_while_a_prompt_is_computed() -> None:
    loop = Loop(step_tokens=10)
    first = loop.add(prompt_of(3, 1), max_tokens=8)
    loop.step()
    loop.add(prompt_of(40, 2))
    for num_tokens in range(2, 6):
        batch = loop.step()
        assert batch is not None
        assert [len(chunk.tokens_N) for chunk in batch.chunks] == [1, 9]
        assert first.num_completion == num_tokens


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    loop = Loop(step_tokens=64, max_running=16)
    prompt = prompt_of(21)
    group = [loop.add(prompt, max_tokens=1) for _ in range(8)]
    loop.run()
    first, *others = group
    assert (first.num_cached, loop.num_computed[first.sequence_id]) == (0, 21)
    for follower in others:
        assert follower.num_cached == 20
        assert loop.num_computed[follower.sequence_id] == 1
    assert len(loop.done) == 8
    loop.assert_empty()


def test_equal_prompts_longer_than_a_step_are_computed_once_too() -> None:
    loop = Loop(step_tokens=8)
    prompt = prompt_of(30)
    group = [loop.add(prompt, max_tokens=1) for _ in range(4)]
    loop.run()
    assert sum(loop.num_computed.values()) <= 30 + 3 * 8
    assert {tuple(s.tokens) for s in group} == {tuple(completion(prompt, 1))}


def test_another_revision_shares_nothing() -> None:
    loop = Loop()
    one, two = Digest("sha256:1"), Digest("sha256:2")
    loop.resident = {one, two}
    for revision in (one, two, None):
        assert loop.add(prompt_of(17), revision=revision)
        loop.run()
    assert [s.num_cached for s in loop.done] == [0, 0, 0]
    again = loop.add(prompt_of(17), revision=two)
    loop.run()
    assert again.num_cached == 16


def test_a_prompt_to_be_scored_is_computed_whole() -> None:
    loop = Loop()
    loop.add(prompt_of(17))
    loop.run()
    scored = loop.add(prompt_of(17), prompt_logprobs=True)
    loop.run()
    assert (scored.num_cached, loop.num_computed[scored.sequence_id]) == (0, 17 + 3)


def test_a_revision_that_is_not_resident_holds_up_nobody_else() -> None:
    loop = Loop()
    cold = Digest("sha256:cold")
    waiting, other = loop.add(prompt_of(9), revision=cold), loop.add(prompt_of(9, 1))
    loop.run()
    assert loop.done == [other]
    assert list(loop.batcher.waiting) == [waiting]
    loop.resident.add(cold)
    loop.run()
    assert loop.done == [other, waiting]


def test_within_a_tenant_first_come_is_first_served() -> None:
    loop = Loop(max_running=2, step_tokens=16)
    sequences = [loop.add(prompt_of(6, seed), max_tokens=3) for seed in range(9)]
    loop.run()
    assert loop.done == sequences


def test_a_flooding_tenant_does_not_starve_another() -> None:
    loop = Loop(max_running=4, step_tokens=32)
    for seed in range(60):
        loop.add(prompt_of(8, seed), max_tokens=10, tenant="flood")
    loop.step()
    modest = [loop.add(prompt_of(8, 1000 + i), max_tokens=5, tenant="modest") for i in range(3)]
    before = loop.num_steps
    while not set(modest) <= set(loop.done):
        loop.step()
    # At most: the running ones end, then the modest prompts and tokens take their turns.
    assert loop.num_steps - before <= 10 + 2 * (1 + 5)
    assert len(loop.done) < 15
    loop.run()
    assert len(loop.done) == 63


def test_two_flooding_tenants_get_like_shares_whatever_their_prompts() -> None:
    loop = Loop(num_pages=400, max_running=6, step_tokens=64)
    for seed in range(150):
        loop.add(prompt_of(60, seed), max_tokens=4, tenant="long")
        loop.add(prompt_of(4, 1000 + seed), max_tokens=4, tenant="short")
        loop.add(prompt_of(4, 3000 + seed), max_tokens=4, tenant="short")
    used: Counter[str] = Counter()
    for _ in range(120):
        batch = loop.step()
        assert batch is not None
        assert any(s.tenant == "short" for s in loop.batcher.waiting), "one tenant has run dry"
        tenant_of = {s.sequence_id: s.tenant for s in (*loop.batcher.running, *loop.done)}
        for chunk in batch.chunks:
            used[tenant_of[chunk.sequence_id]] += len(chunk.tokens_N)
    assert 0.75 < used["long"] / used["short"] < 1.35


def test_a_sequence_preempted_reports_what_it_spared_not_its_own_pages() -> None:
    loop = Loop(num_pages=9)
    sequences = [loop.add(prompt_of(9, seed), max_tokens=16) for seed in range(3)]
    loop.run()
    assert loop.batcher.num_preemptions > 0
    for seed, sequence in enumerate(sequences):
        assert sequence.num_cached == 0
        assert sequence.tokens == completion(prompt_of(9, seed), 16)
    loop.assert_empty()


def test_cancelling_frees_the_pages_while_waiting_prefilling_and_decoding() -> None:
    loop = Loop(step_tokens=8, max_running=2)
    decoding = loop.add(prompt_of(4, 1), max_tokens=50)
    loop.step()
    loop.step()
    prefilling, waiting = loop.add(prompt_of(40, 2)), loop.add(prompt_of(4, 3))
    loop.step()
    assert decoding.num_completion > 0
    assert 0 < prefilling.num_computed < 40
    assert waiting in loop.batcher.waiting
    for sequence in (waiting, prefilling, decoding):
        loop.batcher.remove(sequence)
        loop.batcher.pool.check_integrity()
    loop.assert_empty()
    assert loop.step() is None


def test_random_use_ends_with_every_page_free_and_every_answer_right() -> None:
    for seed in range(40):
        numbers = np.random.default_rng(seed)
        loop = Loop(
            num_pages=int(numbers.integers(8, 40)),
            step_tokens=int(numbers.integers(3, 40)),
            max_running=int(numbers.integers(1, 9)),
        )
        revisions = [None, Digest("sha256:1"), Digest("sha256:2")]
        live: list[Sequence] = []
        for _ in range(150):
            match int(numbers.integers(8)):
                case 0 | 1:
                    # Few beginnings, so that prefixes are shared.
                    prompt = prompt_of(20, int(numbers.integers(3)))[: numbers.integers(1, 21)]
                    most = int(numbers.integers(1, 11))
                    revision = revisions[int(numbers.integers(3))]
                    live.append(loop.add(prompt, most, str(numbers.integers(3)), revision))
                case 2 if live:
                    victim = live.pop(int(numbers.integers(len(live))))
                    if victim.stop_reason is None:
                        loop.batcher.remove(victim)
                case 3 if revisions[1] not in loop.resident:
                    loop.resident |= {Digest("sha256:1")}
                case _:
                    loop.step()
        loop.resident |= {Digest("sha256:1"), Digest("sha256:2")}
        loop.run()
        loop.assert_empty()
        for sequence in live:
            assert sequence.stop_reason == "length"
            prompt, most = sequence.tokens[: sequence.num_prompt], sequence.work.params.max_tokens
            assert sequence.tokens == completion(prompt, most)
            assert sequence.num_cached < sequence.num_prompt


def test_a_tenant_with_little_gets_a_place_of_one_with_much() -> None:
    """Every place is taken by long sequences of another; the newcomer waits for none of them."""
    loop = Loop(num_pages=200, max_running=8)
    for _ in range(20):
        loop.add([1, 2, 3], max_tokens=60, tenant="flood")
    for _ in range(5):
        loop.step()
    mine = loop.add([4, 5, 6], max_tokens=4, tenant="mine")
    for _ in range(6):
        loop.step()
    assert mine in loop.done
    assert loop.batcher.num_preemptions == 1


def test_a_tenant_with_little_gets_pages_of_one_with_much() -> None:
    loop = Loop(num_pages=12, max_running=8)
    for _ in range(3):
        loop.add([1, 2, 3], max_tokens=13, tenant="flood")
    for _ in range(12):
        loop.step()
    assert loop.batcher.pool.num_free == 0
    mine = loop.add([4, 5, 6], max_tokens=3, tenant="mine")
    for _ in range(4):
        loop.step()
    assert mine in loop.done


def test_tenants_at_their_shares_take_nothing_from_each_other() -> None:
    loop = Loop(num_pages=200, max_running=8)
    for tenant in ("a", "b") * 12:
        loop.add([1, 2, 3], max_tokens=10, tenant=tenant)
    while loop.step():
        pass
    assert loop.batcher.num_preemptions <= 4
    assert len(loop.done) == 24


def test_a_newcomer_takes_its_place_in_the_very_next_step() -> None:
    """Its clock starts where the busy tenant's is; of equals, who has fewer places goes first."""
    loop = Loop(num_pages=200, max_running=8)
    for _ in range(20):
        loop.add([1, 2, 3], max_tokens=60, tenant="flood")
    for _ in range(5):
        loop.step()
    mine = loop.add([4, 5, 6], max_tokens=4, tenant="mine")
    loop.step()
    assert mine in loop.batcher.running


def test_who_made_place_for_another_finds_its_pages_when_it_returns() -> None:
    loop = Loop(num_pages=200, step_tokens=100, max_running=4)
    floods = [loop.add(prompt_of(9, seed), max_tokens=60, tenant="flood") for seed in range(4)]
    for _ in range(30):
        loop.step()
    loop.add([4, 5, 6], max_tokens=4, tenant="mine")
    loop.run()
    assert loop.batcher.num_preemptions == 1
    for sequence in floods:
        again = loop.num_computed[sequence.sequence_id] - (len(sequence.tokens) - 1)
        assert again <= PAGE
    loop.assert_empty()
