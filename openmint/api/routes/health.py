"""Liveness and readiness; open to everyone."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from openmint.api.auth import App

router = APIRouter()


@router.get("/healthz")
@router.get("/api/v1/healthz")
async def healthz() -> dict[str, str]:
    """200 while the process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(gateway: App) -> JSONResponse:
    """200 once every base is resident in a live worker that can log, else 503 with what is
    missing. Replicas are shown; the service can do without them."""
    states = gateway.workers.states()
    needed = [states[client.name] for client in gateway.workers.first()]
    is_complete = len(needed) == len(gateway.settings.bases)
    ready = is_complete and all(state == "ready" for state in needed)
    content = {"status": "ready" if ready else "unavailable", "bases": states}
    return JSONResponse(content, 200 if ready else 503)
