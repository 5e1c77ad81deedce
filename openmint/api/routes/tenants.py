"""Catalogue routes under /catalog/v1: what tenants may use, and what they used."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from openmint.api.auth import App, Caller
from openmint.api.bodies import read, takes
from openmint.api.routes.catalog import READERS, owned
from openmint.types import Tenant
from openmint.wire import catalog as wire

router = APIRouter(prefix="/catalog/v1", tags=["catalog"])

QUOTA = "/tenants/{tenant}/quota"
DEFAULT_WINDOW = timedelta(days=1)
Moment = Annotated[datetime | None, Query()]


@router.get(QUOTA)
async def get_quota(tenant: str, caller: Caller, gateway: App) -> wire.Json:
    """What the tenant may use, its own quota or the default; null is without limit."""
    caller.require(*READERS)
    return wire.encode_quota(gateway.limits.quota(owned(caller, tenant)))


@router.put(QUOTA, openapi_extra=takes(wire.SetQuota))
async def set_quota(tenant: str, request: Request, caller: Caller, gateway: App) -> wire.Json:
    """Give a tenant a quota of its own; what is left out or null is without limit."""
    caller.require()
    body = await read(request, wire.SetQuota)
    quota = body.quota()
    await gateway.limits.set_quota(Tenant(tenant), quota, actor=caller.key_id)
    return wire.encode_quota(quota)


@router.delete(QUOTA, status_code=204)
async def clear_quota(tenant: str, caller: Caller, gateway: App) -> Response:
    """Give a tenant the default quota again."""
    caller.require()
    await gateway.limits.set_quota(Tenant(tenant), None, actor=caller.key_id)
    return Response(status_code=204)


@router.get("/usage")
async def usage(
    caller: Caller,
    gateway: App,
    tenant: str | None = None,
    since: Moment = None,
    until: Moment = None,
) -> wire.Json:
    """Tokens, saves and engine seconds by base and hour, by default of the last day; for an admin
    key without `tenant`, of every tenant."""
    caller.require(*READERS)
    everyone = tenant is None and caller.role == "admin"
    owner = None if everyone else owned(caller, tenant or caller.tenant)
    end = _utc(until) or datetime.now(UTC)
    start = _utc(since) or end - DEFAULT_WINDOW
    hours = await asyncio.to_thread(gateway.catalog.usage, owner, since=start, until=end)
    return {"items": [wire.encode_usage(hour) for hour in hours]}


def _utc(moment: datetime | None) -> datetime | None:
    """The moment, in UTC if it doesn't say where."""
    if moment is None or moment.tzinfo is not None:
        return moment
    return moment.replace(tzinfo=UTC)
