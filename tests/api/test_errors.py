import asyncio

import httpx
import pytest
from fastapi import FastAPI, Request

from openmint.api.errors import install_error_handlers
from openmint.wire.openai import parse_chat, parse_json


@pytest.mark.parametrize(
    "body",
    [
        rb'{"model":"m","messages":[{"role":"user","content":"x"}],"\ud800":1}',
        rb'{"model":"m","messages":[{"role":"user","content":"x","\ud800":1}]}',
        rb'{"model":"m","messages":[{"role":"user","content":"x"}],'
        rb'"stream":true,"stream_options":{"\ud800":1}}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/v1/chat", "/catalog/v1/chat"])
def test_a_field_name_that_is_not_unicode_is_refused_in_every_dialect(
    body: bytes, path: str
) -> None:
    app = FastAPI()
    install_error_handlers(app)

    @app.post(path)
    async def chat(request: Request) -> None:
        parse_chat(parse_json(await request.body()))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://h"
        ) as client:
            return await client.post(path, content=body)

    answer = asyncio.run(ask())
    assert answer.status_code == 400
    assert r"\\ud800" in answer.text
    if path.startswith("/v1"):
        error = answer.json()["error"]
        assert error["code"] == "unsupported_parameter"
        assert error["param"].endswith(r"\ud800")
