"""Two workers of one base: one trains, both serve, and a revision is read by one of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from openmint.cluster.worker_client import STATS_SECONDS
from tests.integration.trained import train
from tests.servers import (
    READY_SECONDS,
    TestServer,
    mortal_server,
    running_server,
    workers_of,
)

pytestmark = pytest.mark.integration

POLICIES = [f"default/there-{number}" for number in range(8)]
NUM_ASKED = 200


@pytest.fixture(scope="module")
def server(
    tiny_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestServer]:
    root, bases = tmp_path_factory.mktemp("replicas"), [str(tiny_base("llama"))]
    with running_server(root, bases=bases) as server:
        train(server, POLICIES)
    # Again, with two workers whose memories are empty.
    with mortal_server(root, bases=bases, environ={"OPENMINT_REPLICAS": "2"}) as server:
        deadline = time.monotonic() + READY_SECONDS
        while sum(worker["alive"] for worker in server.worker_stats()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield server


async def ask(server: TestServer, models: list[str]) -> list[tuple[str, str]]:
    """The revision and the text of an answer of each of these models, all asked at once."""
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    limits = httpx.Limits(max_connections=len(models))
    async with httpx.AsyncClient(
        base_url=server.url, headers=headers, limits=limits, timeout=120.0
    ) as http:

        async def one(model: str) -> tuple[str, str]:
            body = {"model": model, "prompt": [504, 3575], "max_tokens": 8, "seed": 1}
            answer = (await http.post("/v1/completions", json=body)).raise_for_status()
            return answer.headers["X-OpenMint-Revision"], answer.json()["choices"][0]["text"]

        return await asyncio.gather(*map(one, models))


def wanted(server: TestServer, policy: str) -> str:
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    url = f"{server.url}/catalog/v1/policies/{policy}/revisions/latest"
    digest: str = httpx.get(url, headers=headers).raise_for_status().json()["digest"]
    return digest


def test_both_serve_each_revision_is_read_once_and_one_may_die(server: TestServer) -> None:
    models = [POLICIES[number % len(POLICIES)] for number in range(NUM_ASKED)]
    answers = asyncio.run(ask(server, models))
    expected = {policy: wanted(server, policy) for policy in POLICIES}
    assert [revision for revision, _ in answers] == [expected[model] for model in models]
    for policy in POLICIES:
        texts = {text for model, (_, text) in zip(models, answers, strict=True) if model == policy}
        assert len(texts) == 1, "workers draw the same tokens"
    time.sleep(2 * STATS_SECONDS)  # what workers say is about a second old
    both = server.worker_stats()
    assert [worker["replica"] for worker in both] == [0, 1]
    assert sum(worker["revision_loads"] for worker in both) == len(POLICIES)
    assert all(worker["generated_tokens"] > 0 for worker in both)
    # One of them dies under load: what waits for it is drawn again, what comes goes to the other.
    for victim in workers_of(server):
        victim.kill()
        again = asyncio.run(ask(server, models))
        assert again == answers


def test_each_of_them_holds_what_is_pinned_and_so_does_its_successor(server: TestServer) -> None:
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    with httpx.Client(base_url=f"{server.url}/catalog/v1", headers=headers) as http:

        def wait_for(state: str) -> None:
            deadline = time.monotonic() + READY_SECONDS
            while True:
                (pin,) = http.get("/pins").raise_for_status().json()["items"]
                if pin["revisions"][0]["state"] == state:
                    return
                assert time.monotonic() < deadline
                time.sleep(0.1)

        http.put(f"/policies/{POLICIES[0]}/aliases/latest/pin").raise_for_status()
        wait_for("held")
        assert [worker["num_resident_revisions"] > 0 for worker in server.worker_stats()] == [
            True,
            True,
        ]
        for victim in workers_of(server):
            victim.kill()
        wait_for("loading")
        wait_for("held")
