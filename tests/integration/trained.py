"""Policies to ask for: trained through the Tinker SDK, of one size, so that memory for a number of
them is known. And how tests of residency look at them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import httpx
import tinker

from tests.chaos.training import Job
from tests.servers import TestServer

RANK, PARAMS_PER_RANK = 4, 2 * (448 + 576)
"""Of the tiny base's layers: attention and MLP."""
REVISION_BYTES = 2 * RANK * PARAMS_PER_RANK
WAIT_SECONDS = 60.0


def train(server: TestServer, policies: Sequence[str], *, num_revisions: int = 1) -> None:
    """Make these policies of the tenant `default`, with so many revisions each, a step apart."""
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        for policy in policies:
            seed = crc32(policy.encode())  # no two are alike
            run = service.create_lora_training_client(
                "tiny-llama",
                rank=RANK,
                seed=seed,
                train_unembed=False,
                user_metadata={"policy": policy.removeprefix("default/")},
            ).result()
            for number in range(num_revisions):
                run.forward_backward(Job(seed, "cross_entropy").data(0), "cross_entropy").result()
                run.optim_step(tinker.types.AdamParams(learning_rate=1e-2)).result()
                run.save_weights_for_sampler(f"save-{number}").result()


@contextmanager
def http_client(server: TestServer) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


def wait_for_probes(http: httpx.Client, policies: Sequence[str]) -> None:
    """Probes look at each new revision, which loads it."""
    wait_until(lambda: all(revision(http, policy)["drift"] is not None for policy in policies))


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def revision(http: httpx.Client, policy: str, reference: str = "latest") -> dict[str, Any]:
    path = f"/catalog/v1/policies/{policy}/revisions/{reference}"
    found: dict[str, Any] = http.get(path).raise_for_status().json()
    return found
