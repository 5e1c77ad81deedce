"""Catalogue routes under /catalog/v1 for what stands between training and traffic: gates."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from openmint.api.auth import App, Caller
from openmint.api.bodies import read, takes
from openmint.api.routes.catalog import ALIAS, READERS, RowId, owned
from openmint.service.promotion import check_alias
from openmint.wire import traffic as wire
from openmint.wire.catalog import Json

router = APIRouter(prefix="/catalog/v1", tags=["catalog"])


@router.get(ALIAS + "/gates")
async def list_gates(tenant: str, name: str, alias: str, caller: Caller, gateway: App) -> Json:
    """What a revision must show before the alias may name it."""
    caller.require(*READERS)
    gates = gateway.catalog.gates(owned(caller, tenant), name, alias)
    return {"items": [wire.encode_gate(gate) for gate in gates]}


@router.post(ALIAS + "/gates", status_code=201, openapi_extra=takes(wire.AddGate))
async def add_gate(
    tenant: str, name: str, alias: str, request: Request, caller: Caller, gateway: App
) -> Json:
    """Let the alias move only to revisions that show a score, or are not much worse."""
    caller.require("train")
    body = await read(request, wire.AddGate)
    gate = await asyncio.to_thread(
        gateway.catalog.add_gate,
        owned(caller, tenant),
        name,
        check_alias(alias),
        body.task,
        min_score=body.min_score,
        margin=body.margin,
        confidence=body.confidence,
        num_items=body.n,
        actor=caller.key_id,
    )
    return wire.encode_gate(gate)


@router.delete(ALIAS + "/gates/{gate_id}", status_code=204)
async def remove_gate(
    tenant: str, name: str, alias: str, gate_id: RowId, caller: Caller, gateway: App
) -> Response:
    """Let the alias move without this gate."""
    caller.require("train")
    await asyncio.to_thread(
        gateway.catalog.remove_gate,
        owned(caller, tenant),
        name,
        alias,
        gate_id,
        actor=caller.key_id,
    )
    return Response(status_code=204)
