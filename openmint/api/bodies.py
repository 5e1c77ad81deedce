"""Reading request bodies in routes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import Request

from openmint.errors import InvalidRequest
from openmint.service.training import Training
from openmint.types import Tenant
from openmint.wire.requests import Body, parse, run_request

BodyT = TypeVar("BodyT", bound=Body)

INLINE_BYTES = 1 << 18
"""Bodies up to this size are parsed on the event loop; larger ones in a thread."""


async def read(request: Request, kind: type[BodyT]) -> BodyT:
    """The JSON body as `kind`. Raises InvalidRequest with a pointer to the first fault."""
    return await _parsed(await request.body(), kind)


async def read_of_run(
    request: Request, kind: type[BodyT], training: Training, tenant: Tenant
) -> BodyT:
    """`read` for a request of a run; a refused one counts, as `counts_refusal` says."""
    raw = await request.body()
    with counts_refusal(raw, training, tenant):
        return await _parsed(raw, kind)


@contextmanager
def counts_refusal(raw: bytes, training: Training, tenant: Tenant) -> Iterator[None]:
    """A JSON body refused inside counts its seq_id as used, where it says whose it is; so the
    run's next request does not wait for it."""
    try:
        yield
    except InvalidRequest:
        if named := run_request(raw):
            training.refuse(tenant, named.model_id, named.seq_id)
        raise


async def _parsed(raw: bytes, kind: type[BodyT]) -> BodyT:
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
