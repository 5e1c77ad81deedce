"""Tinker: start-up calls, sessions, and the account pages that the SDK and its CLI read."""

from __future__ import annotations

import asyncio
from datetime import date, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from openmint.api.auth import App, Caller
from openmint.api.bodies import read, takes
from openmint.catalog.records import Session, SessionStatus
from openmint.errors import InvalidRequest
from openmint.service import checks
from openmint.service.gateway import Gateway
from openmint.types import SessionId
from openmint.wire import requests
from openmint.wire.billing import billing_events_of

router = APIRouter(prefix="/api/v1")

Scope = Literal["owned", "accessible"]
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=1 << 40)]

DEFAULT_PROJECT = "default"
"""How a session without a project is shown, and searched for."""

CLIENT_CONFIG = {
    "parallel_fwdbwd_chunks": False,
    "proto_compress_fwdbwd": False,
    "pjwt_auth_enabled": False,
    "sample_use_retrieve_futures": False,
    "custom_loss_server_side": False,
    "sample_join_sampling_session": True,
    # The SDK's own HTTP backend aborts 1 of 40 short processes as they end (0.38.0, busy machine).
    "use_pyqwest_transport": False,
}
DYNAMIC_CONFIG = {
    "refresh_interval_sec": 300,
    "sample_cancel_enabled": True,
    "sample_cancel_max_batch_size": 64,
}


@router.post("/client/config")
async def client_config() -> dict[str, Any]:
    """Flags for the SDK: chunks in order, keys rather than JWTs. Needs no key."""
    return CLIENT_CONFIG


@router.post("/client/dynamic_config")
async def client_dynamic_config() -> dict[str, Any]:
    """Flags that the SDK reads again from time to time. Needs no key."""
    return DYNAMIC_CONFIG


@router.post("/auth/token")
async def auth_token(caller: Caller) -> dict[str, str]:
    """Refused: keys are used as they are; `client/config` says so to the SDK."""
    raise InvalidRequest("this server takes API keys as they are and issues no JWT")


@router.get("/auth/apikey/me")
async def current_key(caller: Caller) -> dict[str, Any]:
    """The key that was presented, for `tinker auth login`."""
    return {
        "key_id": int.from_bytes(caller.key_id.encode()[:6]),
        "name": caller.key_id,
        "note": f"role {caller.role}",
        "details": {
            "org_details": {"name": caller.tenant},
            "user_details": {"email": f"{caller.key_id}@{caller.tenant}"},
        },
    }


@router.delete("/auth/apikey/me", status_code=204)
async def revoke_current_key(caller: Caller, gateway: App) -> None:
    """Revoke the key that was presented, as `tinker auth logout` does with a key it minted."""
    await asyncio.to_thread(
        gateway.catalog.revoke_key, caller.tenant, caller.key_id, actor=caller.key_id
    )


@router.get("/get_server_capabilities")
async def capabilities(caller: Caller, gateway: App) -> dict[str, Any]:
    """The resident bases."""
    models = [
        {
            "model_name": client.base.name,
            "max_context_length": client.base.context_length,
            "trainable": True,
            "sampleable": True,
        }
        for client in gateway.workers.first()
    ]
    return {"supported_models": models}


@router.post("/telemetry")
async def telemetry(caller: Caller) -> dict[str, str]:
    """Accepted and dropped."""
    return {"status": "accepted"}


@router.post("/create_session", openapi_extra=takes(requests.CreateSession))
async def create_session(request: Request, caller: Caller, gateway: App) -> dict[str, Any]:
    """Open a session; a retry with the same X-Idempotency-Key gets the same one."""
    caller.require("train", "serve")
    body = await read(request, requests.CreateSession)
    session_id = await gateway.sessions.create(
        caller.tenant,
        request.headers.get("x-idempotency-key"),
        user_metadata=checks.check_metadata(body.user_metadata),
        display_name=body.display_name,
        project_id=body.project_id,
        tags=tuple(body.tags),
        sdk_version=body.sdk_version,
    )
    return {"session_id": session_id, "type": "create_session"}


