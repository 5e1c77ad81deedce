"""Lanes share a step without changing it: two give what one gives."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmint.engine.lanes import Lanes
from openmint.kernels.tile import IS_AVAILABLE
from openmint.scheduler.work import SampleWork, TrainWork
from openmint.types import Datum, LoraSpec, LossSpec, SamplingParams, Tenant
from tests.workbench import ALL_FAMILIES, VOCAB, Workbench, prompt_of, random_model

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_parts_are_consecutive_and_about_equal(two_threads: None) -> None:
    lanes = Lanes(CPU)
    assert lanes.split([1] * 8, least=2) == [slice(0, 4), slice(4, 8)]
    assert lanes.split([9, 1, 1, 1], least=2) == [slice(0, 1), slice(1, 4)]
    assert lanes.split([2, 1], least=2) == [slice(0, 2)]
    assert lanes.split([100], least=2) == [slice(0, 1)]
    for seed in range(50):
        sizes = np.random.default_rng(seed).integers(1, 40, 1 + seed % 9).tolist()
        cuts = lanes.split(sizes, least=4)
        assert [i for cut in cuts for i in range(len(sizes))[cut]] == list(range(len(sizes)))


def test_results_keep_their_order_and_all_jobs_end_before_a_failure_is_told(
    two_threads: None,
) -> None:
    lanes = Lanes(CPU)
    assert lanes.run([lambda: "a", lambda: "b"]) == ["a", "b"]
    ended = []

    def fail() -> None:
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        lanes.run([fail, lambda: ended.append(1)])
    assert ended == [1]


def outcome(directory: Path, store: Path) -> tuple[torch.Tensor, list[np.ndarray], list[int]]:
    """A run's gradient, its data's log-probabilities, and what is sampled from it."""
    bench = Workbench(directory, store)
    run_id = bench.trained("r", LoraSpec(4), seed=0, scale=0.1)
    numbers = np.random.default_rng(0)
    data = []
    for length in (70, 33, 64, 81, 12):
        tokens = numbers.integers(0, VOCAB, length + 1)
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)}
        data.append(Datum(tokens[:-1], inputs))
    work = TrainWork(run_id, Tenant("t"), tuple(data), LossSpec("cross_entropy"), False)
    logprobs = bench.do(work).logprobs
    gradient = bench.engine.runs[run_id].grads_P.clone()
    revision = bench.revision("s", LoraSpec(8), seed=1)
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=5)
    tokens = []
    works = [SampleWork(Tenant("t"), revision, datum.tokens_N, params) for datum in data]
    for work_id in [bench.submit(work) for work in works]:  # prompts are read together
        bench.run()
        (sequence,) = bench.result(work_id).sequences
        tokens += sequence.tokens_N.tolist()
    return gradient, list(logprobs), tokens


def test_two_lanes_train_and_sample_what_one_does(tmp_path: Path) -> None:
    base = random_model("qwen3", tmp_path / "base")
    alone = outcome(base, tmp_path / "one")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        shared = outcome(base, tmp_path / "two")
    finally:
        torch.set_num_threads(before)
    assert float((shared[0] - alone[0]).norm()) <= 1e-5 * float(alone[0].norm())
    for ours, theirs in zip(shared[1], alone[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert shared[2] == alone[2]


@pytest.mark.skipif(not IS_AVAILABLE, reason="this CPU has no AVX512-BF16")
def test_all_threads_share_a_step_that_is_not_cut(monkeypatch: Any, tmp_path: Path) -> None:
    name, extra = ALL_FAMILIES["deepseek-v3"]
    wide = {"hidden_size": 64, "moe_intermediate_size": 32, "kv_lora_rank": 32, "v_head_dim": 16}
    monkeypatch.setitem(ALL_FAMILIES, "deepseek-v3", (name, {**extra, **wide}))
    base, shared = random_model("deepseek-v3", tmp_path / "base"), []
    run_together = Lanes.together
    monkeypatch.setattr(
        Lanes, "together", lambda lanes, job: shared.append(1) or run_together(lanes, job)
    )
    before, drawn = torch.get_num_threads(), []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        try:
            bench = Workbench(base, tmp_path / str(num_threads), dtype="bfloat16")
            drawn.append(bench.sample(prompt_of(9), max_tokens=6).sequences[0])
        finally:
            torch.set_num_threads(before)
    np.testing.assert_array_equal(drawn[0].tokens_N, drawn[1].tokens_N)
    np.testing.assert_array_equal(drawn[0].logprobs_N, drawn[1].logprobs_N)
    # Of 3 layers 2 have experts; the output layer is shared too, and the prompt is a step.
    assert len(shared) == 2 * 6 * (2 + 1)
