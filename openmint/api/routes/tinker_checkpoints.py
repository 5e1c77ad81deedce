"""Tinker: saving, loading and managing checkpoints; runs as the REST client lists them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from openmint.api.auth import App, Caller
from openmint.api.bodies import read, read_of_run, takes
from openmint.api.routes.tinker_training import promise
from openmint.catalog.records import Checkpoint, Run, Segment
from openmint.errors import InvalidRequest
from openmint.service import checks
from openmint.service.checkpoints import CopyTo
from openmint.service.gateway import Gateway
from openmint.service.orders import SaveOrder
from openmint.service.resolve import checkpoint_path, path_of
from openmint.types import RunId, SessionId, Tenant
from openmint.wire import requests
from openmint.wire.decode import check_optimizer

router = APIRouter(prefix="/api/v1")

Scope = Literal["owned", "accessible"]
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=1 << 40)]
KINDS = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
PUBLISH_INSTEAD = "weights_access_token is not supported; have the owner publish the checkpoint"


@router.post("/save_weights", openapi_extra=takes(requests.SaveWeights))
async def save_weights(request: Request, caller: Caller, gateway: App) -> Response:
    """Save a training state under a name."""
    caller.require("train")
    body = await read_of_run(request, requests.SaveWeights, gateway.training, caller.tenant)
    with gateway.training.request(caller.tenant, body.model_id, body.seq_id) as run:
        future = gateway.checkpoints.save(run, body.seq_id, _order("weights", body))
    return await promise(future, run.run_id)


@router.post("/save_weights_for_sampler", openapi_extra=takes(requests.SaveForSampler))
async def save_weights_for_sampler(request: Request, caller: Caller, gateway: App) -> Response:
    """Make a revision: named, or unnamed with a sampler on it."""
    caller.require("train")
    body = await read_of_run(request, requests.SaveForSampler, gateway.training, caller.tenant)
    with gateway.training.request(caller.tenant, body.model_id, body.seq_id) as run:
        if body.path is None and body.sampling_session_seq_id is not None:
            future = gateway.checkpoints.open_sampler(
                run, body.seq_id, body.sampling_session_seq_id, inflight=body.kind == "inflight"
            )
        else:
            if body.kind == "inflight":
                raise InvalidRequest("an inflight save has no path; send sampling_session_seq_id")
            order = _order("sampler_weights", body)
            future = gateway.checkpoints.save(run, body.seq_id, order)
    return await promise(future, run.run_id)


@router.post("/save_weights_external", openapi_extra=takes(requests.SaveExternal))
async def save_weights_external(request: Request, caller: Caller, gateway: App) -> Response:
    """Save a PEFT folder for download."""
    caller.require("train")
    body = await read_of_run(request, requests.SaveExternal, gateway.training, caller.tenant)
    with gateway.training.request(caller.tenant, body.model_id, body.seq_id) as run:
        if body.age_encryption_recipients:
            raise InvalidRequest("age_encryption_recipients is not supported; send none")
        future = gateway.checkpoints.save(run, body.seq_id, _order("external_weights", body))
    return await promise(future, run.run_id)


def _order(
    segment: Segment,
    body: requests.SaveWeights | requests.SaveForSampler | requests.SaveExternal,
) -> SaveOrder:
    """What to save; without a name it is named by its seq_id."""
    name = body.path if body.path is not None else f"seq-{body.seq_id or 0}"
    if isinstance(body, requests.SaveExternal):
        return SaveOrder(segment, name, body.ttl_seconds, overwrite=False, user_metadata=None)
    return SaveOrder(segment, name, body.ttl_seconds, body.overwrite, body.user_metadata)


@router.post("/load_weights", openapi_extra=takes(requests.LoadWeights))
async def load_weights(request: Request, caller: Caller, gateway: App) -> Response:
    """Load a checkpoint into a run, or start a run from it."""
    caller.require("train")
    body = await read_of_run(request, requests.LoadWeights, gateway.training, caller.tenant)
    if body.session_id is not None:
        _check_load(body)
        return await _create_from(body, caller.tenant, gateway)
    if body.model_id is None:
        raise InvalidRequest("send model_id and seq_id, or session_id and model_seq_id")
    with gateway.training.request(caller.tenant, body.model_id, body.seq_id) as run:
        _check_load(body)
        future = gateway.checkpoints.load(run, body.seq_id, body.path, optimizer=body.optimizer)
    return await promise(future, run.run_id)


def _check_load(body: requests.LoadWeights) -> None:
    if body.weights_access_token is not None:
        raise InvalidRequest(PUBLISH_INSTEAD)
    if body.optimizer_config is not None:
        check_optimizer(body.optimizer_config)


async def _create_from(body: requests.LoadWeights, tenant: Tenant, gateway: Gateway) -> Response:
    if body.session_id is None or body.model_seq_id is None or body.model_id is not None:
        raise InvalidRequest("send session_id with model_seq_id, and no model_id")
    new, future = gateway.checkpoints.create_from(
        tenant,
        SessionId(body.session_id),
        body.model_seq_id,
        body.path,
        optimizer=body.optimizer,
        base_model=body.base_model,
        user_metadata=checks.check_metadata(body.user_metadata),
    )
    return await promise(future, new.run_id)


@router.post("/weights_info", openapi_extra=takes(requests.WeightsInfo))
async def weights_info(request: Request, caller: Caller, gateway: App) -> dict[str, Any]:
    """What a checkpoint holds, so that a client can start a run from it."""
    body = await read(request, requests.WeightsInfo)
    found = gateway.checkpoints.readable(caller.tenant, body.tinker_path)
    return {
        "base_model": found.base_name,
        "is_lora": True,
        "lora_rank": found.spec.rank,
        "train_attn": found.spec.train_attn,
        "train_mlp": found.spec.train_mlp,
        "train_unembed": found.spec.train_unembed,
        "optimizer_config": {"type": "adamw"},
    }


@router.post("/copy_weights", openapi_extra=takes(requests.CopyWeights))
async def copy_weights(request: Request, caller: Caller, gateway: App) -> dict[str, str]:
    """Put a checkpoint under a run of one's own; the bytes are shared, not copied."""
    caller.require("train")
    body = await read(request, requests.CopyWeights)
    if body.weights_access_token or request.headers.get("x-tinker-weights-access-token"):
        raise InvalidRequest(PUBLISH_INSTEAD)
    if (body.session_id is None) != (body.model_seq_id is None):
        raise InvalidRequest("send session_id and model_seq_id together")
    if body.session_id is None and body.destination_project_id is None:
        raise InvalidRequest("send destination_project_id, or session_id and model_seq_id")
    copy = CopyTo(
        SessionId(body.session_id) if body.session_id else None,
        body.model_seq_id,
        body.destination_project_id,
        body.ttl_seconds,
    )
    retry_key = request.headers.get("x-idempotency-key")
    path = await gateway.checkpoints.copy(caller.tenant, body.source_path, copy, retry_key)
    return {"tinker_path": str(path)}


