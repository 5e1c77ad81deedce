"""The service on PostgreSQL, through `kill -9`: what was acknowledged is in the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from tests.chaos.training import Job
from tests.postgres import PostgresServer
from tests.servers import (
    TestServer,
    gateway_of,
    start_server,
    stop_server,
    wait_until_ready,
)

pytestmark = [pytest.mark.chaos, pytest.mark.integration]

JOB = Job(1, "cross_entropy")
POLICY = f"/catalog/v1/policies/default/{JOB.policy}"


def new_run(service: tinker.ServiceClient) -> tinker.TrainingClient:
    metadata = {"policy": JOB.policy}
    made = service.create_lora_training_client("tiny-llama", 4, seed=1, user_metadata=metadata)
    return made.result()


def update(run: tinker.TrainingClient) -> None:
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()


def save(run: tinker.TrainingClient, name: str) -> str:
    return str(run.save_weights_for_sampler(name).result().path)


def drawn(service: tinker.ServiceClient, path: str) -> list[int]:
    sampler = service.create_sampling_client(model_path=path).result()
    params = types.SamplingParams(max_tokens=12, seed=5, stop=[])
    prompt = types.ModelInput.from_ints([504, 3575, 282])
    return list(sampler.sample(prompt, 1, params).result().sequences[0].tokens)


def ask(server: TestServer, method: str, path: str, **options: Any) -> Any:
    headers = {"X-API-Key": server.admin_key}
    answer = httpx.request(method, f"{server.url}{POLICY}{path}", headers=headers, **options)
    return answer.raise_for_status().json()


@pytest.fixture
def server(
    tiny_base: Callable[[str], Path], tmp_path: Path, postgres: PostgresServer
) -> Iterator[TestServer]:
    with postgres.new_database() as url:
        environ = {"OPENMINT_DATABASE_URL": url}
        bases = [str(tiny_base("llama"))]
        running = start_server(tmp_path, tmp_path / "data", bases=bases, environ=environ)
        try:
            wait_until_ready(running)
            yield running
        finally:
            stop_server(running)


def test_a_client_trains_and_promotes_through_a_killed_gateway(server: TestServer) -> None:
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        run = new_run(service)
        run.forward_backward(JOB.data(0), JOB.loss).result()
        update(run)
        path = save(run, "one")
        tokens = drawn(service, path)
        ask(server, "POST", "/aliases/prod/promote", json={"revision": "latest"})
        aliases, revisions = ask(server, "GET", "/aliases"), ask(server, "GET", "/revisions")
        waiting = run.forward_backward(JOB.data(1), JOB.loss)
        gateway_of(server).kill()
        waiting.result()
        wait_until_ready(server)
        assert ask(server, "GET", "/aliases") == aliases
        assert ask(server, "GET", "/revisions") == revisions
        assert drawn(service, path) == tokens
        update(run)
        assert save(run, "two") != path
    assert len(ask(server, "GET", "/revisions")["items"]) == 2
    assert not (server.data / "openmint.db").exists()
