import asyncio
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from fastapi import FastAPI

from openmint.api.auth import authenticate
from openmint.api.routes import openai
from openmint.catalog.records import Principal
from openmint.scheduler.work import Spent
from openmint.types import Tenant
from openmint.wire.openai import Choice, Ran, Usage


class Answered:
    """An admitted chat on the base of that name, which has answered."""

    drawing = SimpleNamespace(stream=False, logprobs=False)

    def __init__(self, base: str) -> None:
        self.ran = Ran(base, base, "sha256:" + "cd" * 32, None, None, None, 1)

    async def whole(self) -> tuple[list[Choice], Usage]:
        return [Choice(0, "hello", finish_reason="stop")], Usage(1, 1, 0, Spent(0.5, 0.0125))


def complete_on(base: str) -> httpx.Response:
    async def open_chat(*_: object) -> Any:
        return Answered(base)

    app = FastAPI()
    app.include_router(openai.router)
    app.state.gateway = SimpleNamespace(completions=SimpleNamespace(open_chat=open_chat))
    app.dependency_overrides[authenticate] = lambda: Principal(Tenant("acme"), "serve", "key")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
            chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
            return await client.post("/v1/chat/completions", json=chat)

    return asyncio.run(ask())


@pytest.mark.parametrize("base", ["模型/é", "50% off", "a\r\nX-Injected: 1"])
def test_a_base_name_that_no_header_can_hold_is_percent_encoded(base: str) -> None:
    answer = complete_on(base)
    assert answer.status_code == 200
    assert unquote(answer.headers["X-OpenMint-Base"]) == base
    assert answer.json()["openmint"]["base"] == base


def test_an_answer_says_how_long_the_worker_had_it() -> None:
    timing = complete_on("base").headers["Server-Timing"]
    assert timing == "engine;dur=500.000, scheduler;dur=12.500"


def test_an_ordinary_base_name_stays_as_it_is() -> None:
    base = "HuggingFaceTB/SmolLM2-135M_Instruct.v1:a@b+c"
    assert complete_on(base).headers["X-OpenMint-Base"] == base
