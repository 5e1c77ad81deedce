"""The embedded base itself: parity with `transformers` and `peft`, and sampler against trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from openmint.kernels.tile import IS_AVAILABLE
from openmint.scheduler.work import SampleWork, TrainWork
from openmint.types import Datum, LoraSpec, LossSpec, SamplingParams, Tenant
from tests.workbench import Workbench, peft_model

QUESTIONS = (
    "What is the capital of France?",
    "List three things that are heavier than a horse.",
    "Why does ice float on water, and what would happen in lakes if it did not?",
)
KV_BYTES = 64 * 2**20


@pytest.fixture(scope="module")
def prompts(embedded_base: Path) -> list[np.ndarray[Any, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(embedded_base)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    encoded = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    return [np.array(item["input_ids"], dtype=np.int64) for item in encoded]


def next_token_work(run_id: Any, prompts: list[np.ndarray[Any, Any]]) -> TrainWork:
    data = []
    for tokens in prompts:
        weights = np.ones(len(tokens) - 1, dtype=np.float32)
        inputs = {"target_tokens": tokens[1:], "weights": weights}
        data.append(Datum(tokens[:-1], inputs))
    return TrainWork(run_id, Tenant("t"), tuple(data), LossSpec("cross_entropy"), False)


def test_fp32_logprobs_and_gradients_equal_peft(
    embedded_base: Path, prompts: list[np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    bench = Workbench(embedded_base, tmp_path, kv_cache_bytes=KV_BYTES)
    run_id = bench.trained("r", LoraSpec(8), seed=0, scale=0.01)
    work = next_token_work(run_id, prompts)
    result = bench.do(work)
    # In fp64, as peft's own rounding in fp32 is ten times ours (1e-4 in the last layers).
    model = peft_model(embedded_base, bench, run_id).double()
    total = torch.zeros((), dtype=torch.float64)
    for item, ours in zip(work.data, result.logprobs, strict=True):
        logits = model(torch.from_numpy(item.tokens_N)[None]).logits[0]
        targets = torch.from_numpy(item.inputs["target_tokens"])[:, None]
        lp = logits.log_softmax(-1).gather(1, targets)[:, 0]
        np.testing.assert_allclose(ours, lp.detach().numpy(), rtol=1e-4, atol=1e-3)
        total = total - lp.sum()
    total.backward()
    assert result.metrics["loss:sum"] == pytest.approx(total.item(), rel=1e-4)
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    run = bench.engine.runs[run_id]
    for path, pair in run.layout.views(run.grads_P).items():
        names = [f"base_model.model.{path}.lora_{x}.default.weight" for x in "AB"]
        for ours, expected in zip((pair[0], pair[1].t()), (theirs[n] for n in names), strict=True):
            assert float((ours - expected).norm() / expected.norm()) < 4e-5, path


def gaps_between_sampler_and_trainer(
    base: Path, prompts: list[np.ndarray[Any, Any]], store: Path, **config: Any
) -> np.ndarray[Any, Any]:
    """How far the log-probabilities of sampled tokens are from the trainer's of the same."""
    bench = Workbench(base, store, dtype="bfloat16", kv_cache_bytes=KV_BYTES, **config)
    revision = bench.revision("r", LoraSpec(8), seed=0, scale=0.01)
    settings = SamplingParams(max_tokens=64, seed=1)
    ids = [
        bench.submit(SampleWork(Tenant("t"), revision, prompt, settings, num_samples=4))
        for prompt in prompts
    ]
    bench.run()
    sequences = [
        (prompt, sequence)
        for prompt, work_id in zip(prompts, ids, strict=True)
        for sequence in bench.result(work_id).sequences
    ]
    whole = [np.concatenate([prompt, sequence.tokens_N]) for prompt, sequence in sequences]
    scored = bench.do(next_token_work("r", whole)).logprobs
    return np.concatenate(
        [
            np.abs(trainer[len(prompt) - 1 :] - sequence.logprobs_N)
            for (prompt, sequence), trainer in zip(sequences, scored, strict=True)
        ]
    )


def test_bf16_sampler_and_trainer_agree(
    embedded_base: Path, prompts: list[np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    gaps = gaps_between_sampler_and_trainer(embedded_base, prompts, tmp_path)
    print(f"n={len(gaps)} median={np.median(gaps):.5f} max={gaps.max():.4f}")
    assert np.median(gaps) <= 0.005
    assert gaps.max() <= 0.1


@pytest.mark.skipif(not IS_AVAILABLE, reason="this CPU has no AVX512-BF16")
def test_an_int8_base_samples_close_to_the_trainer(
    embedded_base: Path, prompts: list[np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    settings = {"serving_weights": "int8"}
    gaps = gaps_between_sampler_and_trainer(embedded_base, prompts, tmp_path, **settings)
    print(f"n={len(gaps)} median={np.median(gaps):.5f} max={gaps.max():.4f}")
    assert 0 < np.median(gaps) <= 0.1
