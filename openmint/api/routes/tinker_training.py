"""Tinker: runs, gradients, updates."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from openmint.api.auth import App, Caller
from openmint.api.bodies import INLINE_BYTES, counts_refusal, read, read_of_run, takes
from openmint.catalog.records import Principal
from openmint.service import checks
from openmint.service.futures import ResultFuture
from openmint.service.gateway import Gateway
from openmint.service.training import NewRun
from openmint.types import LoraSpec, SessionId
from openmint.wire import requests
from openmint.wire.decode import adam_params, check_optimizer, decompress, train_request

router = APIRouter(prefix="/api/v1")

DEFAULT_RANK = 32


async def promise(future: ResultFuture, run_id: str) -> Response:
    """The answer to a request that opened a future, once the request is written down."""
    await future.accepted()
    return JSONResponse({"request_id": future.request_id, "model_id": run_id})


@router.post("/create_model", openapi_extra=takes(requests.CreateModel))
async def create_model(request: Request, caller: Caller, gateway: App) -> Response:
    """Start a training run with a fresh adapter."""
    caller.require("train")
    body = await read(request, requests.CreateModel)
    check_optimizer(body.optimizer_config)
    lora = body.lora_config or requests.LoraConfig(rank=DEFAULT_RANK)
    spec = LoraSpec(
        rank=lora.rank,
        alpha=gateway.settings.service.default_alpha,
        train_attn=lora.train_attn,
        train_mlp=lora.train_mlp,
        train_unembed=lora.train_unembed,
    )
    new = NewRun(
        tenant=caller.tenant,
        session_id=SessionId(body.session_id),
        model_seq_id=body.model_seq_id,
        base=gateway.workers.by_name(body.base_model).base,
        spec=spec,
        user_metadata=checks.check_metadata(body.user_metadata),
    )
    return await promise(gateway.training.create_run(new, lora.seed), new.run_id)


@router.post("/get_info", openapi_extra=takes(requests.GetInfo))
async def get_info(request: Request, caller: Caller, gateway: App) -> dict[str, Any]:
    """What a run trains."""
    body = await read(request, requests.GetInfo)
    run = gateway.training.run(caller.tenant, body.model_id)
    base = run.base
    return {
        "type": "get_info",
        "model_id": run.run_id,
        "model_data": {
            "arch": base.architecture,
            "model_name": base.name,
            "tokenizer_id": base.name,
        },
        "optimizer_config": {"type": "adamw"},
        "is_lora": True,
        "lora_rank": run.spec.rank,
        "model_name": base.name,
    }


@router.post("/forward_backward")
async def forward_backward(request: Request, caller: Caller, gateway: App) -> Response:
    """Accumulate gradients of a loss; with `forward_only`, just compute it."""
    return await _train(request, caller, gateway, forward_only=False)


@router.post("/forward")
async def forward(request: Request, caller: Caller, gateway: App) -> Response:
    """Compute a loss without gradients; the path that older SDKs use."""
    return await _train(request, caller, gateway, forward_only=True)


async def _train(
    request: Request, caller: Principal, gateway: Gateway, *, forward_only: bool
) -> Response:
    caller.require("train")
    raw = await request.body()
    encoding = request.headers.get("content-encoding", "").strip().lower()
    body = decompress(raw, encoding, gateway.settings.service.max_body_bytes)
    content_type = request.headers.get("content-type", "")
    with counts_refusal(body, gateway.training, caller.tenant):
        given = train_request(body, content_type, forward_only=forward_only)
    with gateway.training.request(caller.tenant, given.model_id, given.seq_id) as run:
        if len(body) <= INLINE_BYTES:
            data, loss = given.content()
        else:
            data, loss = await asyncio.to_thread(given.content)
        future = gateway.training.train(run, given.seq_id, data, loss, given.forward_only)
    return await promise(future, run.run_id)


@router.post("/optim_step", openapi_extra=takes(requests.OptimStep))
async def optim_step(request: Request, caller: Caller, gateway: App) -> Response:
    """Update the weights from the accumulated gradient."""
    caller.require("train")
    body = await read_of_run(request, requests.OptimStep, gateway.training, caller.tenant)
    with gateway.training.request(caller.tenant, body.model_id, body.seq_id) as run:
        future = gateway.training.optim_step(run, body.seq_id, adam_params(body))
    return await promise(future, run.run_id)
