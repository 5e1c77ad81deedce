"""Sampling: the model's own distribution, the same alone or in company."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from openmint.engine.plan import Draw
from openmint.engine.sample_step import choose_tokens, truncate, uniform_at
from openmint.errors import EngineFailed, InvalidRequest
from openmint.layers.adapters import AdapterWeights
from openmint.scheduler.work import DropRun, ExportRun, SampleWork
from openmint.types import LoraSpec, RunId, SamplingParams, Tenant
from tests.workbench import (
    FAMILIES,
    Workbench,
    peft_model,
    prompt_of,
    random_model,
    reference,
    train_work,
)

SPECS = {
    "r1": LoraSpec(1, train_mlp=False, train_unembed=False),
    "r8": LoraSpec(8),
    "r16": LoraSpec(16, train_attn=False),
    "r64": LoraSpec(64, train_unembed=False),
}


def test_mixed_adapters_sample_what_each_samples_alone(tmp_path: Path) -> None:
    bench = Workbench(random_model("qwen3", tmp_path / "base"), tmp_path / "store", page_tokens=4)
    revisions = {name: bench.revision(name, s, i, 0.2) for i, (name, s) in enumerate(SPECS.items())}
    named: list[tuple[str | None, int]] = [(name, i) for i, name in enumerate([*revisions, None])]
    alone = {
        name: bench.sample(prompt_of(9 + i, i), revisions[name] if name else None).sequences[0]
        for name, i in named
    }
    works = {
        name: bench.submit(
            SampleWork(
                Tenant("t"),
                revisions[name] if name else None,
                prompt_of(9 + i, i),
                SamplingParams(max_tokens=12, temperature=0.0),
            )
        )
        for name, i in named
    }
    bench.run()
    for name, _ in named:
        together = bench.result(works[name]).sequences[0]
        np.testing.assert_array_equal(together.tokens_N, alone[name].tokens_N)
        np.testing.assert_allclose(together.logprobs_N, alone[name].logprobs_N, atol=1e-4)
        assert bench.result(works[name]).revision == (revisions[name] if name else None)
    outputs = {tuple(sequence.tokens_N) for sequence in alone.values()}
    assert len(outputs) == len(named), "adapters must change what is said"


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_equal_the_trainers_and_pefts(family: str, tmp_path: Path) -> None:
    bench = Workbench(
        random_model(family, tmp_path / "base"), tmp_path / "store", page_tokens=4, step_tokens=7
    )
    revision = bench.revision("r", LoraSpec(8), 0, 0.1)
    prompt = prompt_of(17)
    work = SampleWork(
        Tenant("t"),
        revision,
        prompt,
        SamplingParams(max_tokens=9, seed=5),
        prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
        target_prompt_logprobs_NK=np.stack([prompt[1:], np.full(16, -1)], axis=1),
    )
    result = bench.do(work)
    sequence = result.sequences[0]
    tokens = np.concatenate([prompt, sequence.tokens_N])
    model = peft_model(tmp_path / "base", bench, RunId("r"))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None]).logits[0]
    theirs = logits.log_softmax(-1).numpy()
    expected = theirs[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(sequence.logprobs_N, expected[16:], atol=1e-4)
    np.testing.assert_allclose(result.prompt_logprobs_T[1:], expected[:16], atol=1e-4)
    assert np.isnan(result.prompt_logprobs_T[0])
    top = result.topk_prompt_logprobs
    best = np.sort(theirs[:16], axis=1)[:, ::-1][:, :3]
    np.testing.assert_allclose(top.logprobs_NK[1:], best, atol=1e-4)
    np.testing.assert_array_equal(top.token_ids_NK[1:, 0], theirs[:16].argmax(1))
    found = result.target_prompt_logprobs_NK
    np.testing.assert_allclose(found[:, 0], expected[:16], atol=1e-4)
    assert np.isnan(found[:, 1]).all()
    assert sequence.top_logprobs is not None
    assert sequence.top_logprobs.logprobs_NK.shape == (9, 2)


def test_a_seed_draws_the_same_alone_and_in_company(tmp_path: Path) -> None:
    bench = Workbench(random_model("llama", tmp_path / "base"), tmp_path / "store")
    alone = bench.sample(prompt_of(8), temperature=1.0, seed=11).sequences[0].tokens_N
    settings = SamplingParams(max_tokens=12, seed=11)
    ids = [
        bench.submit(SampleWork(Tenant("t"), None, prompt_of(8 + i, i), settings)) for i in range(5)
    ]
    bench.run()
    np.testing.assert_array_equal(bench.result(ids[0]).sequences[0].tokens_N, alone)
    several = bench.do(SampleWork(Tenant("t"), None, prompt_of(8), settings, num_samples=3))
    np.testing.assert_array_equal(several.sequences[0].tokens_N, alone)
    shifted = bench.sample(prompt_of(8), temperature=1.0, seed=12).sequences[0].tokens_N
    np.testing.assert_array_equal(several.sequences[1].tokens_N, shifted)


def test_stop_token_and_stop_string_stay_in_the_output(tmp_path: Path) -> None:
    bench = Workbench(random_model("llama", tmp_path / "base"), tmp_path / "store")
    free = bench.sample(prompt_of(8)).sequences[0]
    assert free.stop_reason == "length"
    stop = int(free.tokens_N[4])
    first = list(free.tokens_N).index(stop)
    cut = bench.sample(prompt_of(8), stop_token_ids=(stop,)).sequences[0]
    np.testing.assert_array_equal(cut.tokens_N, free.tokens_N[: first + 1])
    assert cut.stop_reason == "stop"
    from tests.workbench import decode_text

    word = decode_text([int(t) for t in free.tokens_N[2:4]])
    text = decode_text([int(t) for t in free.tokens_N])
    cut = bench.sample(prompt_of(8), stop_strings=(word,)).sequences[0]
    assert len(cut.tokens_N) == text.index(word) + len(word)
    assert cut.stop_reason == "stop"


def test_shared_prefix_is_reused_by_the_same_revision_only(tmp_path: Path) -> None:
    bench = Workbench(random_model("llama", tmp_path / "base"), tmp_path / "store", page_tokens=4)
    revision = bench.revision("r", LoraSpec(8), 0, 0.3)
    fresh = bench.sample(prompt_of(18))
    again = bench.sample(prompt_of(18))
    other = bench.sample(prompt_of(18), revision)
    assert (fresh.num_cached_tokens, again.num_cached_tokens) == (0, 16)
    assert other.num_cached_tokens == 0
    np.testing.assert_array_equal(fresh.sequences[0].tokens_N, again.sequences[0].tokens_N)
    assert list(other.sequences[0].tokens_N) != list(fresh.sequences[0].tokens_N)


def test_when_pages_run_out_a_sequence_is_recomputed_not_changed(tmp_path: Path) -> None:
    directory = random_model("llama", tmp_path / "base")
    roomy = Workbench(directory, tmp_path / "store", page_tokens=4)
    token_bytes = 2 * 3 * 2 * 8 * 4
    tight = Workbench(
        directory, tmp_path / "store", page_tokens=4, kv_cache_bytes=token_bytes * 4 * 14
    )
    settings = SamplingParams(max_tokens=24, seed=3)
    answers = []
    for bench in (roomy, tight):
        ids = [
            bench.submit(SampleWork(Tenant("t"), None, prompt_of(9, i), settings)) for i in range(4)
        ]
        bench.run()
        answers.append([list(bench.result(i).sequences[0].tokens_N) for i in ids])
        bench.scheduler._batcher.pool.check_integrity()
        assert bench.scheduler.stats().kv_pages_used == 0
    assert tight.scheduler.stats().preemptions > 0
    assert answers[0] == answers[1]


def test_a_sample_too_long_for_the_worker_is_refused_with_the_numbers(tmp_path: Path) -> None:
    bench = Workbench(random_model("llama", tmp_path / "base"), tmp_path / "store")
    with pytest.raises(InvalidRequest, match=r"prompt of 200 and max_tokens 100 make 300 .* 256"):
        bench.sample(prompt_of(200), max_tokens=100)


def test_a_swapped_slot_is_caught_and_nothing_is_returned(tmp_path: Path) -> None:
    bench = Workbench(random_model("llama", tmp_path / "base"), tmp_path / "store")
    first = bench.revision("a", LoraSpec(8), 0)
    second = bench.revision("b", LoraSpec(8), 1)
    slots = bench.engine._slots
    slots[first], slots[second] = slots[second], slots[first]
    with pytest.raises(EngineFailed, match="wrong adapter"):
        bench.sample(prompt_of(8), first)


def test_an_evicted_revision_is_loaded_again_from_the_store(tmp_path: Path) -> None:
    directory = random_model("llama", tmp_path / "base")
    one = Workbench(directory, tmp_path / "store").revision("probe", LoraSpec(8), 0)
    size = Workbench(directory, tmp_path / "store").blobs.size(one)
    bench = Workbench(directory, tmp_path / "store", host_bytes=int(1.5 * size))
    revisions = [bench.revision(f"r{i}", LoraSpec(8), i, 0.2) for i in range(3)]
    answers = [bench.sample(prompt_of(8), revision).sequences[0].tokens_N for revision in revisions]
    again = [bench.sample(prompt_of(8), revision) for revision in revisions]
    for before, after, revision in zip(answers, again, revisions, strict=True):
        np.testing.assert_array_equal(after.sequences[0].tokens_N, before)
        assert after.revision == revision
    stats = bench.scheduler.stats()
    assert stats.revision_evictions >= 4
    assert stats.revision_loads >= 4
    assert stats.num_resident_revisions == 1


def test_export_outlives_further_training(tmp_path: Path) -> None:
    from openmint.scheduler.work import OptimWork
    from openmint.types import AdamParams

    bench = Workbench(random_model("llama", tmp_path / "base"), tmp_path / "store")
    revision = bench.revision("r", LoraSpec(8), 0, 0.2)
    before = bench.sample(prompt_of(8), revision).sequences[0]
    for i in range(3):
        bench.do(train_work(RunId("r"), "cross_entropy", (9, 7), i))
        bench.do(OptimWork(RunId("r"), Tenant("t"), AdamParams(learning_rate=0.05)))
    moved = bench.do(ExportRun(RunId("r"), Tenant("t"), keep_resident=True)).digest
    bench.do(DropRun(RunId("r"), Tenant("t")))
    after = bench.sample(prompt_of(8), revision).sequences[0]
    np.testing.assert_array_equal(before.tokens_N, after.tokens_N)
    np.testing.assert_array_equal(before.logprobs_N, after.logprobs_N)
    assert moved != revision
    assert list(bench.sample(prompt_of(8), moved).sequences[0].logprobs_N) != list(after.logprobs_N)


def test_truncation_keeps_the_smallest_set_that_reaches_top_p() -> None:
    probs = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])
    kept = truncate(probs.log(), top_k=-1, top_p=0.7).isfinite()
    assert kept.tolist() == [True, True, False, False, False]
    kept = truncate(probs.log(), top_k=3, top_p=1.0).isfinite()
    assert kept.tolist() == [True, True, True, False, False]
    assert truncate(probs.log(), top_k=-1, top_p=1e-6).isfinite().sum() == 1


def test_draws_follow_the_tempered_distribution() -> None:
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    temperature, count = 2.0, 4000
    rows = logits.repeat(count, 1)
    draws = [Draw(temperature, -1, 1.0, 7, position, 0) for position in range(count)]
    drawn = torch.from_numpy(np.bincount(choose_tokens(rows, draws), minlength=3)) / count
    expected = (logits / temperature).softmax(-1)
    # Four standard errors of a proportion at n = 4000.
    assert torch.all((drawn - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt())


def test_uniform_numbers_look_uniform_over_seeds_and_positions() -> None:
    grid = np.array([uniform_at(seed, position) for seed in range(64) for position in range(64)])
    counts, _ = np.histogram(grid, bins=16, range=(0.0, 1.0))
    expected = len(grid) / 16
    # Chi-square with 15 degrees of freedom: 99.9th percentile.
    assert ((counts - expected) ** 2 / expected).sum() < 37.7


def test_adapter_weights_carry_their_revision(tmp_path: Path) -> None:
    bench = Workbench(random_model("llama", tmp_path / "base"), tmp_path / "store")
    revision = bench.revision("r", LoraSpec(8), 0)
    held: AdapterWeights = bench.engine._slots[revision]
    assert held.revision == revision
    assert bench.engine.runs[RunId("r")].weights.revision is None


def test_prompt_alternatives_are_draws_from_each_positions_distribution(tmp_path: Path) -> None:
    bench = Workbench(random_model("llama", tmp_path / "base"), tmp_path / "store", step_tokens=7)
    prompt = prompt_of(12)
    work = SampleWork(
        Tenant("t"),
        None,
        prompt,
        SamplingParams(max_tokens=1, temperature=0.7, seed=3),
        prompt_alternatives=64,
    )
    drawn = bench.do(work).prompt_alternatives
    with torch.no_grad():
        logits = reference(tmp_path / "base")(torch.from_numpy(prompt)[None]).logits[0, :-1]
    logprobs = logits.log_softmax(-1).numpy()
    found = np.take_along_axis(logprobs, drawn.token_ids_NK, axis=1)
    np.testing.assert_allclose(drawn.logprobs_NK, found, atol=1e-4)
    # Under the tempered distribution the draws' mean log-probability has a known expectation.
    tempered = (logits / 0.7).softmax(-1).numpy()
    expected = (tempered * logprobs).sum(1)
    spread = np.sqrt((tempered * (logprobs - expected[:, None]) ** 2).sum(1) / 64)
    assert (np.abs(drawn.logprobs_NK.mean(1) - expected) < 5 * spread).all()
    single = replace(
        work, prompt_T=prompt[:1], target_prompt_logprobs_NK=np.zeros((0, 2), np.int64)
    )
    alone = bench.do(single)
    assert alone.prompt_alternatives.token_ids_NK.shape == (0, 64)
    assert alone.target_prompt_logprobs_NK.shape == (0, 2)
