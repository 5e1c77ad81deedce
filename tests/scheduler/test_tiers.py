"""Tiers on a real engine: turns in the slots, loads in order and in time, nothing held for ever."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openmint.errors import NotFound, Overloaded
from openmint.residency.decisions import Decision, Recalled, redo
from openmint.scheduler.scheduler import EXPIRY_SECONDS
from openmint.scheduler.tiers import TURN_STEPS
from openmint.scheduler.work import Cancel, Hold, SampleDelta, SampleResult, SampleWork
from openmint.store.blobs import digest_of
from openmint.types import Digest, LoraSpec, Priority, RunId, SamplingParams, Tenant
from tests.workbench import Workbench, prompt_of, random_model, train_work

SPEC = LoraSpec(4)
T = Tenant("t")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def stored(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Digest], int]:
    """A store, six revisions of one size in it, and that size in memory."""
    store = tmp_path_factory.mktemp("store")
    bench = Workbench(model, store)
    revisions = [bench.revision(f"r{i}", SPEC, i, 0.2) for i in range(6)]
    return store, revisions, bench.scheduler.stats().host_bytes // len(revisions)


Stored = tuple[Path, list[Digest], int]


def work(revision: Digest, seed: int = 0, max_tokens: int = 6, **more: Any) -> SampleWork:
    return SampleWork(
        T, revision, prompt_of(9, seed), SamplingParams(max_tokens, seed=seed), **more
    )


def answers(bench: Workbench, works: Sequence[SampleWork]) -> list[list[int]]:
    """What each says, all of them asked at once; the revision is the one that was asked for."""
    ids = [bench.submit(each) for each in works]
    bench.run()
    found = []
    for work_id, each in zip(ids, works, strict=True):
        result: SampleResult = bench.result(work_id)
        assert result.revision == each.revision
        found.append(result.sequences[0].tokens_N.tolist())
    assert_nothing_held(bench)
    return found


def hold(bench: Workbench, *revisions: Digest) -> None:
    """As a worker is told to, once all loads are over."""
    bench.scheduler.hold(Hold(revisions))
    bench.run()
    bench.scheduler.step()


def assert_nothing_held(bench: Workbench, *pinned: Digest) -> None:
    """Nothing but the pinned, which are in memory."""
    tiers = bench.scheduler._tiers
    assert dict(tiers.host._pins) == dict.fromkeys(pinned, 1)
    assert not tiers.slots._pins
    assert set(pinned) <= set(tiers.host.resident)
    for tier in (tiers.host, tiers.slots):
        tier.check_integrity()
        assert tier.used_bytes <= tier.budget_bytes
    assert set(tiers.slots.resident) <= set(tiers.host.resident)
    assert set(tiers.slots.resident) == set(bench.engine._slots)
    assert set(tiers.host.resident) == set(tiers._weights)
    assert (tiers.loads.num_running, len(tiers._landed)) == (0, 0)


def test_more_revisions_than_slots_take_turns_within_one_wave(model: Path, stored: Stored) -> None:
    store, revisions, size = stored
    works = [work(each, i, 3 * TURN_STEPS, stream=True) for i, each in enumerate(revisions)]
    roomy = answers(Workbench(model, store), works)
    bench = Workbench(model, store, serving_bytes=int(2.5 * size))
    assert answers(bench, works) == roomy
    # Everybody had a first turn before anybody had all of theirs.
    spoken = [delta.work_id for delta in bench.deltas if isinstance(delta.delta, SampleDelta)]
    firsts = [spoken.index(work_id) for work_id in set(spoken)]
    lasts = [len(spoken) - 1 - spoken[::-1].index(work_id) for work_id in set(spoken)]
    assert max(firsts) < min(lasts)
    longest = max(len(list(group)) for _, group in itertools.groupby(spoken))
    assert longest < 3 * TURN_STEPS
    assert bench.scheduler.stats().revision_loads == len(revisions)


def test_turns_also_end_when_pages_are_short(model: Path, stored: Stored) -> None:
    store, revisions, size = stored
    works = [work(each, i, 40) for i, each in enumerate(revisions)]
    roomy = answers(Workbench(model, store), works)
    tight = Workbench(model, store, serving_bytes=int(1.5 * size), page_tokens=4)
    tight.scheduler._batcher.pool.__init__(20)  # type: ignore[misc]
    assert answers(tight, works) == roomy


def test_host_memory_that_holds_few_serves_many_in_turn(model: Path, stored: Stored) -> None:
    store, revisions, size = stored
    works = [work(each, i) for i in range(3) for each in revisions]
    bench = Workbench(model, store, host_bytes=int(1.5 * size))
    assert answers(bench, works) == answers(Workbench(model, store), works)
    stats = bench.scheduler.stats()
    assert stats.num_resident_revisions == 1
    assert stats.revision_evictions == stats.revision_loads - 1


def test_the_largest_settings_that_hold_nothing_are_named(model: Path, stored: Stored) -> None:
    store, revisions, size = stored
    for setting in ("host_bytes", "serving_bytes"):
        bench = Workbench(model, store, **{setting: size - 1})
        with pytest.raises(Overloaded, match=rf"serving memory.*raise worker\.{setting}"):
            bench.do(work(revisions[0]))
        assert_nothing_held(bench)


class Later(Workbench):
    """Background jobs run when the test says so."""

    def __init__(self, *args: Any, **config: Any) -> None:
        self.jobs: list[Callable[[], None]] = []
        super().__init__(*args, **config)

    def _background(
        self, job: Callable[[], Any], then: Callable[[Any, Exception | None], None]
    ) -> None:
        self.jobs.append(lambda: super(Later, self)._background(job, then))

    def finish_jobs(self) -> None:
        for job in self.jobs:
            job()
        self.jobs.clear()
        for ended in self._ended:
            ended()
        self._ended.clear()


def test_loads_run_a_few_at_a_time_in_the_order_of_priorities(model: Path, stored: Stored) -> None:
    store, revisions, _ = stored
    bench = Later(model, store, parallel_loads=2)
    loaded: list[Digest] = []
    load = bench.scheduler._archive.load_revision
    bench.scheduler._tiers._archive.load_revision = lambda each: (  # type: ignore[method-assign]
        loaded.append(each) or load(each)
    )
    for i, each in enumerate(revisions):
        priority = Priority.INTERACTIVE if i == 5 else Priority.BATCH
        bench.submit(work(each, priority=priority))
    assert bench.scheduler.stats().num_waiting_loads == 4
    while bench.jobs:
        assert len(bench.jobs) <= 2
        bench.finish_jobs()
        bench.scheduler.step()
    assert loaded == [*revisions[:2], revisions[5], *revisions[2:5]]
    bench.run()
    assert_nothing_held(bench)


def test_what_cannot_be_loaded_in_time_is_refused_at_once(model: Path, stored: Stored) -> None:
    store, revisions, size = stored
    bench = Workbench(model, store)
    bench.scheduler._tiers.times.learn(size, 30.0)
    with pytest.raises(Overloaded, match="not in memory") as refused:
        bench.result(bench.submit(work(revisions[0], load_seconds=10.0)))
    assert 19.0 < refused.value.retry_after_seconds < 21.0
    assert bench.scheduler.stats().revision_loads == 0
    assert_nothing_held(bench)
    # In memory, nothing has to be loaded, and no deadline matters.
    bench.do(work(revisions[0], load_seconds=60.0))
    bench.scheduler._tiers.times.learn(size, 30.0)
    bench.do(work(revisions[0], load_seconds=10.0))


def test_who_still_waits_at_the_deadline_is_refused_then(model: Path, stored: Stored) -> None:
    store, revisions, _ = stored
    bench = Later(model, store)
    bench.scheduler._tiers.times.learn(1, 1e-6)
    late, patient = (
        bench.submit(work(revisions[0], load_seconds=seconds)) for seconds in (0.1, 60.0)
    )
    bench.scheduler.step()
    assert late not in bench.answers
    time.sleep(0.1 + EXPIRY_SECONDS)
    bench.scheduler.step()
    with pytest.raises(Overloaded, match=r"not in memory after 0\.[1-9] s"):
        bench.result(late)
    assert patient not in bench.answers
    assert bench.scheduler.stats().deadlines_missed == 1
    bench.finish_jobs()
    bench.run()
    assert bench.result(patient).revision == revisions[0]
    assert_nothing_held(bench)


def test_a_load_that_nobody_waits_for_any_more_is_not_made(model: Path, stored: Stored) -> None:
    store, revisions, _ = stored
    bench = Later(model, store, parallel_loads=1)
    ids = [bench.submit(work(each)) for each in revisions[:3]]
    for work_id in ids:
        bench.scheduler.cancel(Cancel(work_id))
    while bench.jobs:
        bench.finish_jobs()
        bench.scheduler.step()
    assert bench.scheduler.stats().revision_loads == 1
    assert_nothing_held(bench)


def test_a_kept_export_takes_no_more_than_its_vector(model: Path, tmp_path: Path) -> None:
    """Not what training laid out for the run's weights, which would go on unseen."""
    bench = Workbench(model, tmp_path / "store", dtype="bfloat16")
    digest = bench.revision("r", SPEC, 0)
    run = bench.engine.runs[RunId("r")]
    bench.do(train_work(RunId("r"), "cross_entropy", (7, 9), 0))
    kept = bench.scheduler._tiers._weights[digest]
    assert kept is not run.weights
    assert not kept._tiles  # type: ignore[attr-defined]
    assert kept.num_bytes == bench.scheduler.stats().host_bytes


