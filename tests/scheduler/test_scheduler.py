"""The worker's loop on a real engine: every command is answered once, whatever goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmint.engine.plan import MicroBatch, SampleBatch
from openmint.errors import (
    EngineFailed,
    InvalidRequest,
    NonFinite,
    NotFound,
    OpenMintError,
    Overloaded,
    StoreFailed,
)
from openmint.scheduler.scheduler import Scheduler
from openmint.scheduler.work import (
    Cancel,
    Command,
    CreateRun,
    DropRun,
    ExportRun,
    OptimWork,
    RestoreRun,
    RunState,
    SampleWork,
    SaveRun,
    ScoreWork,
    TrainWork,
)
from openmint.store.blobs import digest_of
from openmint.types import (
    AdamParams,
    Datum,
    Digest,
    LoraSpec,
    LossSpec,
    RunId,
    SamplingParams,
    Tenant,
)
from tests.store.made import damage
from tests.workbench import Workbench, prompt_of, random_model, train_work

T = Tenant("t")
SPEC = LoraSpec(4)
LENGTHS = (7, 12, 5)
RUN = RunId("r")
NOWHERE = RunId("nowhere")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture
def bench(model: Path, tmp_path: Path) -> Workbench:
    return Workbench(model, tmp_path / "store", page_tokens=4)


def sample_work(
    seed: int = 0, revision: Digest | None = None, max_tokens: int = 6, **more: Any
) -> SampleWork:
    return SampleWork(
        T, revision, prompt_of(9, seed), SamplingParams(max_tokens, seed=seed), **more
    )


def optim(seq: int = 0, **more: Any) -> OptimWork:
    return OptimWork(RUN, T, AdamParams(learning_rate=1e-2), seq, **more)


def train(seed: int, run: RunId = RUN, **more: Any) -> TrainWork:
    return train_work(run, "cross_entropy", LENGTHS, seed, **more)


def assert_at_rest(bench: Workbench) -> None:
    bench.run()
    stats = bench.scheduler.stats()
    assert (stats.kv_pages_used, stats.num_running_sequences, stats.num_waiting_train) == (0, 0, 0)
    assert stats.num_waiting_sequences == 0
    bench.scheduler._batcher.pool.check_integrity()
    for tier in (bench.scheduler._tiers.host, bench.scheduler._tiers.slots):
        tier.check_integrity()
        assert not tier._pins


def state_of(bench: Workbench, run: RunId = RUN) -> tuple[torch.Tensor, ...]:
    live = bench.engine.runs[run]
    state = live.state
    return state.params_P, state.exp_avg_P, state.exp_avg_sq_P, live.grads_P


def assert_same_state(ours: Workbench, theirs: Workbench, run: RunId = RUN) -> None:
    torch.testing.assert_close(state_of(ours, run), state_of(theirs, run), rtol=0, atol=0)
    steps = [bench.engine.runs[run].state.num_optim_steps for bench in (ours, theirs)]
    assert steps[0] == steps[1]


# -- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_cancelled_sample_frees_its_pages_and_harms_nobody(
    bench: Workbench, num_steps: int
) -> None:
    expected = bench.do(sample_work(1)).sequences[0].tokens_N
    victim = bench.submit(sample_work(2, max_tokens=40, num_samples=3))
    other = bench.submit(sample_work(1))
    for _ in range(num_steps):
        bench.scheduler.step()
    assert bool(bench.scheduler.stats().kv_pages_used) == bool(num_steps)
    bench.scheduler.cancel(Cancel(victim))
    bench.scheduler.cancel(Cancel(victim))
    bench.scheduler.cancel(Cancel(999))
    bench.run()
    assert victim not in bench.answers
    np.testing.assert_array_equal(bench.result(other).sequences[0].tokens_N, expected)
    assert_at_rest(bench)


def test_streamed_deltas_add_up_to_the_result(bench: Workbench) -> None:
    work_id = bench.submit(sample_work(3, num_samples=3, topk_sample_logprobs=2, stream=True))
    silent = bench.submit(sample_work(4))
    bench.run()
    assert {delta.work_id for delta in bench.deltas} == {work_id} != {silent}
    for index, sequence in enumerate(bench.result(work_id).sequences):
        own = [d.delta for d in bench.deltas if d.delta.sample_index == index]
        assert [t for d in own for t in d.tokens] == list(sequence.tokens_N)
        logprobs = [x for d in own for x in d.logprobs]
        np.testing.assert_array_equal(np.float32(logprobs), sequence.logprobs_N)
        tops = np.concatenate([d.top_logprobs.token_ids_NK for d in own if d.top_logprobs])
        np.testing.assert_array_equal(tops, sequence.top_logprobs.token_ids_NK)


def test_a_revision_that_cannot_be_loaded_fails_all_who_wait_for_it(
    bench: Workbench, tmp_path: Path
) -> None:
    good = bench.revision("r", SPEC, 0)
    missing = digest_of(b"never stored")
    junk = bench.blobs.put(b"not an adapter")
    damaged = bench.revision("s", SPEC, 1)
    bench.scheduler._tiers.host.evict(damaged)
    damage(tmp_path / "store", damaged)
    cases: list[tuple[Digest, type[OpenMintError]]] = [
        (missing, NotFound),
        (junk, InvalidRequest),
        (damaged, StoreFailed),
    ]
    ids = [(bench.submit(sample_work(i, d)), e) for d, e in cases for i in range(3)]
    fine = bench.submit(sample_work(0, good))
    bench.run()
    for work_id, error in ids:
        with pytest.raises(error):
            bench.result(work_id)
    assert bench.result(fine).revision == good
    assert_at_rest(bench)


def test_many_who_want_one_cold_revision_cause_one_load(model: Path, tmp_path: Path) -> None:
    revision = Workbench(model, tmp_path / "store").revision("r", SPEC, 0)
    bench = Workbench(model, tmp_path / "store")
    ids = [bench.submit(sample_work(i, revision)) for i in range(5)]
    bench.run()
    assert {bench.result(i).revision for i in ids} == {revision}
    assert bench.scheduler.stats().revision_loads == 1


def test_a_revision_larger_than_the_serving_memory_is_refused(model: Path, tmp_path: Path) -> None:
    bench = Workbench(model, tmp_path / "store", serving_bytes=1000)
    revision = bench.revision("r", SPEC, 0)
    for _ in range(2):
        with pytest.raises(Overloaded, match=r"serving memory.*raise worker\.serving_bytes"):
            bench.do(sample_work(0, revision))
    assert_at_rest(bench)


def test_a_sample_step_that_fails_fails_only_those_in_it(model: Path, tmp_path: Path) -> None:
    bench = Workbench(model, tmp_path / "store", page_tokens=4, running_sequences=2)
    first = [bench.submit(sample_work(i, max_tokens=4)) for i in range(2)]
    later = [bench.submit(sample_work(i, max_tokens=4)) for i in range(2, 5)]
    original, calls = bench.engine.sample, 0

    def fail_once(batch: SampleBatch) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("device lost")
        return original(batch)

    bench.engine.sample = fail_once  # type: ignore[method-assign]
    bench.run()
    for work_id in first:
        with pytest.raises(EngineFailed, match="RuntimeError: device lost"):
            bench.result(work_id)
    for work_id in later:
        assert len(bench.result(work_id).sequences[0].tokens_N) == 4
    assert_at_rest(bench)


def test_cached_prompt_tokens_never_exceed_prompt_tokens(bench: Workbench) -> None:
    for _ in range(3):
        bench.do(sample_work(0, num_samples=6))
    stats = bench.scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (27, 16)
    assert stats.generated_tokens == 3 * 6 * 6


# -- runs -----------------------------------------------------------------------------------------


def trained_bench(model: Path, store: Path, num_updates: int) -> Workbench:
    """A run after some updates, with a gradient pending."""
    bench = Workbench(model, store)
    bench.do(CreateRun(RUN, T, SPEC, 7))
    for i in range(num_updates):
        bench.do(train(i))
        bench.do(optim())
    bench.do(train(100))
    return bench


def go_on(bench: Workbench, num_updates: int) -> None:
    for i in range(num_updates):
        bench.do(optim())
        bench.do(train(200 + i))


def test_a_work_of_several_micro_batches_computes_to_the_bit_what_it_would_alone(
    model: Path, tmp_path: Path
) -> None:
    other = RunId("other")
    alone, shared = (Workbench(model, tmp_path / name, micro_batch_tokens=20) for name in "as")
    for bench in (alone, shared):
        bench.do(CreateRun(RUN, T, SPEC, 7))
    shared.do(CreateRun(other, T, SPEC, 8))
    for i in range(3):
        shared.submit(train(i + 10, other))
        for bench in (alone, shared):
            bench.submit(train(i))
            bench.submit(optim())
            bench.run()
    assert_same_state(alone, shared)


def test_a_deterministic_worker_shares_no_micro_batch(model: Path, tmp_path: Path) -> None:
    other = RunId("other")
    alone, shared = (Workbench(model, tmp_path / name, deterministic=True) for name in "as")
    for bench in (alone, shared):
        bench.do(CreateRun(RUN, T, SPEC, 7))
    shared.do(CreateRun(other, T, SPEC, 8))
    for i in range(3):
        shared.submit(train(i + 10, other))
        for bench in (alone, shared):
            bench.submit(train(i))
            bench.submit(train(i + 20))
            bench.submit(optim())
            bench.run()
    assert_same_state(alone, shared)


# -- the log of updates ---------------------------------------------------------------------------


def logged_bench(model: Path, root: Path) -> Workbench:
    """A run after three logged updates of two works each."""
    bench = Workbench(model, root / "store", root / "journal")
    bench.do(CreateRun(RUN, T, SPEC, 7))
    for i in range(3):
        bench.submit(train(i))
        bench.submit(train(i + 10))
        bench.do(optim(seq=i))
    return bench


def recovering_bench(bench: Workbench, model: Path, root: Path) -> Workbench:
    assert bench.updates
    bench.updates.close()
    again = Workbench(model, root / "store", root / "journal")
    again.do(CreateRun(RUN, T, SPEC, 7))
    return again


def test_logged_updates_are_made_again_to_the_bit_without_a_forward_pass(
    model: Path, tmp_path: Path
) -> None:
    bench = logged_bench(model, tmp_path)
    again = recovering_bench(bench, model, tmp_path)
    for i in range(3):
        assert again.do(optim(seq=i, is_acknowledged=True)).num_optim_steps == i + 1
    assert_same_state(again, bench)
    assert again.scheduler.stats().trained_tokens == 0
    for each in (again, bench):
        each.do(train(50))
    assert_same_state(again, bench)


def test_a_logged_gradient_replaces_what_has_accumulated(model: Path, tmp_path: Path) -> None:
    """A work whose result was lost runs again before the update that it was part of."""
    bench = logged_bench(model, tmp_path)
    again = recovering_bench(bench, model, tmp_path)
    for i in range(3):
        again.submit(train(i + 10))
        again.do(optim(seq=i))
    assert_same_state(again, bench)


def test_an_acknowledged_update_that_the_log_lacks_or_has_otherwise_is_refused(
    model: Path, tmp_path: Path
) -> None:
    again = recovering_bench(logged_bench(model, tmp_path), model, tmp_path)
    with pytest.raises(StoreFailed, match="lacks the update that request 9"):
        again.do(optim(seq=9, is_acknowledged=True))
    with pytest.raises(StoreFailed, match="logged with num_optim_steps 2, not 1"):
        again.do(optim(seq=1, is_acknowledged=True))
    with pytest.raises(StoreFailed, match="logged with adam"):
        again.do(OptimWork(RUN, T, AdamParams(learning_rate=0.5), seq=0, is_acknowledged=True))
    assert again.engine.runs[RUN].state.num_optim_steps == 0


def test_an_update_that_can_not_be_logged_keeps_its_gradient(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = logged_bench(model, tmp_path)
    bench.do(train(5))
    before = [tensor.clone() for tensor in state_of(bench)]

    def is_full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("openmint.journal.update_log.os.write", is_full)
        with pytest.raises(StoreFailed, match="nothing was applied"):
            bench.do(optim(seq=3))
    assert all(torch.equal(a, b) for a, b in zip(state_of(bench), before, strict=True))
    assert bench.do(optim(seq=4)).num_optim_steps == 4


def test_a_dropped_run_leaves_the_log(model: Path, tmp_path: Path) -> None:
    bench = logged_bench(model, tmp_path)
    bench.do(DropRun(RUN, T))
    assert bench.updates
    bench.updates.append(RunId("other"), 1, {}, memoryview(b""), lambda error: None)
    bench.updates.close()
    assert RUN not in bench.updates.whole()


# -- probes ---------------------------------------------------------------------------------------


def slot_logprobs(bench: Workbench, revision: Digest | None, tokens_T: Any) -> Any:
    work = SampleWork(T, revision, tokens_T, SamplingParams(1), prompt_logprobs=True)
    return bench.do(work).prompt_logprobs_T[1:]


def test_stored_bytes_score_as_their_slot_serves_and_another_slot_does_not(
    bench: Workbench,
) -> None:
    tokens_T = prompt_of(12, 3)
    revision, other = bench.revision("a", SPEC, 1), bench.revision("b", SPEC, 2)
    scored = bench.do(ScoreWork(T, revision, tokens_T))
    assert not scored.is_zero
    np.testing.assert_allclose(
        scored.logprobs_T, slot_logprobs(bench, revision, tokens_T), rtol=0, atol=1e-5
    )
    weights = bench.engine._slots[other]
    bench.engine.detach(revision)
    bench.engine.attach(revision, weights)
    off_T = np.abs(scored.logprobs_T - slot_logprobs(bench, revision, prompt_of(12, 3)))
    assert off_T.max() > 0.01
    assert bench.engine.num_runs == 2, "the session of the score is not kept"


def test_a_fresh_adapter_scores_as_zero(bench: Workbench) -> None:
    bench.do(CreateRun(RUN, T, SPEC, 7))
    fresh = bench.do(ExportRun(RUN, T, keep_resident=True)).digest
    scored = bench.do(ScoreWork(T, fresh, prompt_of(12, 3)))
    assert scored.is_zero
    with pytest.raises(NotFound):
        bench.do(ScoreWork(T, digest_of(b"none"), prompt_of(12, 3)))


# -- restoring ------------------------------------------------------------------------------------


def test_a_restored_run_goes_on_bitwise_as_if_never_stopped(model: Path, tmp_path: Path) -> None:
    bench = trained_bench(model, tmp_path / "store", 3)
    saved = bench.do(SaveRun(RUN, T))
    assert (saved.num_optim_steps, saved.spec) == (3, SPEC)
    restarted = Workbench(model, tmp_path / "store")
    state = restarted.do(RestoreRun(RUN, T, saved.digest, "training", optimizer=True))
    assert state == RunState(SPEC, bench.engine.runs[RUN].layout.num_params, 3)
    assert_same_state(restarted, bench)
    for each in (bench, restarted):
        go_on(each, 3)
    assert_same_state(restarted, bench)
    exports = [each.do(ExportRun(RUN, T, keep_resident=False)) for each in (bench, restarted)]
    assert exports[0] == exports[1]


def test_a_live_run_can_be_set_back_to_an_earlier_state(model: Path, tmp_path: Path) -> None:
    bench = trained_bench(model, tmp_path / "store", 2)
    saved = bench.do(SaveRun(RUN, T))
    before = [tensor.clone() for tensor in state_of(bench)]
    go_on(bench, 2)
    bench.do(RestoreRun(RUN, T, saved.digest, "training", optimizer=True))
    assert all(torch.equal(a, b) for a, b in zip(state_of(bench), before, strict=True))


def test_without_the_optimizer_only_weights_are_restored(model: Path, tmp_path: Path) -> None:
    bench = trained_bench(model, tmp_path / "store", 2)
    saved = bench.do(SaveRun(RUN, T))
    other = RunId("other")
    state = bench.do(RestoreRun(other, T, saved.digest, "training", optimizer=False))
    assert state.num_optim_steps == 0
    params_P, *rest = state_of(bench, other)
    assert torch.equal(params_P, state_of(bench)[0])
    assert all(not tensor.any() for tensor in rest)
    assert not bench.engine.runs[other].has_gradient


def test_a_revision_starts_a_run_from_its_weights(model: Path, tmp_path: Path) -> None:
    bench = trained_bench(model, tmp_path / "store", 2)
    exported = bench.do(ExportRun(RUN, T, keep_resident=False))
    other = RunId("other")
    bench.do(RestoreRun(other, T, exported.digest, "revision", optimizer=False))
    assert torch.equal(state_of(bench, other)[0], state_of(bench)[0])
    assert bench.do(ExportRun(other, T, keep_resident=False)).digest == exported.digest


def test_another_shape_is_not_restored_into_a_live_run(bench: Workbench) -> None:
    bench.trained("wide", LoraSpec(8), 0)
    saved = bench.do(SaveRun(RunId("wide"), T))
    bench.trained("r", SPEC, 1)
    before = [tensor.clone() for tensor in state_of(bench)]
    with pytest.raises(InvalidRequest, match=r"trains LoraSpec\(rank=4.*the saved state is"):
        bench.do(RestoreRun(RUN, T, saved.digest, "training", optimizer=True))
    assert all(torch.equal(a, b) for a, b in zip(state_of(bench), before, strict=True))


@pytest.mark.parametrize("kind", ["training", "revision"])
def test_what_cannot_be_restored_is_refused_and_the_lane_goes_on(
    bench: Workbench, kind: Any
) -> None:
    bench.trained("r", SPEC, 0)
    wrong = {"training": ExportRun(RUN, T, False), "revision": SaveRun(RUN, T)}
    other_kind = bench.do(wrong[kind]).digest
    cases: list[tuple[Digest, type[OpenMintError]]] = [
        (digest_of(b"never stored"), NotFound),
        (bench.blobs.put(b"neither"), InvalidRequest),
        (other_kind, InvalidRequest),
    ]
    ids = [(bench.submit(RestoreRun(RUN, T, d, kind, optimizer=True)), e) for d, e in cases]
    after = bench.submit(train(0))
    bench.run()
    for work_id, error in ids:
        with pytest.raises(error):
            bench.result(work_id)
    assert len(bench.result(after).logprobs) == 3


def test_commands_behind_a_restore_mean_the_restored_state(model: Path, tmp_path: Path) -> None:
    bench = trained_bench(model, tmp_path / "store", 2)
    saved = bench.do(SaveRun(RUN, T))
    expected = bench.do(train(5, forward_only=True)).logprobs
    go_on(bench, 2)
    bench.submit(RestoreRun(RUN, T, saved.digest, "training", optimizer=True))
    behind = bench.submit(train(5, forward_only=True))
    bench.run()
    for ours, theirs in zip(bench.result(behind).logprobs, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


UNKNOWN: list[Callable[[], Command]] = [
    lambda: train(0, NOWHERE),
    lambda: train(0, NOWHERE, forward_only=True),
    lambda: OptimWork(NOWHERE, T, AdamParams()),
    lambda: SaveRun(NOWHERE, T),
    lambda: ExportRun(NOWHERE, T, keep_resident=True),
]


@pytest.mark.parametrize("make", UNKNOWN)
def test_an_unknown_run_is_not_found(bench: Workbench, make: Callable[[], Command]) -> None:
    with pytest.raises(NotFound, match="training run 'nowhere' is not in memory"):
        bench.do(make())
    assert_at_rest(bench)


def test_dropping_an_unknown_run_is_fine(bench: Workbench) -> None:
    assert bench.do(DropRun(NOWHERE, T)) is None


def test_an_error_does_not_stop_the_commands_behind_it(bench: Workbench) -> None:
    bench.trained("r", SPEC, 0)
    commands: list[Command] = [
        train(0),
        CreateRun(RUN, T, LoraSpec(9999), 0),
        train(1),
        OptimWork(RUN, T, AdamParams(learning_rate=float("nan"))),
        optim(),
        RestoreRun(RUN, T, digest_of(b"x"), "training", optimizer=True),
        train(2),
        optim(),
    ]
    ids = [bench.submit(command) for command in commands]
    bench.run()
    failed = [i for i, work_id in enumerate(ids) if not hasattr(bench.answers[work_id], "result")]
    assert failed == [1, 3, 5]
    assert bench.result(ids[-1]).num_optim_steps == 2


def test_one_run_that_is_unknown_fails_no_neighbour_in_its_batch(bench: Workbench) -> None:
    bench.trained("r", SPEC, 0)
    alone = bench.do(train(0, forward_only=True))
    ids = [bench.submit(work) for work in (train(3, NOWHERE), train(0), train(4, NOWHERE))]
    bench.run()
    for work_id in (ids[0], ids[2]):
        with pytest.raises(NotFound):
            bench.result(work_id)
    for ours, theirs in zip(bench.result(ids[1]).logprobs, alone.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert bench.scheduler.stats().trained_tokens == 2 * sum(LENGTHS)


def test_a_train_work_that_breaks_the_step_fails_alone(bench: Workbench) -> None:
    runs = [bench.trained(name, SPEC, i) for i, name in enumerate(("a", "r", "c"))]
    # No token has this id: the service refuses it, so here it stands for any crash of a step.
    outside = Datum(np.array([5, 9999]), {"target_tokens": np.array([5, 5])})
    outside.inputs["weights"] = np.ones(2, dtype=np.float32)  # type: ignore[index]
    bad = TrainWork(RunId("r"), T, (outside,), LossSpec("cross_entropy"), False)
    ids = [bench.submit(w) for w in (train(0, runs[0]), bad, train(2, runs[2]))]
    bench.run()
    with pytest.raises(EngineFailed, match="IndexError"):
        bench.result(ids[1])
    assert not bench.engine.runs[RunId("r")].has_gradient
    for i, seed in ((0, 0), (2, 2)):
        grads = bench.engine.runs[runs[i]].grads_P.clone()
        bench.engine.runs[runs[i]].clear_gradient()
        bench.do(train(seed, runs[i]))
        torch.testing.assert_close(bench.engine.runs[runs[i]].grads_P, grads, rtol=0, atol=0)


def test_an_unexpected_error_of_a_command_leaves_the_loop_running(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.trained("r", SPEC, 0)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(bench.engine, "snapshot_run", fail)
        failing, following = bench.submit(SaveRun(RUN, T)), bench.submit(train(0))
        bench.run()
    with pytest.raises(EngineFailed, match="RuntimeError: out of memory"):
        bench.result(failing)
    assert bench.result(following).metrics["num_tokens:sum"] == sum(LENGTHS)


def test_a_session_beyond_the_training_memory_is_refused_with_the_remedy(
    model: Path, tmp_path: Path
) -> None:
    bench = Workbench(model, tmp_path / "store", training_bytes=2**20)
    with pytest.raises(Overloaded, match=r"raise worker\.training_bytes"):
        for i in range(100):
            bench.do(CreateRun(RunId(f"r{i}"), T, SPEC, 0))
    bench.do(DropRun(RunId("r0"), T))
    bench.do(CreateRun(RunId("again"), T, SPEC, 0))


# -- both -----------------------------------------------------------------------------------------


class Clock:
    """Time that passes only while the engine works."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_training_and_sampling_share_the_engines_seconds(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.trained("r", SPEC, 0)
    clock, order = Clock(), list[str]()
    monkeypatch.setattr("openmint.scheduler.scheduler.time", clock)
    train_step, sample_step = bench.engine.train, bench.engine.sample

    def slow_train(plan: MicroBatch) -> None:
        clock.now += 3.0
        order.append("train")
        train_step(plan)

    def quick_sample(plan: SampleBatch) -> Any:
        clock.now += 1.0
        order.append("sample")
        return sample_step(plan)

    bench.engine.train, bench.engine.sample = slow_train, quick_sample  # type: ignore[method-assign]
    for i in range(8):
        bench.submit(train(i))
        bench.submit(optim())
    bench.submit(sample_work(0, max_tokens=18))
    bench.run()
    both = order[: order.index("sample") + 20]
    assert both[:9] == ["train", *["sample"] * 3, "train", *["sample"] * 3, "train"]
    # The sample ends after 18 steps; what is left of training runs by itself.
    assert order[-1] == "train"
    assert (order.count("train"), order.count("sample")) == (8, 18)
    stats = bench.scheduler.stats()
    assert (stats.train_seconds, stats.serve_seconds) == (24.0, 18.0)


