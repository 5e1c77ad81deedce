"""`kill -9` of the gateway while clients sample: once it is back they get their answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tinker

from tests.chaos.asking import ask, tokens_of
from tests.servers import start_server, stop_server, wait_until_ready

pytestmark = [pytest.mark.chaos, pytest.mark.integration]


def test_samples_of_the_tinker_sdk_outlive_a_killed_gateway(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    bases = [str(tiny_base("llama"))]
    server = start_server(tmp_path, tmp_path / "data", bases=bases)
    try:
        wait_until_ready(server)
        with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
            sampler = service.create_sampling_client(base_model="tiny-llama").result()
            undisturbed = tokens_of(ask(sampler))
            pending = ask(sampler)
            time.sleep(0.05)
            assert not any(future.done() for future in pending)
            server.process.kill()
            server.process.wait()
            port = int(server.url.rpartition(":")[2])
            server = start_server(tmp_path, tmp_path / "data", bases=bases, port=port)
            assert tokens_of(pending) == undisturbed
            assert tokens_of(ask(sampler)) == undisturbed
    finally:
        stop_server(server)