@router.post("/session_heartbeat", openapi_extra=takes(requests.Heartbeat))
async def session_heartbeat(request: Request, caller: Caller, gateway: App) -> dict[str, str]:
    """Keep a session alive; 410 once it is over."""
    caller.require("train", "serve")
    body = await read(request, requests.Heartbeat)
    gateway.sessions.touch(caller.tenant, SessionId(body.session_id))
    return {"type": "session_heartbeat"}


@router.post("/sessions/search", openapi_extra=takes(requests.SearchSessions))
async def search_sessions(request: Request, caller: Caller, gateway: App) -> dict[str, Any]:
    """The tenant's sessions that match, newest first."""
    body = await read(request, requests.SearchSessions)
    before = None
    if body.cursor:
        before = (body.cursor.last_created_at, SessionId(body.cursor.last_session_id))
    found = gateway.catalog.search_sessions(
        caller.tenant,
        session_id=body.session_id,
        project_ids=_projects(body.project_ids),
        user_metadata=body.user_metadata,
        display_name=body.display_name,
        endings=_endings(body.statuses),
        limit=body.limit,
        before=before,
    )
    cursor = None
    if len(found) == body.limit:
        last = found[-1]
        cursor = {
            "last_created_at": last.created_at.isoformat(),
            "last_session_id": last.session_id,
        }
    return {"sessions": [_summary(gateway, s) for s in found], "next_cursor": cursor}


def _projects(names: list[str] | None) -> list[str | None] | None:
    """The projects to search, with None for sessions that are in none and shown as `default`."""
    if names is None:
        return None
    return [*names, None] if DEFAULT_PROJECT in names else [*names]


def _endings(
    queries: list[requests.StatusQuery] | None,
) -> list[tuple[SessionStatus, str | None]] | None:
    """Our status and finish reason, None for any, for each of the wire's status queries.

    No session here is cancelled or failed.
    """
    if queries is None:
        return None
    endings: list[tuple[SessionStatus, str | None]] = []
    for query in queries:
        if query.type == "active":
            endings.append(("open", None))
        elif query.type == "client_finished":
            reasons = query.reasons or (None,)
            endings.extend(("finished", reason) for reason in reasons)
            endings.extend(("expired", reason) for reason in reasons)
    return endings


def _summary(gateway: Gateway, session: Session) -> dict[str, Any]:
    status: dict[str, Any] = {"type": "active"}
    if session.finished_at is not None:
        reason = {"type": session.finish_reason or "success"}
        status = {"type": "client_finished", "reason": reason, "detail": session.finish_detail}
    count, size_bytes = gateway.catalog.checkpoint_usage(
        session.tenant, session_id=session.session_id
    )
    return {
        "session_id": session.session_id,
        "created_at": session.created_at.isoformat(),
        "owner": session.tenant,
        "project_id": session.project_id or DEFAULT_PROJECT,
        "status": status,
        "checkpoints_count": count,
        "checkpoint_storage_bytes": size_bytes,
        "display_name": session.display_name,
        "user_metadata": dict(session.user_metadata) or None,
    }


@router.get("/sessions")
async def list_sessions(
    caller: Caller,
    gateway: App,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: Scope = "owned",
) -> dict[str, Any]:
    """Ids of the tenant's sessions, newest first."""
    page = gateway.catalog.sessions(caller.tenant, limit=limit, offset=offset)
    return {"sessions": [session.session_id for session in page]}


@router.get("/sessions/{session_id}")
async def get_session(
    session_id: str, caller: Caller, gateway: App, access_scope: Scope = "owned"
) -> dict[str, Any]:
    """The runs and samplers of a session."""
    session = gateway.sessions.record(caller.tenant, SessionId(session_id))
    runs = gateway.catalog.runs_of_session(caller.tenant, session.session_id)
    samplers = gateway.catalog.samplers_of_session(caller.tenant, session.session_id)
    return {
        "training_run_ids": [run.run_id for run in runs],
        "sampler_ids": [sampler.sampler_id for sampler in samplers],
        "user_metadata": dict(session.user_metadata),
        "display_name": session.display_name,
    }


