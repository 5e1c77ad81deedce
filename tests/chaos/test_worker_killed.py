"""A worker is killed, or hangs, while clients wait: those who sample see a pause."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.chaos.asking import NUM_TOKENS, PROMPT, check_samples_outlive
from tests.servers import TestServer, start_server, stop_server, wait_until_ready, workers_of

pytestmark = [pytest.mark.chaos, pytest.mark.integration]

SILENCE_SECONDS = 4


@pytest.fixture(scope="module")
def tiny_server(
    tiny_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestServer]:
    root = tmp_path_factory.mktemp("killed")
    environ = {"OPENMINT_SERVICE_WORKER_SILENCE_SECONDS": str(SILENCE_SECONDS)}
    server = start_server(root, root / "data", bases=[str(tiny_base("llama"))], environ=environ)
    try:
        wait_until_ready(server)
        yield server
    finally:
        stop_server(server)


def worker_of(server: TestServer) -> psutil.Process:
    (worker,) = workers_of(server)
    return worker


def test_samples_of_the_tinker_sdk_end_as_if_nothing_had_been(tiny_server: TestServer) -> None:
    check_samples_outlive(worker_of(tiny_server).kill, tiny_server)


def test_a_stream_of_the_openai_sdk_goes_on(tiny_server: TestServer) -> None:
    client = openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key=tiny_server.admin_key)

    def read(kill_after: int) -> tuple[str, float]:
        stream = client.completions.create(
            model="tiny-llama",
            prompt=PROMPT,
            max_tokens=NUM_TOKENS,
            seed=7,
            stream=True,
        )
        pieces, longest, last = list[str](), 0.0, time.monotonic()
        for chunk in stream:
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
            pieces.append(chunk.choices[0].text)
            if len(pieces) == kill_after:
                worker_of(tiny_server).kill()
        return "".join(pieces), longest

    text, _ = read(kill_after=-1)
    again, pause_seconds = read(kill_after=3)
    assert again == text
    assert pause_seconds > 0.5, "the worker was not killed in the middle of the stream"


def test_a_worker_that_hangs_is_replaced(tiny_server: TestServer) -> None:
    """Stopped, not ended: only its silence tells."""
    client = openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key=tiny_server.admin_key)

    def ask() -> str:
        answer = client.completions.create(model="tiny-llama", prompt=PROMPT, max_tokens=8, seed=3)
        return answer.choices[0].text

    text, worker = ask(), worker_of(tiny_server)
    worker.suspend()
    assert ask() == text
    assert not worker.is_running()
