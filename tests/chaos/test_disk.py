"""The disk is full, or the catalogue is locked: nothing is acknowledged that isn't kept, what needs
no disk goes on, and so does everything once there is room."""

from __future__ import annotations

import resource
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import tinker
from tinker import types

from tests.chaos.training import Job, digests_of
from tests.servers import (
    TestServer,
    gateway_of,
    start_server,
    stop_server,
    wait_until_ready,
    workers_of,
)

pytestmark = [pytest.mark.chaos, pytest.mark.integration]

JOB = Job(5, "cross_entropy")
SMALL_BYTES = 100


@pytest.fixture(scope="module")
def server(
    tiny_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestServer]:
    root = tmp_path_factory.mktemp("disk")
    running = start_server(root, root / "data", bases=[str(tiny_base("llama"))])
    try:
        wait_until_ready(running)
        yield running
    finally:
        stop_server(running)


@contextmanager
def full_disk_for(process: psutil.Process) -> Iterator[None]:
    """The process can make no file longer; to it, this is a disk without room."""
    limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (SMALL_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)


def new_run(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client("tiny-llama", rank=2, seed=5).result()


def step(run: tinker.TrainingClient, number: int) -> None:
    run.forward_backward(JOB.data(number), JOB.loss).result()
    update(run)


def update(run: tinker.TrainingClient) -> None:
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()


def saved(server: TestServer, run: tinker.TrainingClient) -> str:
    return digests_of(server.data, [run.save_state("end").result().path])[0]


def completes(server: TestServer) -> bool:
    body = {"model": "tiny-llama", "prompt": [504, 3575], "max_tokens": 4}
    headers = {"X-API-Key": server.admin_key}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).is_success


@pytest.fixture(scope="module")
def expected(server: TestServer) -> str:
    """Of three steps on a disk with room."""
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        run = new_run(service)
        for number in range(3):
            step(run, number)
        return saved(server, run)


def test_an_update_that_finds_no_room_fails_and_keeps_its_gradient(
    server: TestServer, expected: str
) -> None:
    (worker,) = workers_of(server)
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        run = new_run(service)
        step(run, 0)
        run.forward_backward(JOB.data(1), JOB.loss).result()
        with full_disk_for(worker):
            with pytest.raises(tinker.TinkerError, match="could not be logged"):
                update(run)
            assert completes(server)
        update(run)
        step(run, 2)
        assert saved(server, run) == expected


def test_requests_that_find_no_room_are_503_and_clients_go_on_later(
    server: TestServer, expected: str
) -> None:
    gateway, headers = gateway_of(server), {"X-API-Key": server.admin_key}
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        run = new_run(service)
        step(run, 0)
        with full_disk_for(gateway):
            session = httpx.post(f"{server.url}/api/v1/create_session", json={}, headers=headers)
            assert session.status_code == 503
            assert "database failed" in session.json()["detail"]
            assert completes(server)
            waiting = run.forward_backward(JOB.data(1), JOB.loss)
            time.sleep(2.0)
            assert not waiting.future().done()
        waiting.result()
        update(run)
        step(run, 2)
        assert saved(server, run) == expected


def test_a_locked_catalogue_is_waited_for(server: TestServer, expected: str) -> None:
    """Another program writes to the file for longer than a transaction waits."""
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        run = new_run(service)
        step(run, 0)
        is_locked, is_over = threading.Event(), threading.Event()

        def lock() -> None:
            with closing(sqlite3.connect(server.data / "openmint.db")) as other:
                other.execute("BEGIN IMMEDIATE")
                is_locked.set()
                is_over.wait()
                other.rollback()

        locking = threading.Thread(target=lock)
        locking.start()
        is_locked.wait()
        waiting = run.forward_backward(JOB.data(1), JOB.loss)
        assert completes(server)
        time.sleep(6.0)
        is_over.set()
        locking.join()
        waiting.result()
        update(run)
        step(run, 2)
        assert saved(server, run) == expected
