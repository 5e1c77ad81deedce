"""`kill -9` of the gateway while clients sample: once it is back they get their answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.asking import check_samples_outlive
from tests.servers import start_server, stop_server, wait_until_ready

pytestmark = [pytest.mark.chaos, pytest.mark.integration]


def test_samples_of_the_tinker_sdk_outlive_a_killed_gateway(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    bases = [str(tiny_base("llama"))]
    server = start_server(tmp_path, tmp_path / "data", bases=bases)
    port = int(server.url.rpartition(":")[2])

    def kill_and_start_again() -> None:
        nonlocal server
        server.process.kill()
        server.process.wait()
        server = start_server(tmp_path, tmp_path / "data", bases=bases, port=port)

    try:
        wait_until_ready(server)
        check_samples_outlive(kill_and_start_again, server)
    finally:
        stop_server(server)
