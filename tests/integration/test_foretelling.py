"""What is likely to be asked for is in memory first: here after a worker was killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from openmint.cluster.worker_client import STATS_SECONDS
from tests.integration.trained import (
    REVISION_BYTES,
    http_client,
    revision,
    train,
    wait_until,
)
from tests.servers import (
    TestServer,
    mortal_server,
    running_server,
    workers_of,
)

pytestmark = pytest.mark.integration

POLICIES = [f"default/likely-{i}" for i in range(3)]


@pytest.fixture(scope="module")
def server(
    tiny_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestServer]:
    """One with three policies, and host memory for two of them, which is empty at first."""
    root, bases = tmp_path_factory.mktemp("foretelling"), [str(tiny_base("llama"))]
    with running_server(root, bases=bases) as server:
        train(server, POLICIES)
    environ = {"OPENMINT_WORKER_HOST_BYTES": str(int(2.5 * REVISION_BYTES))}
    with mortal_server(root, bases=bases, environ=environ) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: TestServer) -> Iterator[httpx.Client]:
    with http_client(server) as client:
        yield client


def is_in_memory(http: httpx.Client, policy: str) -> bool:
    return "host" in revision(http, policy)["tiers"]


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
