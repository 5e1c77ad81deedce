"""Catalogue routes under /catalog/v1 between training and traffic: gates, canaries,
watches, observations, schedules."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from openmint.api.auth import App, Caller
from openmint.api.bodies import read, takes
from openmint.api.routes.catalog import (
    ALIAS,
    READERS,
    IfMatch,
    RowId,
    alias_answer,
    expected_version,
    owned,
)
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


@router.put(ALIAS + "/canary", openapi_extra=takes(wire.SetCanary))
async def set_canary(
    tenant: str,
    name: str,
    alias: str,
    request: Request,
    caller: Caller,
    gateway: App,
    if_match: IfMatch = None,
) -> Response:
    """Give a share of the alias's traffic to a second revision, or change that share."""
    caller.require("train")
    body = await read(request, wire.SetCanary)
    changed = await gateway.promotion.set_canary(
        owned(caller, tenant),
        name,
        alias,
        body.revision,
        body.share,
        actor=caller.key_id,
        reason=body.reason,
        expected_version=expected_version(body.if_version, if_match),
    )
    return alias_answer(changed)


@router.post(ALIAS + "/canary/finish", openapi_extra=takes(wire.FinishCanary))
async def finish_canary(
    tenant: str,
    name: str,
    alias: str,
    request: Request,
    caller: Caller,
    gateway: App,
    if_match: IfMatch = None,
) -> Response:
    """Promote the canary, if it passes the alias's gates."""
    caller.require("train")
    body = await read(request, wire.FinishCanary)
    moved = await gateway.promotion.finish_canary(
        owned(caller, tenant),
        name,
        alias,
        actor=caller.key_id,
        reason=body.reason,
        expected_version=expected_version(body.if_version, if_match),
        override_reason=body.override_reason,
    )
    return alias_answer(moved)


@router.post(ALIAS + "/canary/abort", openapi_extra=takes(wire.AbortCanary))
async def abort_canary(
    tenant: str,
    name: str,
    alias: str,
    request: Request,
    caller: Caller,
    gateway: App,
    if_match: IfMatch = None,
) -> Response:
    """Give all traffic back to what the alias names."""
    caller.require("train")
    body = await read(request, wire.AbortCanary)
    kept = await gateway.promotion.abort_canary(
        owned(caller, tenant),
        name,
        alias,
        actor=caller.key_id,
        reason=body.reason,
        expected_version=expected_version(body.if_version, if_match),
    )
    return alias_answer(kept)


@router.get(ALIAS + "/watches")
async def list_watches(tenant: str, name: str, alias: str, caller: Caller, gateway: App) -> Json:
    """What is watched of the alias's answers, and what each watch finds now."""
    caller.require(*READERS)
    owner = owned(caller, tenant)
    watches = gateway.catalog.watches(owner, name, alias)
    findings = gateway.catalog.judge(owner, name)
    return {"items": [wire.encode_watch(watch, findings) for watch in watches]}


@router.post(ALIAS + "/watches", status_code=201, openapi_extra=takes(wire.AddWatch))
async def add_watch(
    tenant: str, name: str, alias: str, request: Request, caller: Caller, gateway: App
) -> Json:
    """Take the alias's traffic from a revision whose answers do worse than this."""
    caller.require("train")
    body = await read(request, wire.AddWatch)
    watch = await gateway.watching.add(
        owned(caller, tenant),
        name,
        check_alias(alias),
        body.metric,
        at_least=body.at_least,
        at_most=body.at_most,
        confidence=body.confidence,
        min_observations=body.min_observations,
        window_seconds=body.window_seconds,
        actor=caller.key_id,
    )
    return wire.encode_watch(watch)


@router.delete(ALIAS + "/watches/{watch_id}", status_code=204)
async def remove_watch(
    tenant: str, name: str, alias: str, watch_id: RowId, caller: Caller, gateway: App
) -> Response:
    """Watch no longer."""
    caller.require("train")
    await gateway.watching.remove(owned(caller, tenant), name, alias, watch_id, actor=caller.key_id)
    return Response(status_code=204)


@router.post("/observations", openapi_extra=takes(wire.Observe))
async def observe(request: Request, caller: Caller, gateway: App) -> Json:
    """Report how answers did; a watch that fails by it has acted when this answers."""
    caller.require("serve", "train")
    body = await read(request, wire.Observe)
    counted = await gateway.watching.observe(caller.tenant, body.observations())
    return {"num_counted": counted}


@router.get(ALIAS + "/schedules")
async def list_schedules(tenant: str, name: str, alias: str, caller: Caller, gateway: App) -> Json:
    """The evaluations that start by themselves on what the alias names."""
    caller.require(*READERS)
    found = gateway.catalog.schedules(owned(caller, tenant), name, alias)
    return {"items": [wire.encode_schedule(schedule) for schedule in found]}


@router.post(ALIAS + "/schedules", status_code=201, openapi_extra=takes(wire.AddSchedule))
async def add_schedule(
    tenant: str, name: str, alias: str, request: Request, caller: Caller, gateway: App
) -> Json:
    """Evaluate each revision that is new to the alias, or what it names every so many hours."""
    caller.require("train")
    body = await read(request, wire.AddSchedule)
    schedule = await asyncio.to_thread(
        gateway.catalog.add_schedule,
        owned(caller, tenant),
        name,
        check_alias(alias),
        body.task,
        every_hours=body.every_hours,
        num_items=body.n,
        actor=caller.key_id,
    )
    return wire.encode_schedule(schedule)


@router.delete(ALIAS + "/schedules/{schedule_id}", status_code=204)
async def remove_schedule(
    tenant: str, name: str, alias: str, schedule_id: RowId, caller: Caller, gateway: App
) -> Response:
    """Let nothing start by this schedule any more."""
    caller.require("train")
    await asyncio.to_thread(
        gateway.catalog.remove_schedule,
        owned(caller, tenant),
        name,
        alias,
        schedule_id,
        actor=caller.key_id,
    )
    return Response(status_code=204)
