"""`kill -9` of the gateway while clients ask: once it is back they get their answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.chaos.asking import check_samples_outlive
from tests.servers import (
    TestServer,
    gateway_of,
    start_server,
    stop_server,
    wait_until_ready,
)

pytestmark = [pytest.mark.chaos, pytest.mark.integration]


def test_samples_of_the_tinker_sdk_outlive_a_killed_gateway(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    server = start_server(tmp_path, tmp_path / "data", bases=[str(tiny_base("llama"))])
    try:
        wait_until_ready(server)
        check_samples_outlive(gateway_of(server).kill, server)
    finally:
        stop_server(server)


def test_a_restarted_gateway_takes_requests_while_its_bases_load(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    """What is asked meanwhile waits, and is answered: never a 503."""
    server = start_server(tmp_path, tmp_path / "data", bases=[str(tiny_base("llama"))])
    try:
        wait_until_ready(server)
        headers = {"X-API-Key": server.admin_key}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60.0) as http:
            session = http.post("/api/v1/create_session", json={}).json()["session_id"]
            gateway_of(server).kill()
            states = [_readiness(server)]
            body = {
                "session_id": session,
                "model_seq_id": 0,
                "base_model": "tiny-llama",
                "lora_config": {"rank": 1},
            }
            created = http.post("/api/v1/create_model", json=body)
            states.append(_readiness(server))
            assert states == [503, 503], "the base was there already; nothing was tried"
            assert created.status_code == 200, created.text
            asked = {"request_id": created.json()["request_id"]}
            while (answer := http.post("/api/v1/retrieve_future", json=asked)).status_code == 408:
                pass
            assert answer.json()["model_id"] == f"{session}:train:0"
            text = {"model": "tiny-llama", "prompt": [504, 3575], "max_tokens": 4}
            assert http.post("/v1/completions", json=text).status_code == 200
    finally:
        stop_server(server)


def _readiness(server: TestServer) -> int:
    """The status of /readyz, once the gateway answers at all."""
    while True:
        try:
            return httpx.get(f"{server.url}/readyz", timeout=30.0).status_code
        except httpx.TransportError:
            time.sleep(0.01)