def test_a_thousand_who_want_one_cold_revision_cause_one_load(model: Path, stored: Stored) -> None:
    store, revisions, _ = stored
    bench = Workbench(model, store)
    found = answers(bench, [work(revisions[0], seed=1, max_tokens=2) for _ in range(1000)])
    assert len({tuple(each) for each in found}) == 1
    assert bench.scheduler.stats().revision_loads == 1


def test_a_load_that_fails_teaches_the_estimate_nothing(model: Path, stored: Stored) -> None:
    store, _, _ = stored
    bench = Workbench(model, store)
    before = bench.scheduler._tiers.times.mean_seconds
    with pytest.raises(NotFound):
        bench.do(work(digest_of(b"never stored")))
    assert bench.scheduler._tiers.times.mean_seconds == before
    assert_nothing_held(bench)


def test_pinned_revisions_outlast_a_flood_larger_than_memory(model: Path, stored: Stored) -> None:
    store, revisions, size = stored
    bench = Workbench(model, store, host_bytes=int(3.5 * size))
    hold(bench, *revisions[:2])
    assert bench.scheduler.stats().revision_loads == 2
    for _ in range(20):
        for each in revisions[2:]:
            bench.do(work(each, max_tokens=2))
    before = bench.scheduler.stats().revision_loads
    assert before > 2 + len(revisions[2:])
    for each in revisions[:2]:
        assert bench.do(work(each, load_seconds=0.0)).revision == each
    assert bench.scheduler.stats().revision_loads == before
    assert bench.scheduler.stats().pinned_bytes == 2 * size
    assert_nothing_held(bench, *revisions[:2])