def test_training_waits_for_no_cold_revision(bench: Workbench) -> None:
    bench.trained("r", SPEC, 0)
    held: list[Any] = []
    scheduler: Scheduler = bench.scheduler
    scheduler._background = lambda job, then: held.append((job, then))
    revision = bench.blobs.put(b"slow to come")
    sampling, training = bench.submit(sample_work(0, revision)), bench.submit(train(0))
    while training not in bench.answers:
        assert scheduler.step()
    assert sampling not in bench.answers
    ((_, then),) = held
    then(None, StoreFailed("gone"))
    with pytest.raises(StoreFailed):
        bench.result(sampling)
    assert_at_rest(bench)


def test_an_adapter_that_overflows_harms_no_neighbour(bench: Workbench) -> None:
    expected = [bench.do(sample_work(i, max_tokens=12)).sequences[0].tokens_N for i in range(4)]
    wild = bench.revision("wild", LoraSpec(4), 0, scale=1e36)
    fresh = [SampleWork(T, None, prompt_of(9, i), SamplingParams(12, seed=i)) for i in range(4)]
    bad = [bench.submit(sample_work(90 + i, wild, max_tokens=3)) for i in range(3)]
    ids = [bench.submit(work) for work in fresh]
    bench.run()
    # Pages that held the overflow are handed out again, too.
    bench.scheduler._batcher.pool.check_integrity()
    pool = bench.scheduler._batcher.pool
    longer = [
        bench.submit(sample_work(50 + i, max_tokens=200)) for i in range(pool.num_pages // 50)
    ]
    bench.run()
    for work_id in bad:
        with pytest.raises(NonFinite, match="NaN or infinite"):
            bench.result(work_id)
    for work_id, tokens in zip(ids, expected, strict=True):
        np.testing.assert_array_equal(bench.result(work_id).sequences[0].tokens_N, tokens)
    for work_id in longer:
        assert np.isfinite(bench.result(work_id).sequences[0].logprobs_N).all()
    assert_at_rest(bench)
