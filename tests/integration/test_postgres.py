"""The service on PostgreSQL, through `kill -9` and from a dump: what was acknowledged is in the
database."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import tinker
from tinker import types

from openmint.catalog.address import TinkerPath
from openmint.catalog.catalog import Catalog
from tests.chaos.training import Job, T
from tests.postgres import PostgresServer
from tests.servers import (
    TestServer,
    free_port,
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
def database(postgres: PostgresServer) -> Iterator[str]:
    """The URL of an empty one."""
    with postgres.new_database() as url:
        yield url


@pytest.fixture
def server(tiny_base: Callable[[str], Path], tmp_path: Path, database: str) -> Iterator[TestServer]:
    with serving(tmp_path, tiny_base("llama"), database) as running:
        yield running


@contextmanager
def serving(root: Path, base: Path, database: str, port: int | None = None) -> Iterator[TestServer]:
    environ = {"OPENMINT_DATABASE_URL": database, "OPENMINT_SERVICE_SEQ_GAP_SECONDS": "0.5"}
    running = start_server(root, root / "data", bases=[str(base)], environ=environ, port=port)
    try:
        wait_until_ready(running)
        yield running
    finally:
        stop_server(running)


def digest_of(database: str, path: str) -> str:
    catalog, at = Catalog.open(database), TinkerPath.parse(path)
    try:
        return str(catalog.checkpoint(T, at.run_id, at.segment, at.name).digest)
    finally:
        catalog.close()


def test_a_dump_and_a_copy_of_the_folder_go_on_from_there(
    tiny_base: Callable[[str], Path], tmp_path: Path, database: str, postgres: PostgresServer
) -> None:
    """As docs/operations.md has it; then both are lost."""
    base, port, copy = tiny_base("llama"), free_port(), tmp_path / "copy"
    with serving(tmp_path, base, database, port) as server:
        service = tinker.ServiceClient(base_url=server.url, api_key=server.admin_key)
        run = new_run(service)
        for step in range(2):
            run.forward_backward(JOB.data(step), JOB.loss)
            update(run)
        path = save(run, "one")
        tokens = drawn(service, path)
        ask(server, "POST", "/aliases/prod/promote", json={"revision": "latest"})
        aliases = ask(server, "GET", "/aliases")
        copy.mkdir()
        dump = ("--format=custom", "--file", str(copy / "catalogue.dump"), database)
        subprocess.run([postgres.binaries / "pg_dump", *dump], check=True)
        shutil.copytree(server.data, copy / "data", ignore=shutil.ignore_patterns("bases"))
        expected = digest_of(database, str(run.save_state("after").result().path))
    shutil.rmtree(server.data)
    shutil.copytree(copy / "data", server.data)
    with postgres.new_database() as restored:
        restore = (
            "--exit-on-error",
            "--no-owner",
            "--dbname",
            restored,
            str(copy / "catalogue.dump"),
        )
        subprocess.run([postgres.binaries / "pg_restore", *restore], check=True)
        with serving(tmp_path, base, restored, port) as server, service:
            assert ask(server, "GET", "/aliases") == aliases
            assert drawn(service, path) == tokens
            again = str(run.save_state("again").result().path)
            assert digest_of(restored, again) == expected
            with (
                pytest.raises(psycopg.errors.IntegrityConstraintViolation),
                psycopg.connect(restored) as sql,
            ):
                sql.execute("DELETE FROM audit_event")


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