def test_holding_is_a_set_and_saying_it_again_changes_nothing(model: Path, stored: Stored) -> None:
    store, revisions, _ = stored
    bench = Workbench(model, store)
    for _ in range(3):
        hold(bench, *revisions[:2])
    assert bench.scheduler.stats().revision_loads == 2
    hold(bench, *revisions[1:3])
    assert_nothing_held(bench, *revisions[1:3])
    kinds = [(each.kind, each.revision) for each in bench.decisions.all]
    assert kinds.index(("hold", revisions[2])) < kinds.index(("release", revisions[0]))
    hold(bench)
    assert_nothing_held(bench)


def test_what_is_held_is_loaded_after_what_somebody_waits_for(model: Path, stored: Stored) -> None:
    store, revisions, _ = stored
    bench = Later(model, store, parallel_loads=1)
    bench.scheduler.hold(Hold(tuple(revisions[:3])))
    bench.submit(work(revisions[4], priority=Priority.BATCH))
    bench.submit(work(revisions[2]))
    while bench.jobs:
        bench.finish_jobs()
        bench.scheduler.step()
    loaded = [each.revision for each in bench.decisions.all if each.kind == "load"]
    assert loaded == [revisions[i] for i in (0, 2, 4, 1)]
    bench.run()
    assert_nothing_held(bench, *revisions[:3])


def test_a_load_that_fails_is_tried_again_and_holds_up_nobody(model: Path, stored: Stored) -> None:
    store, revisions, _ = stored
    bench = Workbench(model, store)
    archive = bench.scheduler._tiers._archive
    load, broken = archive.load_revision, {revisions[0]}

    def load_unless_broken(revision: Digest) -> Any:
        if revision in broken:
            raise NotFound("not there")
        return load(revision)

    archive.load_revision = load_unless_broken  # type: ignore[method-assign]
    hold(bench, *revisions[:2])
    assert bench.scheduler.stats().resident_revisions == (revisions[1],)
    broken.clear()
    hold(bench, *revisions[:2])
    assert_nothing_held(bench, *revisions[:2])


def test_a_full_queue_of_loads_keeps_the_rest_for_the_next_time(
    model: Path, stored: Stored
) -> None:
    store, revisions, _ = stored
    bench = Workbench(model, store, parallel_loads=1, waiting_loads=1)
    hold(bench, *revisions[:3])
    assert len(bench.scheduler.stats().resident_revisions) == 1
    for _ in range(3):
        hold(bench, *revisions[:3])
    assert_nothing_held(bench, *revisions[:3])


