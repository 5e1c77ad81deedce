"""What sampling chose is recorded and repeated, whatever the trainer's own weights would choose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from openmint.engine.route_record import Recorder, RouteCache, RouteRecord
from openmint.errors import InvalidRequest
from openmint.layers.attention import PackedAttention
from openmint.layers.batch import Batch
from openmint.layers.sparse import NONE
from openmint.models.model import RouteShape
from openmint.scheduler.work import SampleResult, SampleWork, TrainResult, TrainWork
from openmint.types import (
    Datum,
    Digest,
    LoraSpec,
    LossSpec,
    RecordedRoutes,
    RunId,
    SamplingParams,
    Tenant,
)
from tests.workbench import MIXTURES, Workbench, prompt_of, random_model

T = Tenant("t")


class Watching:
    """Routes that are only looked at."""

    def __init__(self) -> None:
        self.experts_TK: list[torch.Tensor] = []
        self.keys_TC: list[torch.Tensor | None] = []

    def experts(self, layer: int, own_TK: torch.Tensor) -> torch.Tensor:
        self.experts_TK.append(own_TK)
        return own_TK

    def keys(self, layer: int, own_TC: torch.Tensor | None) -> torch.Tensor | None:
        self.keys_TC.append(own_TC)
        return own_TC


@pytest.fixture(params=MIXTURES, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(request.param, tmp_path_factory.mktemp("base"))


def sampled(bench: Workbench, revision: Digest | None, seed: int) -> SampleResult:
    params = SamplingParams(max_tokens=14, seed=seed)
    return bench.do(SampleWork(T, revision, prompt_of(11), params, routes=True))


def sequence_of(result: SampleResult) -> np.ndarray:
    return np.concatenate([prompt_of(11), result.sequences[0].tokens_N])


def policy_datum(result: SampleResult, num_recorded: int | None = None, **routes: bool) -> Datum:
    tokens = sequence_of(result)
    count = len(tokens) - 1
    logprobs = np.zeros(count, np.float32)
    logprobs[10:] = result.sequences[0].logprobs_N
    inputs = {
        "target_tokens": tokens[1:],
        "logprobs": logprobs,
        "advantages": (np.arange(count) >= 10).astype(np.float32),
    }
    record = RecordedRoutes(result.sequences[0].routes, num_recorded or count, **routes)
    return Datum(tokens[:-1], inputs, record)


def trained(bench: Workbench, run: RunId, *data: Datum) -> TrainResult:
    loss = LossSpec("importance_sampling")
    return bench.do(TrainWork(run, T, tuple(data), loss, forward_only=False))


def test_a_record_is_what_a_whole_forward_pass_chooses(folder: Path, tmp_path: Path) -> None:
    """From chunks of a few tokens over small pages, and for the base that drew them."""
    bench = Workbench(folder, tmp_path, page_tokens=4, step_tokens=5)
    result = sampled(bench, None, 1)
    tokens = torch.from_numpy(sequence_of(result))[:-1]
    shape, watching = bench.model.route_shape, Watching()
    assert shape is not None
    with torch.no_grad():
        attention = PackedAttention([len(tokens)], torch.device("cpu"))
        batch = Batch(attention, None, watching)
        bench.model.forward(tokens, torch.arange(len(tokens)), batch)
    record = RouteRecord.decode(result.sequences[0].routes, shape)
    experts = torch.stack(watching.experts_TK, dim=1).numpy()
    np.testing.assert_array_equal(np.sort(record.experts_NLK), np.sort(experts))
    assert len(watching.keys_TC) == shape.num_indexers
    for i, own_TC in enumerate(watching.keys_TC):
        assert own_TC is not None
        for n, (ours, theirs) in enumerate(zip(record.keys(i), own_TC.numpy(), strict=True)):
            saw_all = (ours == NONE).all()
            expected = np.arange(n + 1) if saw_all else ours[ours != NONE]
            np.testing.assert_array_equal(expected, theirs[theirs != NONE])


def test_what_a_shared_prefix_chose_is_in_the_record_of_who_shares_it(
    folder: Path, tmp_path: Path
) -> None:
    bench = Workbench(folder, tmp_path, page_tokens=4)
    first, again = sampled(bench, None, 1), sampled(bench, None, 1)
    assert again.num_cached_tokens > 0
    assert again.sequences[0].routes == first.sequences[0].routes


def test_training_takes_the_recorded_route_and_no_other(folder: Path, tmp_path: Path) -> None:
    """With weights that have moved since, so that it would choose otherwise."""
    bench = Workbench(folder, tmp_path)
    bench.trained("r", LoraSpec(8), 3, 0.5)
    result = sampled(bench, None, 1)
    forced = trained(bench, RunId("r"), policy_datum(result))
    own = trained(bench, RunId("r"), policy_datum(result, is_forced=False))
    count = len(sequence_of(result)) - 1
    assert forced.metrics["replay_recorded_tokens:sum"] == count
    assert forced.metrics["out_of_route_ratio:mean"] == 0.0
    assert own.metrics["out_of_route_ratio:mean"] > 0.0
    assert own.metrics["own_route_differs_ratio:mean"] == own.metrics["out_of_route_ratio:mean"]
    assert forced.metrics["own_route_differs_ratio:mean"] > 0.0
    assert not np.allclose(forced.logprobs[0], own.logprobs[0])


def test_replay_with_the_samplers_own_weights_changes_nothing(folder: Path, tmp_path: Path) -> None:
    bench = Workbench(folder, tmp_path)
    revision = bench.revision("r", LoraSpec(8), 3, 0.2)
    result = sampled(bench, revision, 1)
    grads = []
    for is_forced in (True, False):
        outcome = trained(bench, RunId("r"), policy_datum(result, is_forced=is_forced))
        run = bench.engine.runs[RunId("r")]
        grads.append(run.grads_P.clone())
        run.clear_gradient()
        np.testing.assert_allclose(
            outcome.logprobs[0][10:], result.sequences[0].logprobs_N, atol=1e-4
        )
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_tokens_without_a_record_are_counted_and_have_no_part(folder: Path, tmp_path: Path) -> None:
    """The gradient is that of the same datum with no advantage there."""
    bench = Workbench(folder, tmp_path)
    bench.trained("r", LoraSpec(8), 3, 0.5)
    result = sampled(bench, None, 1)
    cut = trained(bench, RunId("r"), policy_datum(result, 17))
    run = bench.engine.runs[RunId("r")]
    ours = run.grads_P.clone()
    run.clear_gradient()
    count = len(sequence_of(result)) - 1
    assert cut.metrics["replay_recorded_tokens:sum"] == 17
    assert cut.metrics["replay_missing_tokens:sum"] == count - 17
    whole = policy_datum(result)
    inputs = {**whole.inputs, "advantages": whole.inputs["advantages"] * (np.arange(count) < 17)}
    trained(bench, RunId("r"), replace(whole, inputs=inputs))
    assert (ours - run.grads_P).norm() < 1e-5 * ours.norm()
    assert ours.norm() > 0


def test_data_that_were_not_sampled_here_train_as_ever(folder: Path, tmp_path: Path) -> None:
    bench = Workbench(folder, tmp_path)
    bench.trained("r", LoraSpec(8), 3, 0.5)
    datum = replace(policy_datum(sampled(bench, None, 1)), routes=None)
    outcome = trained(bench, RunId("r"), datum)
    assert outcome.metrics["replay_unrecorded_tokens:sum"] == len(datum.tokens_N)
    assert outcome.metrics["replay_missing_tokens:sum"] == 0
    assert bench.engine.runs[RunId("r")].grads_P.abs().max() > 0


def test_a_record_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    bench = Workbench(folder, tmp_path)
    bench.trained("r", LoraSpec(4), 0)
    datum = policy_datum(sampled(bench, None, 1))
    assert datum.routes is not None
    wrong = replace(datum.routes, record=datum.routes.record[:20])
    with pytest.raises(InvalidRequest, match="record"):
        trained(bench, RunId("r"), replace(datum, routes=wrong))


@pytest.mark.parametrize("num_experts", [8, 384])
def test_records_come_back_bit_by_bit(num_experts: int) -> None:
    """Of tokens in any places, whose positions before the fifth saw all there was."""
    numbers = np.random.default_rng(0)
    shape = RouteShape(3, num_experts, 2, num_indexers=2, num_keys=5)
    experts = numbers.integers(0, num_experts, (40, 3, 2))
    keys = np.full((40, 2, 5), NONE)
    for n in range(5, 40):
        for i in range(2):
            keys[n, i] = np.sort(numbers.permutation(n + 1)[:5])
    cache, places = RouteCache(shape, 64), numbers.permutation(64)[:40]
    for rows in np.array_split(np.arange(40), 7):
        recorder = Recorder()
        for layer in range(3):
            recorder.experts(layer, torch.from_numpy(experts[rows, layer]))
        for i in range(2):
            recorder.keys(i, torch.from_numpy(keys[rows, i]))
        cache.write(places[rows], recorder)
    found = RouteRecord.decode(cache.record(places), shape)
    np.testing.assert_array_equal(found.experts_NLK, experts)
    for i in range(2):
        np.testing.assert_array_equal(found.keys(i), keys[:, i])


def test_what_a_token_saw_takes_a_bit_for_each_position_at_most() -> None:
    numbers = np.random.default_rng(0)
    shape = RouteShape(1, 8, 2, num_indexers=61, num_keys=2048)
    recorder = Recorder()
    recorder.experts(0, torch.zeros(1, 2, dtype=torch.int64))
    for i in range(61):
        chosen = np.sort(numbers.permutation(4096)[:2048])
        recorder.keys(i, torch.from_numpy(chosen)[None])
    cache = RouteCache(shape, 1)
    cache.write(np.array([0]), recorder)
    assert len(cache._seen[0]) < 1.01 * 61 * 4096 / 8
