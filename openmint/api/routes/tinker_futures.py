"""Tinker: fetching results of futures, by long poll, and giving samples up."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from openmint.api.auth import App, Caller
from openmint.api.bodies import read, takes
from openmint.api.timing import server_timing
from openmint.errors import RequestError
from openmint.service.futures import ResultFuture
from openmint.wire import requests
from openmint.wire.encode import SampleAnswer, encode

router = APIRouter(prefix="/api/v1")


@router.post("/retrieve_future", openapi_extra=takes(requests.RetrieveFuture))
async def retrieve_future(request: Request, caller: Caller, gateway: App) -> Response:
    """The result, or 408 after a while for the client to ask again."""
    caller.require("train", "serve")
    body = await read(request, requests.RetrieveFuture)
    future = gateway.futures.get(caller.tenant, body.request_id)
    if not await gateway.futures.wait(future, gateway.settings.service.long_poll_seconds):
        pending = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
        if reason := future.holdup():
            pending |= {"queue_state": "paused_capacity", "queue_state_reason": reason}
        return JSONResponse(pending, 408)
    if (error := future.error) is not None:
        category = "user" if isinstance(error, RequestError) else "server"
        return JSONResponse({"error": error.message, "category": category, "code": error.code})
    content_type, content = _encoded(future, request.headers.get("accept", ""))
    return Response(content, media_type=content_type, headers=_ran(future.result))


def _encoded(future: ResultFuture, accept: str) -> tuple[str, bytes]:
    wanted = "protobuf" if "protobuf" in accept else "json"
    if wanted not in future.encoded:
        future.encoded[wanted] = encode(future.result, accept)
    return future.encoded[wanted]


def _ran(result: object) -> dict[str, str]:
    """Headers that name the weights that the engine really ran, and how long it computed."""
    if not isinstance(result, SampleAnswer):
        return {}
    ran = result.result
    headers = {"X-OpenMint-Base": str(ran.base), "X-OpenMint-Epoch": str(ran.epoch)}
    headers |= server_timing(ran.spent)
    if ran.revision:
        headers["X-OpenMint-Revision"] = str(ran.revision)
    return headers


@router.post("/retrieve_futures", openapi_extra=takes(requests.RetrieveFutures))
async def retrieve_futures(request: Request, caller: Caller, gateway: App) -> dict[str, Any]:
    """Which samples of a sampling session finished since `prev_cursor`."""
    caller.require("train", "serve")
    body = await read(request, requests.RetrieveFutures)
    target = body.target
    sampler = gateway.sampling.get(caller.tenant, target.sampling_session_id)
    gateway.sampling.forget(sampler, body.retrieved_request_ids)
    limit = gateway.settings.service.long_poll_seconds
    wait_seconds = limit if body.timeout is None else min(limit, max(0.0, body.timeout))
    feed = sampler.feed_of(target.cloned_sampler_id)
    events = await feed.after(body.prev_cursor, wait_seconds)
    completions = [
        {"state": "failed" if event.failed else "finished", "request_id": event.request_id}
        for event in events
    ]
    cursor = events[-1].cursor if events else body.prev_cursor
    return {"completions": completions, "cursor": cursor}


@router.post("/cancel_future", status_code=204, openapi_extra=takes(requests.CancelFuture))
async def cancel_future(request: Request, caller: Caller, gateway: App) -> None:
    """Give up a sample and free its pages; an accepted training request goes on."""
    caller.require("train", "serve")
    body = await read(request, requests.CancelFuture)
    future = gateway.futures.get(caller.tenant, body.request_id)
    if future.task is not None:
        future.task.cancel()
