"""Who is calling: one dependency, `Caller`, that every route but health takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, Request

from openmint.errors import Forbidden, Unauthenticated
from openmint.service.gateway import Gateway
from openmint.types import Tenant

Role = Literal["admin", "train", "serve", "read"]


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated key: whose it is and what it may do."""

    tenant: Tenant
    role: Role
    key_id: str

    def require(self, *roles: Role) -> None:
        """Raises Forbidden unless the key has one of `roles`; an admin key may do everything."""
        if self.role != "admin" and self.role not in roles:
            wanted = " or ".join(("admin", *roles))
            raise Forbidden(f"this key has role {self.role!r}; this call needs {wanted}")


def gateway_of(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def presented_key(request: Request) -> str:
    """The key in `X-API-Key` or `Authorization: Bearer`. Raises Unauthenticated without one."""
    if key := request.headers.get("x-api-key"):
        return key
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    raise Unauthenticated("no API key; send X-API-Key or Authorization: Bearer")


async def authenticate(request: Request) -> Principal:
    """The principal of the request's key. Raises Unauthenticated, the same for every bad key."""
    raise Unauthenticated(f"unknown key {presented_key(request)[:4]}")


Caller = Annotated[Principal, Depends(authenticate)]
"""Type of the authenticated caller in a route's signature."""

App = Annotated[Gateway, Depends(gateway_of)]
"""Type of the gateway in a route's signature."""
