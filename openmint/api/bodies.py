"""Reading request bodies in routes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

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


def takes(kind: type[Body]) -> dict[str, Any]:
    """What the OpenAPI document says of a route whose body `read` parses."""
    schema = kind.model_json_schema()
    content = {"application/json": {"schema": _inlined(schema, schema.pop("$defs", {}))}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(node: Any, definitions: Mapping[str, Any]) -> Any:
    """A schema whose references, which would point outside of it, are what they refer to."""
    if isinstance(node, list):
        return [_inlined(each, definitions) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(each, definitions) for key, each in node.items()}
