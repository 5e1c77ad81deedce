"""A tenant that floods the service costs another little more than one that just fills it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tinker
from tinker import types

from tests.conftest import PROJECT
from tests.servers import TestServer, running_server

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PLACES, FLOOD = 16, 200
NUM_ASKED = 200
MOST_RATIO = 1.5
PROMPT = types.ModelInput.from_ints([504, 3575, 282, 4649])


def p95_seconds(sampler: tinker.SamplingClient) -> float:
    """Of short samples, one after the other."""
    params = types.SamplingParams(max_tokens=8, seed=1, stop=[])
    took = []
    for _ in range(NUM_ASKED):
        started_at = time.monotonic()
        sampler.sample(PROMPT, 1, params).result()
        took.append(time.monotonic() - started_at)
    return float(np.percentile(took, 95))


@contextmanager
def busy(server: TestServer, key: str, num_requests: int) -> Iterator[None]:
    """Keeps so many long completions of another tenant under way."""
    command = [sys.executable, "-m", "tests.integration.flood", server.url, key, str(num_requests)]
    process = subprocess.Popen(command, cwd=PROJECT)
    try:
        time.sleep(3.0)
        yield
        assert process.poll() is None, "the flood ended"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def crowded(
    tiny_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestServer]:
    environ = {"OPENMINT_WORKER_RUNNING_SEQUENCES": str(PLACES)}
    bases = [str(tiny_base("llama"))]
    with running_server(tmp_path_factory.mktemp("fair"), bases=bases, environ=environ) as server:
        yield server


def test_a_flood_costs_another_tenant_at_most_half_more(crowded: TestServer) -> None:
    flood = crowded.make_key("flood")
    with tinker.ServiceClient(base_url=crowded.url, api_key=crowded.make_key("calm")) as calm:
        sampler = calm.create_sampling_client(base_model="tiny-llama").result()
        p95_seconds(sampler)
        with busy(crowded, flood, PLACES - 1):
            filled = p95_seconds(sampler)
        with busy(crowded, flood, FLOOD):
            flooded = p95_seconds(sampler)
    print(f"p95 beside {PLACES - 1}: {1e3 * filled:.0f} ms, beside {FLOOD}: {1e3 * flooded:.0f} ms")
    assert flooded <= MOST_RATIO * filled
