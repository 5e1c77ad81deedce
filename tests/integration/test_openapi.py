"""Requests made from the OpenAPI document: whatever they say, no 5xx, and the service goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmint.api.app import create_app
from tests.servers import TestServer, running_server, workers_of

pytestmark = [pytest.mark.integration, pytest.mark.slow]

EXAMPLES = 25
ENDS_THE_KEY = {("DELETE", "/api/v1/auth/apikey/me")}
"""Left out, as nothing after it would be let in; tests/integration/test_isolation.py has it."""
REFUSED_503 = {"overloaded"}
"""No room is an answer that a request may get."""


NO_GATEWAY = SimpleNamespace(settings=SimpleNamespace(service=None))
"""The document needs none."""
SCHEMA = schemathesis.openapi.from_dict(create_app(NO_GATEWAY).openapi())  # type: ignore[arg-type]
OPERATIONS = {
    f"{each.method.upper()} {each.path}": each
    for each in (result.ok() for result in SCHEMA.get_all_operations())
    if (each.method.upper(), each.path) not in ENDS_THE_KEY
}


@pytest.fixture(scope="module")
def tiny(
    tiny_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestServer]:
    root = tmp_path_factory.mktemp("fuzzed")
    with running_server(root, bases=[str(tiny_base("llama"))]) as server:
        yield server


@pytest.fixture(scope="module")
def real(tiny: TestServer) -> dict[str, str]:
    """Names of things that are there, so that some requests come further than to a 404."""
    headers = {"X-API-Key": tiny.admin_key}
    with httpx.Client(base_url=tiny.url, headers=headers, timeout=60.0) as http:
        session = http.post("/api/v1/create_session", json={}).json()["session_id"]
        body = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "tiny-llama",
            "lora_config": {"rank": 1},
            "user_metadata": {"policy": "fuzzed"},
        }
        run = http.post("/api/v1/create_model", json=body).json()
        saved = {"model_id": run["model_id"], "path": "s", "seq_id": 1}
        future = http.post("/api/v1/save_weights_for_sampler", json=saved).json()["request_id"]
        while http.post("/api/v1/retrieve_future", json={"request_id": future}).status_code == 408:
            pass
    return {
        "session_id": session,
        "model_id": run["model_id"],
        "run_id": run["model_id"],
        "request_id": future,
        "base_model": "tiny-llama",
        "model": "default/fuzzed",
        "tenant": "default",
        "name": "fuzzed",
        "reference": "latest",
        "alias": "latest",
    }


@pytest.fixture(scope="module", autouse=True)
def same_processes_and_memory(tiny: TestServer) -> Iterator[None]:
    """No worker died of it, and nothing grew."""
    processes = [psutil.Process(tiny.process.pid), *workers_of(tiny)]
    before = [each.memory_info().rss for each in processes]
    yield
    for process, old in zip(processes, before, strict=True):
        assert process.is_running()
        assert process.memory_info().rss < old + (256 << 20)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_request_of_the_document_breaks_the_service(
    name: str, tiny: TestServer, real: dict[str, str]
) -> None:
    operation = OPERATIONS[name]
    headers = {"X-API-Key": tiny.admin_key}

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(), uses_real=st.booleans())
    def ask(case: Any, uses_real: bool) -> None:
        if uses_real:
            _put_in(case.path_parameters, real)
            _put_in(case.body, real)
        case.headers = {**(case.headers or {}), **headers}
        answer = case.call(base_url=tiny.url, timeout=60)
        if answer.status_code == 503:
            assert answer.json().get("code") in REFUSED_503, answer.text
        else:
            assert answer.status_code < 500, answer.text
        assert b"Traceback" not in answer.content

    ask()


def _put_in(values: Any, real: dict[str, str]) -> None:
    if isinstance(values, dict):
        values.update({key: real[key] for key in values if key in real})
