"""The service with its store on a real S3 server: all of an adapter's life, and an outage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import tinker
from tinker import types

from tests.chaos.training import Job
from tests.integration.trained import wait_until
from tests.s3 import S3Server
from tests.servers import (
    TestServer,
    gateway_of,
    run_cli,
    start_server,
    stop_server,
    wait_until_ready,
)

pytestmark = pytest.mark.integration

JOB = Job(1, "cross_entropy")
POLICY = f"default/{JOB.policy}"
PROMPT = [504, 3575, 282]


@pytest.fixture
def environ(s3: S3Server) -> dict[str, str]:
    return {**s3.environ(), "OPENMINT_STORE_URL": s3.new_url()}


@pytest.fixture
def start(
    tiny_base: Callable[[str], Path], tmp_path: Path, environ: dict[str, str]
) -> Iterator[Callable[[], TestServer]]:
    """Starts the one server, after stopping the one before; all on one data folder."""
    servers: list[TestServer] = []

    def again() -> TestServer:
        if servers:
            stop_server(servers.pop())
        bases = [str(tiny_base("llama"))]
        servers.append(start_server(tmp_path, tmp_path / "data", bases=bases, environ=environ))
        wait_until_ready(servers[-1])
        return servers[-1]

    yield again
    for server in servers:
        stop_server(server)


def connected(server: TestServer) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=server.url, api_key=server.admin_key)


def new_run(service: tinker.ServiceClient) -> tinker.TrainingClient:
    metadata = {"policy": JOB.policy}
    made = service.create_lora_training_client("tiny-llama", 4, seed=1, user_metadata=metadata)
    return made.result()


def train(run: tinker.TrainingClient, step: int) -> None:
    run.forward_backward(JOB.data(step), JOB.loss)
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()


def publish(run: tinker.TrainingClient, name: str) -> str:
    return str(run.save_weights_for_sampler(name).result().path)


def drawn(service: tinker.ServiceClient, path: str) -> list[int]:
    sampler = service.create_sampling_client(model_path=path).result()
    params = types.SamplingParams(max_tokens=12, seed=5, stop=[])
    answer = sampler.sample(types.ModelInput.from_ints(PROMPT), 1, params).result()
    return list(answer.sequences[0].tokens)


def complete(server: TestServer, model: str) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    return http(server, "POST", "/v1/completions", json=body)


def http(server: TestServer, method: str, path: str, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    return httpx.request(method, server.url + path, headers=headers, timeout=60, **options)


def digests(server: TestServer) -> list[str]:
    """Of the policy's revisions, the oldest first."""
    page = http(server, "GET", f"/catalog/v1/policies/{POLICY}/revisions").json()
    return [item["digest"] for item in sorted(page["items"], key=lambda item: item["number"])]


def test_an_adapter_lives_in_the_bucket_and_answers_after_a_restart(
    start: Callable[[], TestServer], s3: S3Server, environ: dict[str, str], tmp_path: Path
) -> None:
    server = start()
    with connected(server) as service:
        run = new_run(service)
        train(run, 0)
        state, path = str(run.save_state("state").result().path), publish(run, "one")
        tokens = drawn(service, path)
    moved = http(
        server,
        "POST",
        f"/catalog/v1/policies/{POLICY}/aliases/prod/promote",
        json={"revision": "latest"},
    )
    assert moved.is_success, moved.text
    (revision,) = digests(server)
    assert f"blobs/{revision.removeprefix('sha256:')}" in s3.object_names(
        environ["OPENMINT_STORE_URL"]
    )
    server = start()
    with connected(server) as service:
        assert drawn(service, path) == tokens
        service.create_training_client_from_state_with_optimizer(state)
    answer = complete(server, f"{POLICY}@prod").json()
    assert answer["openmint"]["revision"] == revision
    folder, at = tmp_path / "peft", ("--url", server.url, "--data", str(server.data))
    run_cli("export", f"{POLICY}@prod", str(folder), *at)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert safetensors.torch.load_file(folder / "adapter_model.safetensors")
    for place in ("packs", "blobs"):
        assert not (server.data / place).exists()
    secret = environ["AWS_SECRET_ACCESS_KEY"]
    assert secret not in server.log.read_text()


def test_deleted_checkpoints_leave_the_bucket(
    start: Callable[[], TestServer], s3: S3Server, environ: dict[str, str]
) -> None:
    server = start()
    with connected(server) as service:
        run = new_run(service)
        train(run, 0)
        paths = [str(run.save_state(f"state-{number}").result().path) for number in range(2)]
        assert len(s3.object_names(environ["OPENMINT_STORE_URL"])) == 1  # equal states
    rest = tinker.RestClient(base_url=server.url, api_key=server.admin_key)
    for path in paths:
        rest.delete_checkpoint_from_tinker_path(path).result()
    wait_until(lambda: not s3.object_names(environ["OPENMINT_STORE_URL"]))


def test_an_outage_fails_what_needs_the_bucket_and_ends_nothing(
    start: Callable[[], TestServer], s3: S3Server
) -> None:
    server = start()
    with connected(server) as service:
        run = new_run(service)
        for number in range(2):
            train(run, number)
            publish(run, f"before-{number}")
        cold, warm = digests(server)
    server = start()
    model = f"{POLICY}@{warm}"
    answer = complete(server, model).json()
    with connected(server) as service:
        run = new_run(service)
        train(run, 2)
        s3.stop()
        try:
            refused = complete(server, f"{POLICY}@{cold}")
            assert refused.status_code == 503
            assert "can't be reached; check AWS_ENDPOINT_URL" in refused.text
            assert complete(server, model).json()["choices"] == answer["choices"]
            with pytest.raises(tinker.RequestFailedError, match="can't be reached"):
                publish(run, "during")
            train(run, 3)
            gateway_of(server).kill()
            tried = "could not use the store"
            wait_until(lambda: tried in server.log.read_text())
            assert server.process.poll() is None
        finally:
            s3.start()
        wait_until_ready(server)
        assert complete(server, f"{POLICY}@{cold}").json()["openmint"]["revision"] == cold
        assert drawn(service, publish(run, "after"))


def test_a_store_that_is_not_there_is_said_at_the_start(
    tiny_base: Callable[[str], Path], tmp_path: Path, s3: S3Server
) -> None:
    environ = {**s3.environ(), "OPENMINT_STORE_URL": "s3://nowhere"}
    arguments = ("--port", "0", "--data", str(tmp_path), "--base", str(tiny_base("llama")))
    done = run_cli("serve", *arguments, code=1, environ=environ)
    assert "has no bucket 'nowhere'" in done.stderr
    away = {**s3.environ(endpoint="http://127.0.0.1:1"), "OPENMINT_STORE_URL": "s3://bucket/there"}
    done = run_cli("serve", *arguments, code=1, environ=away)
    assert "could not use the store s3://bucket/there: 127.0.0.1:1 can't be reached" in done.stderr
