"""Prometheus scrape; open like the health routes, as it holds no names of policies or tenants."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from openmint.observe.metrics import Metrics

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """All metrics of the gateway and its workers in the Prometheus text format."""
    registry: Metrics = request.app.state.metrics
    return Response(registry.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
