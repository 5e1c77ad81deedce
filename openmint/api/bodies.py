"""Reading request bodies in routes."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from fastapi import Request

from openmint.wire.requests import Body, parse

BodyT = TypeVar("BodyT", bound=Body)

INLINE_BYTES = 1 << 18
"""Bodies up to this size are parsed on the event loop; larger ones in a thread."""


async def read(request: Request, kind: type[BodyT]) -> BodyT:
    """The JSON body as `kind`. Raises InvalidRequest with a pointer to the first fault."""
    raw = await request.body()
    if len(raw) <= INLINE_BYTES:
        return parse(kind, raw)
    return await asyncio.to_thread(parse, kind, raw)
