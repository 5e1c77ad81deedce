"""`openmint serve` as an operator meets it: start, readiness, refusals, restart, stop."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from openmint.cli.serve import bound_socket
from openmint.config import Settings
from tests.servers import (
    TestServer,
    free_port,
    run_cli,
    running_server,
    start_server,
    stop_server,
    wait_until_ready,
    workers_of,
)

pytestmark = pytest.mark.integration

TinyBase = Callable[[str], Path]


@pytest.fixture(scope="module")
def tiny_server(
    tiny_base: TinyBase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestServer]:
    bases = [str(tiny_base("llama")), str(tiny_base("qwen3"))]
    with running_server(tmp_path_factory.mktemp("tiny-server"), bases=bases) as running:
        yield running


def test_several_bases_are_resident_and_listed(tiny_server: TestServer) -> None:
    ready = httpx.get(f"{tiny_server.url}/readyz").json()
    assert set(ready["bases"]) == {"tiny-llama", "tiny-qwen3"}
    assert len(workers_of(tiny_server)) == 2


def test_the_first_start_makes_an_admin_key_for_its_owner_alone(tiny_server: TestServer) -> None:
    path = tiny_server.data / "admin.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    headers = {"Authorization": f"Bearer {tiny_server.admin_key}"}
    assert httpx.get(f"{tiny_server.url}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{tiny_server.url}/v1/models").status_code == 401


def test_the_start_up_text_says_where_it_is_and_what_to_export(tiny_server: TestServer) -> None:
    text = tiny_server.log.read_text()
    assert f"export TINKER_BASE_URL={tiny_server.url}" in text
    assert str(tiny_server.data / "admin.key") in text
    assert tiny_server.admin_key not in text


def test_client_files_hold_the_tokenizer_and_no_weights(tiny_server: TestServer) -> None:
    files = {path.name for path in (tiny_server.client_dir / "tiny-llama").iterdir()}
    assert {"config.json", "tokenizer.json"} <= files
    assert "model.safetensors" not in files


def test_metrics_name_routes_by_template_and_workers_by_base(tiny_server: TestServer) -> None:
    headers = {"Authorization": f"Bearer {tiny_server.admin_key}"}
    httpx.get(f"{tiny_server.url}/catalog/v1/policies/acme/nothing", headers=headers)
    httpx.get(f"{tiny_server.url}/no/such/route")
    text = httpx.get(f"{tiny_server.url}/metrics").text
    assert 'openmint_worker_up{model_name="tiny-llama"} 1.0' in text
    assert 'route="/catalog/v1/policies/{tenant}/{name}",status="4xx"' in text
    assert 'route="(none)",status="4xx"' in text
    assert "acme" not in text


def test_connections_send_small_packets_at_once() -> None:
    with bound_socket(Settings(port=0)) as listener:
        # What asyncio looks at before it turns Nagle's algorithm off.
        assert listener.proto == socket.IPPROTO_TCP


def test_a_second_server_on_the_folder_is_refused(tiny_server: TestServer) -> None:
    data, port = str(tiny_server.data), str(free_port())
    failed = run_cli("serve", "--data", data, "--port", port, code=4)
    assert "another server uses" in failed.stderr


def test_a_taken_port_is_named_with_the_remedy(tiny_server: TestServer, tmp_path: Path) -> None:
    port = tiny_server.url.rsplit(":", 1)[1]
    failed = run_cli("serve", "--data", str(tmp_path / "d"), "--port", port, code=1)
    assert "--port" in failed.stderr


def test_an_open_address_without_keys_is_refused(tmp_path: Path) -> None:
    failed = run_cli("serve", "--host", "0.0.0.0", "--data", str(tmp_path / "d"), code=2)
    assert "openmint keys create" in failed.stderr
    assert not (tmp_path / "d" / "admin.key").exists()


def test_a_folder_that_is_no_base_is_refused_at_once(tmp_path: Path) -> None:
    failed = run_cli("serve", "--base", str(tmp_path), "--data", str(tmp_path / "d"), code=2)
    assert "local Hugging Face folder" in failed.stderr


def test_a_database_that_is_away_is_named_with_the_remedy(
    tiny_base: TinyBase, tmp_path: Path
) -> None:
    environ = {"OPENMINT_DATABASE_URL": "postgresql://ann:secret@127.0.0.1:1/db"}
    arguments = ("--port", "0", "--base", str(tiny_base("llama")), "--data", str(tmp_path / "d"))
    failed = run_cli("serve", *arguments, code=1, environ=environ)
    assert "can't open the catalogue at postgresql://ann:***@127.0.0.1:1/db" in failed.stderr
    assert "correct database_url" in failed.stderr
    assert "secret" not in failed.stderr


def test_two_bases_of_one_name_are_refused_at_once(tiny_base: TinyBase, tmp_path: Path) -> None:
    base = tiny_base("llama")
    twin = tmp_path / "elsewhere" / base.name
    shutil.copytree(base, twin)
    for other in (base, twin):
        both = ("--base", str(base), "--base", str(other))
        failed = run_cli("serve", *both, "--data", str(tmp_path / "d"), code=2)
        assert base.name in failed.stderr


def test_a_base_that_does_not_load_ends_the_server(tmp_path: Path) -> None:
    base = tmp_path / "broken"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (base / "model.safetensors").write_bytes(b"")
    port = str(free_port())
    run_cli("serve", "--base", str(base), "--data", str(tmp_path / "d"), "--port", port, code=1)


def test_the_port_answers_before_the_base_is_resident(tiny_base: TinyBase, tmp_path: Path) -> None:
    server = start_server(tmp_path, tmp_path / "data", bases=[str(tiny_base("llama"))])
    try:
        deadline, statuses = time.monotonic() + 60, set[int]()
        while 200 not in statuses and time.monotonic() < deadline:
            try:
                statuses.add(httpx.get(f"{server.url}/readyz").status_code)
            except httpx.TransportError:
                time.sleep(0.05)
    finally:
        stop_server(server)
    assert statuses == {503, 200}


def test_a_stop_during_loading_leaves_no_process(tiny_base: TinyBase, tmp_path: Path) -> None:
    server = start_server(tmp_path, tmp_path / "data", bases=[str(tiny_base("llama"))])
    deadline = time.monotonic() + 30
    while not workers_of(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    (worker,) = workers_of(server)
    stop_server(server)
    assert not server.errors_in_log()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running()


def test_a_killed_worker_is_started_again(tiny_base: TinyBase, tmp_path: Path) -> None:
    server = start_server(tmp_path, tmp_path / "data", bases=[str(tiny_base("llama"))])
    try:
        wait_until_ready(server)
        (worker,) = workers_of(server)
        worker.kill()
        time.sleep(0.5)
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        wait_until_ready(server)
        assert (
            'openmint_worker_restarts_total{base="tiny-llama"} 1.0'
            in httpx.get(f"{server.url}/metrics").text
        )
    finally:
        stop_server(server)


def test_a_second_signal_ends_the_server_at_once(tiny_base: TinyBase, tmp_path: Path) -> None:
    server = start_server(tmp_path, tmp_path / "data", bases=[str(tiny_base("llama"))])
    try:
        wait_until_ready(server)
        os.kill(server.process.pid, signal.SIGINT)
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(10) in (0, 1)
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise
