"""Samples through the unmodified Tinker SDK, whose tokens are known from an undisturbed run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import tinker
from tinker import types

from tests.servers import TestServer

PROMPT = [504, 3575, 282, 4649, 314]
NUM_SAMPLES, NUM_TOKENS = 8, 450

Pending = Sequence[Future[types.SampleResponse]]


def ask(sampler: tinker.SamplingClient) -> Pending:
    """Two sequences each of several seeds, long enough to be interrupted."""
    prompt = types.ModelInput.from_ints(PROMPT)
    settings = [
        types.SamplingParams(max_tokens=NUM_TOKENS, seed=seed, stop=[])
        for seed in range(NUM_SAMPLES)
    ]
    return [sampler.sample(prompt, 2, params).future() for params in settings]


def tokens_of(pending: Pending) -> list[list[int]]:
    results = [future.result(timeout=60) for future in pending]
    return [list(sequence.tokens) for result in results for sequence in result.sequences]


def check_samples_outlive(disturb: Callable[[], None], server: TestServer) -> None:
    """Samples in flight, and those asked right after it, end as if nothing had been."""
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        sampler = service.create_sampling_client(base_model="tiny-llama").result()
        undisturbed = tokens_of(ask(sampler))
        pending = ask(sampler)
        time.sleep(0.05)
        assert not any(future.done() for future in pending)
        disturb()
        later = ask(sampler)
        assert tokens_of(pending) == undisturbed
        assert tokens_of(later) == undisturbed