# -- runs and their checkpoints -------------------------------------------------------------------


@router.get("/training_runs")
async def list_runs(
    caller: Caller,
    gateway: App,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: Scope = "owned",
    project_id: str | None = None,
) -> dict[str, Any]:
    """The tenant's runs, newest first."""
    runs, total = gateway.catalog.runs(
        caller.tenant, limit=limit, offset=offset, project_id=project_id
    )
    return {
        "training_runs": [_run_json(gateway, run) for run in runs],
        "cursor": {"offset": offset, "limit": limit, "total_count": total},
    }


@router.get("/training_runs/{run_id}")
async def get_run(
    run_id: str, caller: Caller, gateway: App, access_scope: Scope = "owned"
) -> dict[str, Any]:
    """One run."""
    return _run_json(gateway, gateway.catalog.run(caller.tenant, RunId(run_id)))


@router.get("/training_runs/{run_id}/checkpoints")
async def list_run_checkpoints(run_id: str, caller: Caller, gateway: App) -> dict[str, Any]:
    """A run's checkpoints, newest first."""
    found = gateway.catalog.run_checkpoints(caller.tenant, RunId(run_id))
    return {"checkpoints": [_checkpoint_json(checkpoint) for checkpoint in found]}


@router.get("/checkpoints")
async def list_checkpoints(
    caller: Caller, gateway: App, limit: Limit = 100, offset: Offset = 0
) -> dict[str, Any]:
    """The tenant's checkpoints, newest first."""
    found, total = gateway.catalog.checkpoints(caller.tenant, limit=limit, offset=offset)
    return {
        "checkpoints": [_checkpoint_json(checkpoint) for checkpoint in found],
        "cursor": {"offset": offset, "limit": limit, "total_count": total},
    }


