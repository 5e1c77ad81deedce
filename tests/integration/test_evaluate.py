"""Evaluations on a real server: started, polled, repeated, refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.servers import TestServer

pytestmark = pytest.mark.integration

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
TASK = {
    "name": "capitals",
    "scorer": "contains",
    "max_tokens": 16,
    "items": [
        {
            "messages": [{"role": "user", "content": f"What is the capital of {country}?"}],
            "answer": capital,
        }
        for country, capital in CAPITALS.items()
    ],
}


@pytest.fixture(scope="module")
def http(server: TestServer) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {server.make_key('examiner', 'train')}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


def start(http: httpx.Client, server: TestServer, **fields: Any) -> httpx.Response:
    return http.post("/catalog/v1/evaluations", json={"model": server.base, "task": TASK, **fields})


def finished(http: httpx.Client, evaluation_id: int) -> dict[str, Any]:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        found: dict[str, Any] = http.get(f"/catalog/v1/evaluations/{evaluation_id}").json()
        if found["status"] != "running":
            return found
        assert found["progress"]["num_done"] <= 4
        time.sleep(0.2)
    raise AssertionError(found)


def test_the_base_knows_capitals_twice_alike(http: httpx.Client, server: TestServer) -> None:
    scores = []
    for _ in range(2):
        begun = start(http, server, seed=5)
        assert begun.status_code == 202
        done = finished(http, begun.json()["evaluation_id"])
        assert done["status"] == "finished", done
        assert (done["n"], done["revision"], done["seed"]) == (4, None, 5)
        low, high = done["interval_95"]
        assert low <= done["score"] <= high
        scores.append(done["num_correct"])
    assert scores[0] == scores[1] >= 1
    assert done["task_digest"].startswith("sha256:")


def test_a_stored_task_is_used_by_name_and_digest(http: httpx.Client, server: TestServer) -> None:
    kept = http.post("/catalog/v1/tasks", json=TASK)
    assert kept.status_code == 201 and kept.json()["num_items"] == 4
    for reference in ("capitals", kept.json()["digest"]):
        shown = http.get(f"/catalog/v1/tasks/{reference}").json()
        assert len(shown["task"]["items"]) == 4
        begun = start(http, server, task=reference, n=2).json()
        assert finished(http, begun["evaluation_id"])["n"] == 2
    listed = http.get("/catalog/v1/evaluations", params={"task": "capitals", "limit": 1}).json()
    assert len(listed["items"]) == 1 and listed["next_cursor"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"n": 5}, 400),
        ({"n": 0}, 400),
        ({"temperature": -1}, 400),
        ({"task": "unknown"}, 404),
        ({"task": {**TASK, "scorer": "eval"}}, 400),
        ({"model": "nobody/nothing"}, 404),
        ({"surprise": 1}, 400),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    http: httpx.Client, server: TestServer, fields: dict[str, Any], status: int
) -> None:
    answer = start(http, server, **fields)
    assert answer.status_code == status
    assert answer.json()["detail"]


def test_an_item_that_does_not_fit_fails_the_evaluation(
    http: httpx.Client, server: TestServer
) -> None:
    task = {**TASK, "max_tokens": 100_000}
    done = finished(http, start(http, server, task=task).json()["evaluation_id"])
    assert done["status"] == "failed" and "max_tokens" in done["error"]
    assert done["score"] is None
