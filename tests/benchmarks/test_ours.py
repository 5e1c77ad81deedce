"""Our own arms and the ceilings, on a tiny base: they do the work that they claim."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.arms import ceiling, ours


@pytest.fixture
def base(tiny_base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield str(tiny_base("llama"))
    ours.service.cache_clear()


def test_a_mixed_step_trains_the_same_data_as_a_planned_one(base: str) -> None:
    size = {"base": base, "sequences": 8, "length": 16, "policies": 4}
    planned, mixed = ours.Training(**size), ours.Training(**size, mixed=True)
    assert planned(0)["tokens"] == 128
    # The second turn follows an update.
    first, second = planned(1), (mixed(0), mixed(1))[1]
    assert first["loss_per_token"] == pytest.approx(second["loss_per_token"], rel=1e-2)
    works = [1, 2, 3, 4]
    (batch,) = mixed._micro_batches(works)
    assert [item.work_id for item in batch.items] == works * 2
    (batch,) = planned._micro_batches(works)
    assert [item.work_id for item in batch.items] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_decoding_counts_the_steps_of_all_sequences_with_adapters_or_without(
    base: str, tmp_path: Path
) -> None:
    maker = ours.AdapterMaker(base=base, folder=str(tmp_path), count=3)
    digests = maker(0)["adapters"]
    assert len(set(digests)) == 3
    config = json.loads((tmp_path / "peft" / "2" / "adapter_config.json").read_text())
    assert config["r"] == 8
    size = {"base": base, "sequences": 3, "tokens_in": 20, "tokens_out": 6}
    store = str(tmp_path / "store")
    answer = ours.Decoding(**size, rounds=2, store=store, adapters=digests)(0)
    # The prompts fit one step, which draws the first token of each.
    assert answer["tokens"] == 2 * 3 * 5
    assert len(answer["first_tokens"]) == 2 * 3
    assert ours.Decoding(**size, store=store)(0)["tokens"] == 3 * 5


def test_ceilings_hold_every_product_of_the_work(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two blocks of four fused linear layers, and the output layer.
    decode = ceiling.DecodeCeiling(base, sequences=4, steps=3, rounds=2)
    assert len(decode._products) == 2 * 4 + 1
    assert decode(0)["tokens"] == 4 * 3 * 2
    size = {"base": base, "sequences": 4, "length": 16, "micro_batch_tokens": 32}
    step = ceiling.TrainingCeiling(**size)
    # Forward and gradient of each, but for the gradient of the first q, k, v.
    assert len(step._products) == 2 * (2 * 4 + 1) - 1
    assert step(0)["tokens"] == 64
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert ceiling.TrainingCeiling(**size, lanes=2)(0)["tokens"] == 64
    fuller = ceiling.TrainingCeiling(**size, unembed=True, extras=True)
    assert len(fuller._products) == len(step._products) + 2 * 6 + (2 * 7 + 1) * 6
