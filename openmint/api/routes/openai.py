"""OpenAI routes under /v1: decode, admit, answer whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from urllib.parse import quote

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from openmint.api.auth import App, Caller
from openmint.api.disconnects import ClientGone, EventStream, while_connected
from openmint.api.errors import openai_error
from openmint.api.timing import server_timing
from openmint.errors import EngineFailed, OpenMintError
from openmint.service.completions import Answer
from openmint.service.targets import ModelCard
from openmint.wire import openai as wire

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1", tags=["openai"])

CLIENT_GONE_STATUS = 499
HEADER_SAFE = "/:@+,="
"""What stays readable in a header besides letters, digits and . _ - ~; the rest is %-encoded."""
Render = Callable[..., wire.Json]


@dataclass(frozen=True, slots=True)
class Form:
    """How answers of one route look."""

    id_prefix: str
    chat: bool
    whole: Render
    chunk: Render


CHAT = Form("chatcmpl", True, wire.chat_response, wire.chat_chunk)
TEXT = Form("cmpl", False, wire.completion_response, wire.completion_chunk)


@router.get("/models")
async def list_models(caller: Caller, gateway: App) -> wire.Json:
    """The resident bases and the tenant's policies under each of their aliases."""
    caller.require("read", "serve", "train")
    cards, has_more = await asyncio.to_thread(gateway.targets.list_models, caller.tenant)
    return {"object": "list", "data": [_card(card) for card in cards], "has_more": has_more}


@router.get("/models/{model:path}")
async def get_model(model: str, caller: Caller, gateway: App) -> wire.Json:
    """What a model name means now: its base and revision."""
    caller.require("read", "serve", "train")
    return _card(gateway.targets.get_model(caller.tenant, model))


@router.post("/chat/completions")
async def chat_completions(request: Request, caller: Caller, gateway: App) -> Response:
    """Answer a conversation, whole or as a stream."""
    caller.require("serve", "train")
    parsed = wire.parse_chat(wire.parse_json(await request.body()))
    answer = await gateway.completions.open_chat(caller.tenant, parsed)
    return await _respond(request, answer, CHAT)


@router.post("/completions")
async def completions(request: Request, caller: Caller, gateway: App) -> Response:
    """Continue one or many texts, whole or as a stream."""
    caller.require("serve", "train")
    parsed = wire.parse_completion(wire.parse_json(await request.body()))
    answer = await gateway.completions.open_completion(caller.tenant, parsed)
    return await _respond(request, answer, TEXT)


async def _respond(request: Request, answer: Answer, form: Form) -> Response:
    answer_id, created = f"{form.id_prefix}-{secrets.token_hex(12)}", int(time.time())
    headers = {
        "X-OpenMint-Base": quote(answer.ran.base, safe=HEADER_SAFE),
        "X-OpenMint-Revision": answer.ran.revision or "base",
        "X-OpenMint-Epoch": str(answer.ran.epoch),
    }
    try:
        if answer.drawing.stream:
            events = _events(answer, form, answer_id, created)
            first = await while_connected(request, anext(events))
            return EventStream(_chain(first, events), headers)
        choices, usage = await while_connected(request, answer.whole())
    except ClientGone:
        return Response(status_code=CLIENT_GONE_STATUS)
    logprobs, ran = answer.drawing.logprobs, replace(answer.ran, epoch=usage.epoch)
    content = form.whole(answer_id, created, ran, choices, usage, logprobs)
    headers = {**headers, "X-OpenMint-Epoch": str(usage.epoch), **server_timing(usage.spent)}
    return JSONResponse(content, headers=headers)


async def _events(answer: Answer, form: Form, answer_id: str, created: int) -> AsyncIterator[bytes]:
    """The stream's events. The first waits for the engine, so that a refusal is a plain error."""
    started: set[int] = set()
    logprobs, include_usage = answer.drawing.logprobs, answer.drawing.include_usage
    empty_usage: wire.Json = {"usage": None} if include_usage else {}
    async with aclosing(answer.stream()) as pieces:  # type: ignore[type-var]
        async for piece in pieces:
            if isinstance(piece, wire.Usage):
                if include_usage:
                    ran = replace(answer.ran, epoch=piece.epoch)
                    yield _event(wire.usage_chunk(answer_id, created, ran, piece, form.chat))
                continue
            if form.chat and piece.index not in started:
                started.add(piece.index)
                opening = wire.Choice(piece.index, "", first=True)
                chunk = form.chunk(answer_id, created, answer.ran, opening, False)
                yield _event({**chunk, **empty_usage})
            chunk = form.chunk(answer_id, created, answer.ran, piece, logprobs)
            yield _event({**chunk, **empty_usage})
    yield b"data: [DONE]\n\n"


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`first`, then `rest`; a failure on the way becomes an error event and ends the stream."""
    async with aclosing(rest) as events:  # type: ignore[type-var]
        yield first
        try:
            async for event in events:
                yield event
        except OpenMintError as error:
            yield _event(openai_error(error))
        except Exception as error:
            log.error("stream_failed", exc_info=error)
            yield _event(openai_error(EngineFailed("the stream failed; send the request again")))


def _event(content: wire.Json) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def _card(card: ModelCard) -> wire.Json:
    details = {"base": card.base, "revision": card.revision}
    return wire.model_card(card.model, card.owner, card.created, details)
