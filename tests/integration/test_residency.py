"""Where revisions are, and how they get there, over HTTP and the `openai` SDK against a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from openmint.cluster.worker_client import STATS_SECONDS
from tests.integration.trained import (
    REVISION_BYTES,
    http_client,
    revision,
    train,
    wait_for_probes,
    wait_until,
)
from tests.servers import TestServer, running_server

pytestmark = pytest.mark.integration

POLICIES = [f"default/warm-{i}" for i in range(3)]
TIERS = ["store", "host", "slot"]


@pytest.fixture(scope="module")
def server(
    tiny_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestServer]:
    """One with three policies, and host memory for two of them."""
    environ = {"OPENMINT_WORKER_HOST_BYTES": str(int(2.5 * REVISION_BYTES))}
    root = tmp_path_factory.mktemp("residency")
    with running_server(root, bases=[str(tiny_base("llama"))], environ=environ) as server:
        train(server, POLICIES)
        yield server


@pytest.fixture(scope="module")
def http(server: TestServer) -> Iterator[httpx.Client]:
    """A client, once the probes, which look at each new revision, are done."""
    with http_client(server) as client:
        wait_for_probes(client, POLICIES)
        yield client


@pytest.fixture(scope="module")
def client(server: TestServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=server.admin_key, max_retries=0
    ) as client:
        yield client


def say(client: openai.OpenAI, model: str, **extra: Any) -> Any:
    return client.completions.create(model=model, prompt=[504, 3575], max_tokens=2, **extra)


def fill_memory_but(client: openai.OpenAI, cold: str) -> None:
    """Use the other two policies until the cold one has left, which was used as often before."""
    for policy in [each for each in POLICIES if each != cold] * 40:
        say(client, policy)


def test_a_revision_shows_its_tiers(http: httpx.Client, client: openai.OpenAI) -> None:
    fill_memory_but(client, POLICIES[0])
    wait_until(lambda: revision(http, POLICIES[0])["tiers"] == ["store"])
    for policy in POLICIES[1:]:
        wait_until(
            lambda policy=policy: revision(http, policy)["tiers"] == ["store", "host", "slot"]
        )
    (base,) = http.get("/catalog/v1/stats").json()["bases"]
    assert (base["num_resident_revisions"], base["host_bytes"]) == (2, 2 * REVISION_BYTES)


def test_prewarmed_revisions_are_in_memory_before_anybody_asks(
    http: httpx.Client, client: openai.OpenAI
) -> None:
    fill_memory_but(client, POLICIES[0])
    answer = http.post("/catalog/v1/prewarm", json={"models": POLICIES[:1]})
    digest = revision(http, POLICIES[0])["digest"]
    assert answer.json() == {"items": [{"model": POLICIES[0], "digest": digest}]}
    ran = say(client, POLICIES[0], extra_body={"load_deadline_seconds": 0})
    assert ran.openmint["revision"] == digest


def test_what_an_alias_is_moved_to_is_brought_into_memory(
    http: httpx.Client, client: openai.OpenAI
) -> None:
    fill_memory_but(client, POLICIES[1])
    path = f"/catalog/v1/policies/{POLICIES[1]}/aliases/prod/promote"
    moved = http.post(path, json={"revision": revision(http, POLICIES[1])["digest"]})
    assert moved.status_code == 200
    wait_until(lambda: "host" in revision(http, POLICIES[1])["tiers"])


def test_a_cold_revision_that_cannot_be_there_in_time_is_refused_with_a_time(
    client: openai.OpenAI,
) -> None:
    fill_memory_but(client, POLICIES[2])
    with pytest.raises(openai.InternalServerError) as refused:
        say(client, POLICIES[2], extra_body={"load_deadline_seconds": 0})
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert "not in memory" in refused.value.message
    assert say(client, POLICIES[2]).openmint["policy"] == POLICIES[2]


def test_a_thousand_who_want_the_same_cold_revision_cause_one_load(
    server: TestServer, http: httpx.Client, client: openai.OpenAI
) -> None:
    fill_memory_but(client, POLICIES[1])
    wait_until(lambda: revision(http, POLICIES[1])["tiers"] == ["store"])
    before = num_loads(http)
    asyncio.run(ask_at_once(server, POLICIES[1], 1_000, revision(http, POLICIES[1])["digest"]))
    time.sleep(2 * STATS_SECONDS)
    assert num_loads(http) == before + 1


def num_loads(http: httpx.Client) -> int:
    (base,) = http.get("/catalog/v1/stats").json()["bases"]
    count: int = base["revision_loads"]
    return count


async def ask_at_once(server: TestServer, model: str, count: int, expected: str) -> None:
    """So many answers by the expected revision."""
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    limits = httpx.Limits(max_connections=count)
    body = {"model": model, "prompt": [504, 3575], "max_tokens": 1}
    async with httpx.AsyncClient(
        base_url=server.url, headers=headers, limits=limits, timeout=120.0
    ) as asking:
        answers = await asyncio.gather(
            *(asking.post("/v1/completions", json=body) for _ in range(count))
        )
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["X-OpenMint-Revision"] for answer in answers} == {expected}


def test_how_urgent_a_request_is_has_openais_names(client: openai.OpenAI) -> None:
    assert say(client, POLICIES[0], extra_body={"service_tier": "flex"}).choices
    with pytest.raises(openai.BadRequestError, match="auto, default, priority, flex"):
        say(client, POLICIES[0], extra_body={"service_tier": "soon"})


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"models": []}, 400),
        ({"models": [POLICIES[0]] * 257}, 400),
        ({"models": ["default/nobody"]}, 404),
        ({"models": ["someone/else"]}, 404),
        ({"models": [POLICIES[0]], "load_deadline_seconds": -1}, 400),
    ],
)
def test_bad_prewarms_are_refused(http: httpx.Client, body: Any, status: int) -> None:
    assert http.post("/catalog/v1/prewarm", json=body).status_code == status


def test_a_base_needs_no_prewarm(http: httpx.Client) -> None:
    answer = http.post("/catalog/v1/prewarm", json={"models": ["tiny-llama"]})
    assert (answer.status_code, "in memory always" in answer.text) == (400, True)
