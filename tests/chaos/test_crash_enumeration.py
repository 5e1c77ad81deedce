"""A policy's life in which a process dies at the 1st, 2nd, 3rd ... time that something is written,
synced, renamed, deleted, committed or sent to S3, until a life passes untouched. All lives come out
the same.

`make chaos` tries every one, on S3 too; a test run every eighth, in the folder.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from openmint.store.opening import open_store
from tests.chaos.life import live
from tests.chaos.stored import check_named, named_in
from tests.s3 import S3Server
from tests.servers import (
    TestServer,
    run_cli,
    start_server,
    stop_server,
    wait_until_ready,
)

pytestmark = [pytest.mark.chaos, pytest.mark.integration, pytest.mark.slow]

STRIDE = int(os.environ.get("OPENMINT_CHAOS_STRIDE", "8"))
PLACES = ("folder", "s3") if "OPENMINT_CHAOS_STRIDE" in os.environ else ("folder",)
COUNT = struct.Struct("<q")
NEVER = 0
HOOKS = Path(__file__).parent / "crashing"


@pytest.fixture(scope="module")
def crash_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crashing") / "left"
    path.write_bytes(COUNT.pack(NEVER))
    return path


@pytest.fixture(scope="module", params=PLACES)
def store_environ(request: pytest.FixtureRequest) -> dict[str, str]:
    """Of a service whose store is there."""
    if request.param == "folder":
        return {}
    s3: S3Server = request.getfixturevalue("s3")
    return {**s3.environ(), "OPENMINT_STORE_URL": s3.new_url()}


@pytest.fixture(scope="module")
def server(
    tiny_base: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    crash_file: Path,
    store_environ: dict[str, str],
) -> Iterator[TestServer]:
    root = tmp_path_factory.mktemp("enumerated")
    environ = {
        **store_environ,
        "PYTHONPATH": f"{HOOKS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OPENMINT_TEST_CRASH_FILE": str(crash_file),
        "OPENMINT_SERVICE_SNAPSHOT_UPDATES": "2",
    }
    running = start_server(root, root / "data", bases=[str(tiny_base("llama"))], environ=environ)
    try:
        wait_until_ready(running)
        yield running
    finally:
        crash_file.write_bytes(COUNT.pack(NEVER))
        stop_server(running)


@pytest.mark.timeout(3600)
def test_every_life_comes_out_the_same(
    server: TestServer,
    crash_file: Path,
    store_environ: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = live(server, "undisturbed")
    dies_at = 1
    while True:
        crash_file.write_bytes(COUNT.pack(dies_at))
        life = live(server, f"dies-at-{dies_at}")
        (left,) = COUNT.unpack(crash_file.read_bytes())
        crash_file.write_bytes(COUNT.pack(NEVER))
        assert life == expected, f"the life in which a process died at write {dies_at}"
        wait_until_ready(server)
        if left > 0:
            break
        dies_at += STRIDE
    print(f"untouched from write {dies_at} on")
    assert dies_at > 30, "the hooks count nothing"
    run_cli("journal", "verify", "--data", str(server.data))
    for name, value in store_environ.items():
        monkeypatch.setenv(name, value)
    store = open_store(store_environ.get("OPENMINT_STORE_URL", ""), server.data)
    assert set(expected.digests) <= named_in(server.data)
    check_named(server.data, store)
