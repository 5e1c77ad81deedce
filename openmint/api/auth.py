"""Who is calling: one dependency, `Caller`, that every route but health takes."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from openmint.catalog.records import Principal
from openmint.errors import Unauthenticated
from openmint.service.gateway import Gateway

UNCOUNTED = frozenset(
    f"/api/v1/{name}"
    for name in ("retrieve_future", "retrieve_futures", "session_heartbeat", "telemetry")
)
"""Paths that clients ask by themselves, and that a tenant over its limit needs to hear of it."""


async def gateway_of(request: Request) -> Gateway:
    """A coroutine, as FastAPI would send each call of a plain function to a thread."""
    gateway: Gateway = request.app.state.gateway
    return gateway


App = Annotated[Gateway, Depends(gateway_of)]
"""Type of the gateway in a route's signature."""


def presented_key(request: Request) -> str:
    """The key in `X-API-Key` or `Authorization: Bearer`. Raises Unauthenticated without one."""
    if key := request.headers.get("x-api-key"):
        return key
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    raise Unauthenticated("no API key; send X-API-Key or Authorization: Bearer")


async def authenticate(request: Request, gateway: App) -> Principal:
    """The principal of the request's key. Raises Unauthenticated, the same for every bad key, and
    LimitReached for a tenant that asks more often than it may."""
    principal = gateway.catalog.authenticate(presented_key(request))
    if request.url.path not in UNCOUNTED:
        gateway.limits.take_request(principal.tenant)
    request.scope["state"]["log_fields"] = {"tenant": principal.tenant, "key": principal.key_id}
    return principal


Caller = Annotated[Principal, Depends(authenticate)]
"""Type of the authenticated caller in a route's signature."""
