import asyncio

import httpx
import pytest

from openmint.api.guard import Guard
from openmint.config import ServiceConfig


async def echo(scope, receive, send):
    if scope["path"] == "/boom":
        raise RuntimeError("bug")
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


@pytest.fixture
def ask():
    limits = ServiceConfig(max_body_bytes=1000, max_header_bytes=2000)
    transport = httpx.ASGITransport(Guard(echo, limits))

    def send(method="POST", path="/api/v1/x", **options):
        async def once():
            async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
                return await client.request(method, path, **options)

        return asyncio.run(once())

    return send


def test_a_good_request_passes_with_a_request_id(ask):
    answer = ask(content=b'{"a": 1}')
    assert (answer.status_code, answer.content) == (200, b'{"a": 1}')
    assert answer.headers["x-request-id"].startswith("r-")


def test_a_large_body_is_refused_with_and_without_content_length(ask):
    async def parts():
        for _ in range(20):
            yield b"x" * 100

    for content in (b"x" * 2000, parts()):
        answer = ask(content=content)
        assert answer.status_code == 413
        assert "1000 bytes" in answer.json()["detail"]


def test_a_large_head_is_refused(ask):
    assert ask(headers={"X-Long": "y" * 3000}).status_code == 431


def test_host_must_come_exactly_once(ask):
    answer = ask(headers=[("Host", "a"), ("Host", "b")])
    assert answer.status_code == 400
    assert "Host" in answer.json()["detail"]


def test_what_nobody_caught_is_a_500_that_tells_only_the_request_id(ask):
    answer = ask(path="/boom")
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] in answer.json()["detail"]
    assert "bug" not in answer.text
