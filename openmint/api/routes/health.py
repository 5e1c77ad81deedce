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
    missing."""
    states = gateway.workers.states()
    is_complete = len(states) == len(gateway.settings.bases)
    ready = is_complete and all(state == "ready" for state in states.values())
    content = {"status": "ready" if ready else "unavailable", "bases": states}
    return JSONResponse(content, 200 if ready else 503)