def test_what_finds_no_room_beside_pins_is_refused_and_stops_no_other_load(
    model: Path, stored: Stored
) -> None:
    store, revisions, size = stored
    wide = Workbench(model, store).revision("wide", LoraSpec(4 * SPEC.rank), 7)
    bench = Workbench(model, store, host_bytes=5 * size)
    assert bench.do(work(wide, max_tokens=2)).revision == wide
    hold(bench, *revisions[:2])
    with pytest.raises(Overloaded, match=rf"{2 * size} of them pinned; unpin, or raise"):
        bench.do(work(wide))
    assert bench.do(work(revisions[3])).revision == revisions[3]
    assert_nothing_held(bench, *revisions[:2])
    hold(bench)
    assert bench.do(work(wide)).revision == wide


def test_what_an_export_brings_while_it_is_loaded_is_there_once(
    model: Path, stored: Stored
) -> None:
    store, revisions, size = stored
    bench = Later(model, store)
    bench.scheduler.hold(Hold((revisions[0],)))
    tiers = bench.scheduler._tiers
    tiers.keep(revisions[0], tiers._archive.load_revision(revisions[0]))
    bench.finish_jobs()
    bench.scheduler.step()
    assert tiers.host.used_bytes == size
    assert_nothing_held(bench, revisions[0])


def test_random_lives_of_many_revisions_keep_the_books(model: Path, stored: Stored) -> None:
    store, revisions, size = stored
    numbers = np.random.default_rng(0)
    bench = Workbench(
        model, store, host_bytes=int(4.5 * size), serving_bytes=int(2.5 * size), page_tokens=4
    )
    live, wanted = list[int](), dict[int, Digest]()
    for step in range(600):
        match int(numbers.integers(5)):
            case 4 if numbers.random() < 0.2:
                drawn = numbers.choice(len(revisions), int(numbers.integers(3)), replace=False)
                bench.scheduler.hold(Hold(tuple(revisions[i] for i in drawn)))
            case 0 if len(live) < 30:
                revision = revisions[int(numbers.integers(len(revisions)))]
                work_id = bench.submit(work(revision, step, int(numbers.integers(1, 30))))
                live.append(work_id)
                wanted[work_id] = revision
            case 1 if live and numbers.random() < 0.2:
                work_id = live.pop(int(numbers.integers(len(live))))
                bench.scheduler.cancel(Cancel(work_id))
            case _:
                while bench._ended:
                    bench._ended.pop(0)()
                bench.scheduler.step()
        tiers = bench.scheduler._tiers
        assert tiers.slots.used_bytes <= tiers.slots.budget_bytes
        assert tiers.host.used_bytes <= tiers.host.budget_bytes
    bench.run()
    for work_id in live:
        assert bench.result(work_id).revision == wanted[work_id]
    hold(bench)
    assert_nothing_held(bench)
    # The log tells all of it: done over, it comes to the same evictions.
    start = Decision("start", num_bytes=int(4.5 * size))
    pairs = list(redo([start, *bench.decisions.all]))
    assert len([gone for gone, _ in pairs if gone]) > 5
    assert all(gone == again for gone, again in pairs)


def often(revisions: Sequence[Digest], size: int) -> Recalled:
    """A past in which the first was used once, the second twice, and so on, in turn."""
    uses = [each for i in range(len(revisions)) for each in revisions[i:]]
    return Recalled(uses * 10, dict.fromkeys(revisions, size))


def loads_of(bench: Workbench) -> list[Digest]:
    return [each.revision for each in bench.decisions.all if each.kind == "load"]


def idle(bench: Workbench) -> None:
    """Steps until there is nothing left to do, not even guesses."""
    bench.scheduler.step()
    bench.run()


def test_what_was_asked_for_before_comes_back_by_itself_the_likeliest_first(
    model: Path, stored: Stored
) -> None:
    store, revisions, size = stored
    bench = Workbench(model, store, host_bytes=int(4.5 * size))
    bench.scheduler.recall(often(revisions, size))
    idle(bench)
    assert loads_of(bench) == revisions[:1:-1]  # as many as fit
    stats = bench.scheduler.stats()
    assert (stats.revision_prefetches, stats.revision_evictions) == (4, 0)
    bench.do(work(revisions[-1], load_seconds=0.0))
    assert bench.scheduler.stats().revision_loads == 4
    assert_nothing_held(bench)


