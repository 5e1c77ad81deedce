"""A worker is killed, or hangs, while clients wait: those who sample see a pause."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import psutil
import pytest
import tinker

from tests.chaos.asking import NUM_TOKENS, PROMPT, ask, tokens_of
from tests.servers import TestServer, start_server, stop_server, wait_until_ready

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
    (worker,) = [
        child
        for child in psutil.Process(server.process.pid).children()
        if "openmint.cluster.worker" in child.cmdline()
    ]
    return worker


def kill_worker(server: TestServer) -> None:
    worker_of(server).kill()


def test_samples_of_the_tinker_sdk_end_as_if_nothing_had_been(tiny_server: TestServer) -> None:
    with tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.admin_key) as service:
        sampler = service.create_sampling_client(base_model="tiny-llama").result()
        undisturbed = tokens_of(ask(sampler))
        pending = ask(sampler)
        time.sleep(0.05)
        assert not any(future.done() for future in pending)
        kill_worker(tiny_server)
        later = ask(sampler)
        assert tokens_of(pending) == undisturbed
        assert tokens_of(later) == undisturbed


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
                kill_worker(tiny_server)
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
