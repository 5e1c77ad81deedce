"""Requests of a run are done in the order of their seq_ids, or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.test_isolation import LOSS
from tests.servers import running_server

pytestmark = pytest.mark.integration

GAP_SECONDS = 0.5


class Run:
    """A run over plain HTTP, so that seq_ids can be sent in any order."""

    def __init__(self, http: httpx.Client, number: int) -> None:
        self.http = http
        session = http.post("/api/v1/create_session", json={}).json()["session_id"]
        body = {
            "session_id": session,
            "model_seq_id": number,
            "base_model": "tiny-llama",
            "lora_config": {"rank": 1, "seed": 1},
        }
        created = http.post("/api/v1/create_model", json=body).json()
        self.model_id = created["model_id"]
        self.wait(created["request_id"])

    def ask(self, name: str, seq: int | None, **body: Any) -> httpx.Response:
        named = {"model_id": self.model_id, "seq_id": seq}
        return self.http.post(f"/api/v1/{name}", json={**named, **body})

    def learn(self, seq: int | None) -> httpx.Response:
        return self.ask("forward_backward", seq, forward_backward_input=LOSS)

    def update(self, seq: int | None, rate: float = 1e-2) -> httpx.Response:
        return self.ask("optim_step", seq, adam_params={"learning_rate": rate})

    def wait(self, request_id: str) -> dict[str, Any]:
        asked = {"request_id": request_id}
        headers = {"Accept": "application/json"}
        while True:
            answer = self.http.post("/api/v1/retrieve_future", json=asked, headers=headers)
            if answer.status_code != 408:
                return dict(answer.json())

    def result(self, answer: httpx.Response) -> dict[str, Any]:
        assert answer.status_code == 200, answer.text
        return self.wait(answer.json()["request_id"])


@pytest.fixture(scope="module")
def http(
    tiny_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    environ = {"OPENMINT_SERVICE_SEQ_GAP_SECONDS": str(GAP_SECONDS)}
    bases = [str(tiny_base("llama"))]
    with running_server(tmp_path_factory.mktemp("order"), bases=bases, environ=environ) as server:
        headers = {"X-API-Key": server.admin_key}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60.0) as client:
            yield client


def norms_of(run: Run, seqs: list[int]) -> list[float]:
    """Two passes and two updates, sent in this order of their seq_ids."""
    sent = {}
    with ThreadPoolExecutor(len(seqs)) as pool:
        for seq in seqs:
            send = run.learn if seq % 2 else run.update
            sent[seq] = pool.submit(send, seq)
            time.sleep(0.05)
        answers = {seq: run.result(each.result()) for seq, each in sent.items()}
    return [answers[seq]["metrics"]["grad_norm:max"] for seq in (2, 4)]


def test_seq_ids_that_arrive_in_another_order_are_done_in_theirs(http: httpx.Client) -> None:
    expected = norms_of(Run(http, 0), [1, 2, 3, 4])
    assert norms_of(Run(http, 0), [3, 1, 4, 2]) == expected


def test_one_that_comes_too_late_is_refused_and_changes_nothing(http: httpx.Client) -> None:
    run = Run(http, 0)
    run.result(run.learn(1))
    ahead = run.update(3)
    norm = run.result(ahead)["metrics"]["grad_norm:max"]
    late = run.learn(2)
    assert late.status_code == 410, late.text
    assert "came after later ones" in late.json()["detail"]
    again = run.update(3)
    assert again.json()["request_id"] == ahead.json()["request_id"]
    run.result(run.learn(4))
    other = Run(http, 0)
    other.result(other.learn(1))
    assert other.result(other.update(2))["metrics"]["grad_norm:max"] == norm
    other.result(other.learn(3))
    both = [each.result(each.update(None))["metrics"] for each in (run, other)]
    assert both[0] == both[1]