@router.post(
    "/sessions/{session_id}/finish", status_code=204, openapi_extra=takes(requests.FinishSession)
)
async def finish_session(session_id: str, request: Request, caller: Caller, gateway: App) -> None:
    """Close a session: its runs leave the worker, its unnamed revisions are collected."""
    caller.require("train", "serve")
    body = await read(request, requests.FinishSession)
    reason = body.reason.type if body.reason else "success"
    await gateway.sessions.finish(caller.tenant, SessionId(session_id), reason, body.detail)


@router.put(
    "/sessions/{session_id}/project", status_code=204, openapi_extra=takes(requests.SessionProject)
)
async def move_session(session_id: str, request: Request, caller: Caller, gateway: App) -> None:
    """Put a session into a project, which is a label here."""
    caller.require("train")
    body = await read(request, requests.SessionProject)
    await gateway.sessions.move(caller.tenant, SessionId(session_id), body.project_id)


@router.get("/sessions/{session_id}/trace_export")
async def export_trace(
    session_id: str, request: Request, caller: Caller, gateway: App, access_scope: Scope = "owned"
) -> dict[str, Any]:
    """A link to the timeline of the session's remembered requests."""
    session = gateway.sessions.record(caller.tenant, SessionId(session_id))
    token, _ = gateway.checkpoints.links.sign(f"trace/{session.session_id}")
    url = request.url_for("download_trace", session_id=session.session_id, token=token)
    return {"status": "ready", "url": str(url)}


@router.get("/traces/{session_id}/{token}")
async def download_trace(session_id: str, token: str, gateway: App) -> Response:
    """The timeline as Chrome trace JSON, which Perfetto opens. The signed token is the key."""
    gateway.checkpoints.links.check(f"trace/{session_id}", token)
    return Response(gateway.futures.trace(session_id), media_type="application/json")


@router.get("/audit")
async def audit(
    caller: Caller,
    gateway: App,
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
    day: date | None = None,
) -> dict[str, Any]:
    """The tenant's audit events of one UTC day, today's by default."""
    caller.require("admin")
    wanted = (event_type, event_type.removesuffix("s"))
    entries = [
        {
            "timestamp": event.created_at.isoformat(),
            "event": event.action.replace(".", "_"),
            "event_details": {**event.details, "actor": event.actor, "subject": event.subject},
        }
        for event in gateway.sessions.audit(caller.tenant, day)
        if event_type == "all" or event.action.startswith(wanted)
    ]
    return {"entries": entries}


@router.get("/billing/usage/events")
async def billing_events(
    caller: Caller,
    gateway: App,
    starting_on: datetime,
    ending_before: datetime,
    project_id: str | None = None,
) -> dict[str, Any]:
    """What the tenant used, hour by hour and base by base; nothing is billed for it."""
    hours = await asyncio.to_thread(
        gateway.catalog.usage, caller.tenant, since=starting_on, until=ending_before
    )
    return {"data": [event for hour in hours for event in billing_events_of(hour)], "sessions": {}}


@router.get("/billing/usage/checkpoints/current")
async def billing_checkpoints(
    caller: Caller, gateway: App, project_id: str | None = None
) -> dict[str, Any]:
    """How many checkpoints the tenant keeps, and their bytes."""
    count, size_bytes = gateway.catalog.checkpoint_usage(caller.tenant)
    if not count:
        return {"data": []}
    item = {
        "org_user_urn": f"openmint:tenant:{caller.tenant}",
        "user_name": caller.tenant,
        "checkpoint_count": count,
        "size_bytes": size_bytes,
        "size_gigabytes": size_bytes / 1e9,
    }
    return {"data": [item]}