CHECKPOINT = "/training_runs/{run_id}/checkpoints/{segment}/{name}"


@router.delete(CHECKPOINT, status_code=204)
async def delete_checkpoint(
    run_id: str, segment: str, name: str, caller: Caller, gateway: App
) -> None:
    """Delete a checkpoint; its bytes go once nothing else refers to them."""
    caller.require("train")
    path = checkpoint_path(run_id, segment, name)
    await gateway.checkpoints.delete(caller.tenant, path, actor=caller.key_id)


@router.post(CHECKPOINT + "/publish", status_code=204)
async def publish(run_id: str, segment: str, name: str, caller: Caller, gateway: App) -> None:
    """Let every tenant read a checkpoint."""
    caller.require("train")
    path = checkpoint_path(run_id, segment, name)
    await gateway.checkpoints.set_public(caller.tenant, path, public=True, actor=caller.key_id)


@router.delete(CHECKPOINT + "/publish", status_code=204)
async def unpublish(run_id: str, segment: str, name: str, caller: Caller, gateway: App) -> None:
    """Take a checkpoint back from other tenants."""
    caller.require("train")
    path = checkpoint_path(run_id, segment, name)
    await gateway.checkpoints.set_public(caller.tenant, path, public=False, actor=caller.key_id)


@router.put(CHECKPOINT + "/ttl", status_code=204, openapi_extra=takes(requests.CheckpointTtl))
async def set_ttl(
    run_id: str, segment: str, name: str, request: Request, caller: Caller, gateway: App
) -> None:
    """Have a checkpoint expire, or with null never."""
    caller.require("train")
    body = await read(request, requests.CheckpointTtl)
    path = checkpoint_path(run_id, segment, name)
    await gateway.checkpoints.set_ttl(caller.tenant, path, body.ttl_seconds)


@router.get(CHECKPOINT + "/external_weights_urls")
async def external_weights_urls(
    run_id: str, segment: str, name: str, request: Request, caller: Caller, gateway: App
) -> dict[str, Any]:
    """Signed links to the files of an external checkpoint."""
    path = checkpoint_path(run_id, segment, name)
    files, expires = gateway.checkpoints.external_links(caller.tenant, path)
    urls = {
        file: str(request.url_for("download_file", digest=digest, file=file, token=token))
        for file, (digest, token) in files.items()
    }
    return {"urls": urls, "expires": expires.isoformat()}


@router.get("/files/{digest}/{file}/{token}")
async def download_file(digest: str, file: str, token: str, gateway: App) -> Response:
    """One file of an external checkpoint. The signed token is the key."""
    content = await gateway.checkpoints.external_file(digest, file, token)
    return Response(content, media_type="application/octet-stream")


def _checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    path = path_of(checkpoint)
    expires_at = checkpoint.expires_at
    return {
        "checkpoint_id": f"{path.segment}/{path.name}",
        "checkpoint_type": KINDS[path.segment],
        "time": checkpoint.created_at.isoformat(),
        "tinker_path": str(path),
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.public,
        "user_metadata": dict(checkpoint.user_metadata) or None,
        "expires_at": expires_at.isoformat() if expires_at else None,
    }


def _run_json(gateway: Gateway, run: Run) -> dict[str, Any]:
    newest: dict[str, Any] = dict.fromkeys(KINDS)
    for checkpoint in gateway.catalog.run_checkpoints(run.tenant, run.run_id):
        newest[checkpoint.segment] = newest[checkpoint.segment] or _checkpoint_json(checkpoint)
    return {
        "training_run_id": run.run_id,
        "base_model": run.base_name,
        "model_owner": run.tenant,
        "is_lora": True,
        "corrupted": False,
        "lora_rank": run.spec.rank,
        "last_request_time": run.last_request_at.isoformat(),
        "last_checkpoint": newest["weights"],
        "last_sampler_checkpoint": newest["sampler_weights"],
        "user_metadata": dict(run.user_metadata) or None,
    }
