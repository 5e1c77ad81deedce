"""What is likely to be asked for is in memory first: here after a worker was killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from openmint.cluster.worker_client import STATS_SECONDS
from tests.chaos.training import Job
from tests.servers import (
    TestServer,
    running_server,
    start_server,
    stop_server,
    wait_until_ready,
    workers_of,
)

pytestmark = pytest.mark.integration

RANK, PARAMS_PER_RANK = 4, 2 * (448 + 576)
"""Of the tiny base's layers: attention and MLP."""
REVISION_BYTES = 2 * RANK * PARAMS_PER_RANK
POLICIES = [f"default/likely-{i}" for i in range(3)]
WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def server(
    tiny_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestServer]:
    """One with three policies, and host memory for two of them, which is empty at first."""
    root, bases = tmp_path_factory.mktemp("foretelling"), [str(tiny_base("llama"))]
    with (
        running_server(root, bases=bases) as server,
        tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service,
    ):
        for seed, policy in enumerate(POLICIES):
            run = service.create_lora_training_client(
                "tiny-llama",
                rank=RANK,
                seed=seed,
                train_unembed=False,
                user_metadata={"policy": policy.removeprefix("default/")},
            ).result()
            run.forward_backward(Job(seed, "cross_entropy").data(0), "cross_entropy").result()
            run.optim_step(tinker.types.AdamParams(learning_rate=1e-2)).result()
            run.save_weights_for_sampler("one").result()
    # A worker's death is an error in the log of the service.
    environ = {"OPENMINT_WORKER_HOST_BYTES": str(int(2.5 * REVISION_BYTES))}
    server = start_server(root, root / "data", bases=bases, environ=environ)
    try:
        wait_until_ready(server)
        yield server
    finally:
        stop_server(server)


@pytest.fixture(scope="module")
def http(server: TestServer) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_in_memory(http: httpx.Client, policy: str) -> bool:
    found = http.get(f"/catalog/v1/policies/{policy}/revisions/latest").raise_for_status()
    return "host" in found.json()["tiers"]


def stats(server: TestServer) -> dict[str, Any]:
    (base,) = server.worker_stats()
    return base


def say(http: httpx.Client, model: str, **extra: Any) -> None:
    body = {"model": model, "prompt": [504, 3575], "max_tokens": 1, **extra}
    http.post("/v1/completions", json=body).raise_for_status()


def test_what_was_asked_for_often_comes_back_when_the_worker_is_killed(
    server: TestServer, http: httpx.Client
) -> None:
    rare, common, favourite = POLICIES
    for policy in [favourite, common, favourite, rare, favourite, common] * 5:
        say(http, policy)
    time.sleep(2 * STATS_SECONDS)  # the log's last second may be lost
    (worker,) = workers_of(server)
    worker.kill()
    wait_until(lambda: stats(server).get("revision_prefetches") == 2)
    wait_until(lambda: is_in_memory(http, favourite) and is_in_memory(http, common))
    assert not is_in_memory(http, rare)
    for policy in (favourite, common):
        say(http, policy, load_deadline_seconds=0)  # refused if it had to be loaded
    time.sleep(2 * STATS_SECONDS)
    assert stats(server)["revision_loads"] == 2
    say(http, rare)
