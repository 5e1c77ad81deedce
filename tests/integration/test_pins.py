"""Pinned aliases on a real server whose memory is small: floods, deaths, moves, limits."""

from __future__ import annotations

import os
import signal
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
    wait_for_probes,
    wait_until,
)
from tests.servers import (
    TestServer,
    gateway_of,
    mortal_server,
    run_cli,
    run_cli_json,
    wait_until_ready,
    workers_of,
)

pytestmark = pytest.mark.integration

POLICIES = [f"default/pinned-{i}" for i in range(6)]
FLOOD = POLICIES[1:]
"""One more than have room beside one that is pinned."""


@pytest.fixture(scope="module")
def server(
    tiny_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestServer]:
    """One with host memory for five revisions, of which two may be pinned. The first policy has
    two, and `prod` names its first."""
    environ = {
        "OPENMINT_WORKER_HOST_BYTES": str(5 * REVISION_BYTES),
        "OPENMINT_SERVICE_TENANT_PIN_SHARE": "0.5",
    }
    root, bases = tmp_path_factory.mktemp("pins"), [str(tiny_base("llama"))]
    with mortal_server(root, bases=bases, environ=environ) as server:
        train(server, POLICIES[:1], num_revisions=2)
        train(server, POLICIES[1:])
        yield server


@pytest.fixture(scope="module")
def http(server: TestServer) -> Iterator[httpx.Client]:
    """A client, once the probes, which look at each new revision, are done."""
    with http_client(server) as client:
        wait_for_probes(client, POLICIES)
        promote(client, revisions_of(client)[0])
        yield client


def revisions_of(http: httpx.Client) -> list[str]:
    """The first policy's, oldest first."""
    items = http.get(f"/catalog/v1/policies/{POLICIES[0]}/revisions").json()["items"]
    return [item["digest"] for item in reversed(items)]


def promote(http: httpx.Client, digest: str) -> None:
    path = f"/catalog/v1/policies/{POLICIES[0]}/aliases/prod/promote"
    http.post(path, json={"revision": digest}).raise_for_status()


def pin(http: httpx.Client, policy: str = POLICIES[0], alias: str = "prod") -> httpx.Response:
    return http.put(f"/catalog/v1/policies/{policy}/aliases/{alias}/pin")


def pinned(http: httpx.Client) -> dict[str, list[tuple[str, str]]]:
    """Of each pinned alias its revisions and where they are."""
    items = http.get("/catalog/v1/pins").raise_for_status().json()["items"]
    return {
        f"{item['policy']}@{item['alias']}": [(r["digest"], r["state"]) for r in item["revisions"]]
        for item in items
    }


def is_held(http: httpx.Client, *digests: str) -> Callable[[], bool]:
    name = f"{POLICIES[0]}@prod"
    return lambda: pinned(http)[name] == [(digest, "held") for digest in digests]


def say(http: httpx.Client, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": [504, 3575], "max_tokens": 1, **more}
    return http.post("/v1/completions", json=body)


def flood(http: httpx.Client) -> None:
    """Ask for more than has room, until whoever may leave has left."""
    for policy in FLOOD * 30:
        assert say(http, policy).status_code == 200


def assert_at_hand(http: httpx.Client, digest: str) -> None:
    """Who asks for the pinned one waits for no load."""
    answer = say(http, f"{POLICIES[0]}@prod", load_deadline_seconds=0)
    assert (answer.status_code, answer.headers["X-OpenMint-Revision"]) == (200, digest)


def num_loads(http: httpx.Client) -> int:
    time.sleep(2 * STATS_SECONDS)
    (base,) = http.get("/catalog/v1/stats").json()["bases"]
    count: int = base["revision_loads"]
    return count


def test_a_pinned_revision_stays_through_a_flood_and_costs_no_load(http: httpx.Client) -> None:
    assert pin(http).status_code == 200
    first, _ = revisions_of(http)
    wait_until(is_held(http, first))
    before = num_loads(http)
    flood(http)
    after = num_loads(http)
    assert after > before
    assert_at_hand(http, first)
    assert num_loads(http) == after


def test_it_comes_back_by_itself_after_the_worker_was_killed(
    server: TestServer, http: httpx.Client
) -> None:
    (worker,) = workers_of(server)
    worker.kill()
    worker.wait()
    first, _ = revisions_of(http)
    wait_until(is_held(http, first))
    assert_at_hand(http, first)
    flood(http)
    assert_at_hand(http, first)


def test_it_comes_back_by_itself_after_all_processes_were_killed(
    server: TestServer, http: httpx.Client
) -> None:
    gateway = gateway_of(server)
    for process in (gateway, *workers_of(server)):
        os.kill(process.pid, signal.SIGKILL)
    gateway.wait()
    wait_until_ready(server)
    first, _ = revisions_of(http)
    wait_until(is_held(http, first))
    assert_at_hand(http, first)


def test_moves_of_the_alias_move_what_is_held(http: httpx.Client) -> None:
    first, second = revisions_of(http)
    canary = f"/catalog/v1/policies/{POLICIES[0]}/aliases/prod/canary"
    http.put(canary, json={"revision": second, "share": 0.5}).raise_for_status()
    wait_until(is_held(http, first, second))
    http.post(f"{canary}/finish", json={}).raise_for_status()
    wait_until(is_held(http, second))
    flood(http)
    assert_at_hand(http, second)
    wait_until(lambda: revision(http, POLICIES[0], first)["tiers"] == ["store"])
    rollback = f"/catalog/v1/policies/{POLICIES[0]}/aliases/prod/rollback"
    http.post(rollback, json={}).raise_for_status()
    wait_until(is_held(http, first))


def test_pins_take_no_more_than_their_share(http: httpx.Client) -> None:
    assert pin(http, POLICIES[1], "latest").status_code == 200
    refused = pin(http, POLICIES[2], "latest")
    assert (refused.status_code, refused.headers["content-type"]) == (
        409,
        "application/problem+json",
    )
    for told in (str(int(2.5 * REVISION_BYTES)), str(2 * REVISION_BYTES), "Unpin an alias"):
        assert told in refused.json()["detail"]
    # A move is never refused: what finds no room waits, and the list says so.
    _, second = revisions_of(http)
    canary = f"/catalog/v1/policies/{POLICIES[0]}/aliases/prod/canary"
    http.put(canary, json={"revision": second, "share": 0.5}).raise_for_status()
    name = f"{POLICIES[1]}@latest"
    wait_until(lambda: pinned(http)[name][0][1] == "over_limit")
    http.post(f"{canary}/abort", json={}).raise_for_status()
    wait_until(lambda: pinned(http)[name][0][1] == "held")


def test_the_command_line_pins_lists_and_unpins(server: TestServer, http: httpx.Client) -> None:
    environ = {"OPENMINT_URL": server.url, "OPENMINT_API_KEY": server.admin_key}
    assert "over" not in run_cli("pins", environ=environ).stdout
    run_cli("pin", POLICIES[2], "--alias", "latest", code=4, environ=environ)
    run_cli("unpin", POLICIES[1], "--alias", "latest", environ=environ)
    run_cli("unpin", POLICIES[0], environ=environ)
    assert run_cli_json("pins", environ=environ) == []
    shown = run_cli("pin", POLICIES[0], environ=environ).stdout
    assert f"{POLICIES[0]}@prod" in shown
    items = http.get("/catalog/v1/audit", params={"limit": 3}).json()["items"]
    assert [item["action"] for item in items] == ["alias.pin", "alias.unpin", "alias.unpin"]
