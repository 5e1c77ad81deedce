"""`kill -9` of the gateway while clients sample: once it is back they get their answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.asking import check_samples_outlive
from tests.servers import gateway_of, start_server, stop_server, wait_until_ready

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