def test_what_is_asked_for_now_goes_before_guesses_which_are_one_at_a_time(
    model: Path, stored: Stored
) -> None:
    store, revisions, size = stored
    bench = Later(model, store, parallel_loads=1)
    bench.scheduler.recall(often(revisions, size))
    bench.scheduler.step()
    bench.scheduler.step()
    assert len(bench.jobs) == 1
    ids = [bench.submit(work(each, max_tokens=1)) for each in revisions[:2]]
    assert len(bench.jobs) == 2  # the guess takes no place
    while bench.jobs:
        bench.finish_jobs()
        bench.scheduler.step()
    assert loads_of(bench) == [revisions[5], *revisions[:2], *revisions[4:1:-1]]
    bench.run()
    assert [bench.result(each).revision for each in ids] == revisions[:2]
    assert_nothing_held(bench)


def test_a_guess_sends_nobody_out_of_memory(model: Path, stored: Stored) -> None:
    store, revisions, size = stored
    bench = Later(model, store, host_bytes=int(1.5 * size))
    bench.scheduler.recall(often(revisions, size))
    bench.scheduler.step()
    bench.submit(work(revisions[0], max_tokens=1))
    guess, wanted = bench.jobs
    bench.jobs[:] = [wanted, guess]  # memory fills before the guess is there
    while bench.jobs:
        bench.finish_jobs()
        bench.scheduler.step()
    bench.run()
    assert loads_of(bench) == [revisions[0], revisions[5]]
    assert bench.scheduler.stats().resident_revisions == (revisions[0],)
    assert bench.scheduler.stats().revision_evictions == 0
    assert_nothing_held(bench)


def test_a_guess_that_somebody_wants_by_then_is_kept(model: Path, stored: Stored) -> None:
    store, revisions, size = stored
    bench = Later(model, store, host_bytes=int(1.5 * size))
    bench.submit(work(revisions[0], max_tokens=1))
    bench.finish_jobs()
    bench.run()
    bench.scheduler.recall(often(revisions[1:2], size // 2))  # it is larger than was known
    bench.scheduler.step()
    work_id = bench.submit(work(revisions[1], max_tokens=1))
    assert len(bench.jobs) == 1
    bench.finish_jobs()
    bench.run()
    assert bench.result(work_id).revision == revisions[1]
    assert_nothing_held(bench)


def test_a_guess_that_fails_is_not_made_again_until_it_is_used(model: Path, stored: Stored) -> None:
    store, _, size = stored
    gone = digest_of(b"collected since")
    bench = Workbench(model, store)
    bench.scheduler.recall(Recalled([gone] * 9, {gone: size}))
    for _ in range(3):
        idle(bench)
    assert bench.scheduler.stats().revision_prefetches == 1
    with pytest.raises(NotFound):
        bench.do(work(gone))
    idle(bench)
    assert bench.scheduler.stats().revision_prefetches == 1
    assert_nothing_held(bench)


def test_memory_that_was_full_once_is_not_guessed_into(model: Path, stored: Stored) -> None:
    store, revisions, size = stored
    bench = Workbench(model, store, host_bytes=int(2.5 * size))
    bench.scheduler.recall(often(revisions, size))
    idle(bench)
    bench.do(work(revisions[0], max_tokens=1))
    assert bench.scheduler.stats().revision_evictions == 1
    tiers = bench.scheduler._tiers
    tiers.host.evict(tiers.host.resident[0])
    idle(bench)
    assert bench.scheduler.stats().revision_prefetches == 2


def test_a_worker_that_is_about_to_end_begins_no_guess(model: Path, stored: Stored) -> None:
    store, revisions, size = stored
    bench = Later(model, store)
    bench.scheduler.recall(often(revisions, size))
    bench.scheduler.step()
    bench.scheduler.stop_guessing()
    bench.finish_jobs()
    bench.scheduler.step()
    assert (bench.jobs, bench.scheduler.is_idle) == ([], True)


def test_lives_that_begin_with_a_past_are_done_over_the_same(model: Path, stored: Stored) -> None:
    store, revisions, size = stored
    numbers = np.random.default_rng(0)
    budget = int(2.5 * size)
    log = [Decision("start", num_bytes=budget)]
    past = Recalled()
    for life in range(3):
        bench = Workbench(model, store, host_bytes=budget)
        bench.scheduler.recall(past)
        idle(bench)
        for _ in range(15):
            index = min(int(numbers.geometric(0.4)) - 1, 5)
            bench.do(work(revisions[index], max_tokens=1))
        log += [Decision("start", num_bytes=budget)] * bool(life) + bench.decisions.all
        uses = [each.revision for each in log if each.kind == "want"]
        past = Recalled(uses, dict.fromkeys(uses, size))
        assert (bench.scheduler.stats().revision_prefetches > 0) == bool(life)
    pairs = list(redo(log))
    assert len([gone for gone, _ in pairs if gone]) > 5
    assert all(gone == again for gone, again in pairs)
