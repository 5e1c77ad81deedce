"""Catalogue routes under /catalog/v1: policies, revisions, aliases, evaluations, keys, audit."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.responses import Response

from openmint.api.auth import App, Caller
from openmint.api.bodies import read, takes
from openmint.catalog.records import Alias, Evaluation, Filters, Principal, Revision, Role
from openmint.errors import InvalidRequest, NotFound, UnsupportedFormat
from openmint.service.adapters import parse_config
from openmint.service.evaluations import EvaluationRequest, interval_95
from openmint.service.gateway import Gateway
from openmint.service.promotion import full_digest, parse_if_match
from openmint.types import Tenant
from openmint.wire import catalog as wire
from openmint.wire.openai import parse_json

router = APIRouter(prefix="/catalog/v1", tags=["catalog"])

READERS: tuple[Role, ...] = ("read", "serve", "train")
"""Roles that may look; an admin key may do everything."""
MAX_CONFIG_BYTES = 1 << 20

Limit = Annotated[int, Query(ge=1, le=1000)]
Depth = Annotated[int, Query(ge=1, le=1000)]
Cursor = Annotated[str | None, Query(max_length=512)]
RowId = Annotated[int, Path(ge=1, lt=1 << 62)]
Word = Annotated[str | None, Query(max_length=128)]
IfMatch = Annotated[str | None, Header()]

POLICY = "/policies/{tenant}/{name}"
REVISION = POLICY + "/revisions/{reference}"
ALIAS = POLICY + "/aliases/{alias}"
TAG = "/tags/{tag}"


# -- policies and revisions -----------------------------------------------------------------------


def wanted(
    prefix: Word = None,
    tag: Word = None,
    owner: Word = None,
    base: Annotated[str | None, Query(max_length=512)] = None,
    task: Word = None,
    min_score: Annotated[float | None, Query(ge=0, le=1, allow_inf_nan=False)] = None,
) -> Filters:
    """What the parameters of a search ask for. Raises InvalidRequest."""
    return Filters(prefix, tag, owner, base, task, min_score)


Wanted = Annotated[Filters, Depends(wanted)]


@router.get("/policies")
async def list_policies(
    caller: Caller,
    gateway: App,
    wanted: Wanted,
    tenant: str | None = None,
    search: Word = None,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> wire.Json:
    """A tenant's policies by name, with `task` by score; those that all filters want. `search`
    matches any part of a name."""
    caller.require(*READERS)
    owner = owned(caller, tenant or caller.tenant)
    page = await asyncio.to_thread(
        gateway.catalog.policies, owner, wanted, limit=limit, cursor=cursor, search=search
    )
    items = [wire.encode_policy(policy) for policy in page.items]
    return {"items": items, "next_cursor": page.next_cursor}


@router.get("/revisions")
async def find_revisions(
    caller: Caller,
    gateway: App,
    wanted: Wanted,
    tenant: str | None = None,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> wire.Json:
    """A tenant's revisions of all policies that all filters want: by name and number, with `task`
    the best score first."""
    caller.require(*READERS)
    owner = owned(caller, tenant or caller.tenant)
    page = await asyncio.to_thread(
        gateway.catalog.find_revisions, owner, wanted, limit=limit, cursor=cursor
    )
    items = [wire.encode_revision(revision) for revision in page.items]
    return {"items": items, "next_cursor": page.next_cursor}


@router.get(POLICY)
async def get_policy(tenant: str, name: str, caller: Caller, gateway: App) -> wire.Json:
    """A policy with its tags and aliases."""
    caller.require(*READERS)
    owner = owned(caller, tenant)
    policy = gateway.catalog.policy(owner, name)
    aliases = [wire.encode_alias(alias) for alias in gateway.catalog.aliases(owner, name)]
    tags = gateway.catalog.tags(owner, name)
    return {**wire.encode_policy(policy), "tags": tags, "aliases": aliases}


@router.get(POLICY + "/revisions")
async def list_revisions(
    tenant: str,
    name: str,
    caller: Caller,
    gateway: App,
    cursor: Cursor = None,
    ephemeral: bool = False,
    limit: Limit = 100,
) -> wire.Json:
    """A policy's revisions, newest first; with `ephemeral` also the unnamed saves of training."""
    caller.require(*READERS)
    found = gateway.catalog.revisions(
        owned(caller, tenant),
        name,
        limit=limit,
        before=_number(cursor),
        ephemeral=ephemeral,
    )
    return _page([wire.encode_revision(revision) for revision in found], limit, "number")


@router.get(REVISION)
async def get_revision(
    tenant: str, name: str, reference: str, caller: Caller, gateway: App
) -> wire.Json:
    """A revision by digest, the start of one, alias or `default`, with its tags, its evaluations
    and the tiers of memory that it is in."""
    caller.require(*READERS)
    revision = _revision(gateway, caller, tenant, name, reference)
    evaluations = gateway.catalog.evaluations(
        revision.tenant, policy=revision.policy_name, digest=revision.digest
    )
    shown = [_evaluation(evaluation) for evaluation in evaluations]
    tiers = ["store", *gateway.workers.tiers_of(revision.base_digest, revision.digest)]
    tags = gateway.catalog.tags(revision.tenant, name, revision.digest)
    return {
        **wire.encode_revision(revision),
        "tags": tags,
        "tiers": tiers,
        "evaluations": shown,
    }


@router.get(REVISION + "/lineage")
async def get_lineage(
    tenant: str, name: str, reference: str, caller: Caller, gateway: App, depth: Depth = 100
) -> wire.Json:
    """The revision and its ancestors, nearest first, at most `depth` steps away."""
    caller.require(*READERS)
    revision = _revision(gateway, caller, tenant, name, reference)
    lineage = await asyncio.to_thread(
        gateway.catalog.lineage, revision.tenant, name, revision.digest, depth=depth
    )
    return {"items": [wire.encode_relative(n, each) for n, each in enumerate(lineage)]}


@router.get(REVISION + "/descendants")
async def get_descendants(
    tenant: str, name: str, reference: str, caller: Caller, gateway: App, depth: Depth = 100
) -> wire.Json:
    """What descends from the revision, nearest first, at most `depth` steps away and at most 1000
    revisions."""
    caller.require(*READERS)
    revision = _revision(gateway, caller, tenant, name, reference)
    found = await asyncio.to_thread(
        gateway.catalog.descendants, revision.tenant, name, revision.digest, depth=depth
    )
    return {"items": [wire.encode_relative(distance, each) for distance, each in found]}


@router.delete(REVISION)
async def delete_revision(
    tenant: str, name: str, reference: str, caller: Caller, gateway: App
) -> Response:
    """Delete a revision, by its whole digest, that no alias names."""
    caller.require("train")
    owner, digest = owned(caller, tenant), full_digest(reference)
    await gateway.promotion.delete_revision(owner, name, digest, actor=caller.key_id)
    return Response(status_code=204)


@router.get(REVISION + "/peft")
async def export_peft(
    tenant: str, name: str, reference: str, caller: Caller, gateway: App
) -> Response:
    """A tar of the PEFT folder: adapter_config.json and adapter_model.safetensors."""
    caller.require(*READERS)
    revision = _revision(gateway, caller, tenant, name, reference)
    archive = await gateway.adapters.export_peft(revision)
    filename = f"{name}-{revision.digest.removeprefix('sha256:')[:12]}.tar"
    headers = {
        "Content-Disposition": f'attachment; filename="{filename}"',
        "X-OpenMint-Revision": revision.digest,
    }
    return Response(archive, media_type="application/x-tar", headers=headers)


@router.post(POLICY + "/revisions", status_code=201, openapi_extra=takes(wire.ImportAdapter))
async def import_revision(
    tenant: str, name: str, request: Request, caller: Caller, gateway: App
) -> wire.Json:
    """Import a PEFT adapter: a multipart form, or JSON with the weights in base64."""
    caller.require("train")
    owner = owned(caller, tenant)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        base, config, weights = await _read_form(request)
    elif content_type == "application/json":
        body = await read(request, wire.ImportAdapter)
        base, config = body.base, body.config
        weights = wire.decode_base64(body.weights, "weights")
    else:
        raise UnsupportedFormat("send multipart/form-data or application/json")
    revision = await gateway.adapters.import_peft(
        owner, name, base, config, weights, actor=caller.key_id
    )
    return wire.encode_revision(revision)


# -- tags -----------------------------------------------------------------------------------------


@router.put(POLICY + TAG, status_code=204)
async def tag_policy(tenant: str, name: str, tag: str, caller: Caller, gateway: App) -> Response:
    """Tag a policy; a tag that it has changes nothing."""
    caller.require("train")
    owner = owned(caller, tenant)
    await gateway.promotion.set_tag(owner, name, None, tag, actor=caller.key_id)
    return Response(status_code=204)


@router.delete(POLICY + TAG)
async def untag_policy(tenant: str, name: str, tag: str, caller: Caller, gateway: App) -> Response:
    """Take a tag from a policy; fine when it doesn't have it."""
    caller.require("train")
    owner = owned(caller, tenant)
    await gateway.promotion.unset_tag(owner, name, None, tag, actor=caller.key_id)
    return Response(status_code=204)


@router.put(REVISION + TAG, status_code=204)
async def tag_revision(
    tenant: str, name: str, reference: str, tag: str, caller: Caller, gateway: App
) -> Response:
    """Tag the revision that a digest or an alias names now."""
    caller.require("train")
    owner = owned(caller, tenant)
    await gateway.promotion.set_tag(owner, name, reference, tag, actor=caller.key_id)
    return Response(status_code=204)


@router.delete(REVISION + TAG)
async def untag_revision(
    tenant: str, name: str, reference: str, tag: str, caller: Caller, gateway: App
) -> Response:
    """Take a tag from the revision that a digest or an alias names now."""
    caller.require("train")
    owner = owned(caller, tenant)
    await gateway.promotion.unset_tag(owner, name, reference, tag, actor=caller.key_id)
    return Response(status_code=204)


# -- retention ------------------------------------------------------------------------------------


@router.get(POLICY + "/retention")
async def get_retention(tenant: str, name: str, caller: Caller, gateway: App) -> wire.Json:
    """How many revisions a policy keeps, and which would be deleted now."""
    caller.require(*READERS)
    owner = owned(caller, tenant)
    return wire.encode_plan(await asyncio.to_thread(gateway.retention.plan, owner, name))


@router.put(POLICY + "/retention", openapi_extra=takes(wire.SetRetention))
async def set_retention(
    tenant: str, name: str, request: Request, caller: Caller, gateway: App
) -> wire.Json:
    """Have a policy keep so many of its newest revisions; the others go within a while."""
    caller.require("train")
    owner = owned(caller, tenant)
    body = await read(request, wire.SetRetention)
    plan = await gateway.retention.set(owner, name, body.keep_revisions, actor=caller.key_id)
    return wire.encode_plan(plan)


@router.get("/garbage")
async def list_garbage(caller: Caller, gateway: App, limit: Limit = 100) -> wire.Json:
    """Bytes that no record names, and when they go; null is at once, unless somebody samples."""
    caller.require()
    doomed = await asyncio.to_thread(gateway.catalog.doomed_blobs, limit)
    grace_seconds = gateway.collector.grace_seconds
    items = [wire.encode_doomed(blob, grace_seconds) for blob in doomed]
    return {"items": items, "grace_seconds": grace_seconds}


# -- many at once ---------------------------------------------------------------------------------


@router.post("/imports", status_code=201)
async def import_archive(
    request: Request,
    caller: Caller,
    gateway: App,
    tenant: str | None = None,
    base: Annotated[str | None, Query(max_length=512)] = None,
) -> wire.Json:
    """Import a tar of PEFT folders `POLICY/` or `POLICY/NAME/`, at most 1000: what fits becomes
    revisions, in one transaction; each refusal is in the answer."""
    caller.require("train")
    owner = owned(caller, tenant or caller.tenant)
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-tar":
        raise UnsupportedFormat("send a plain tar as application/x-tar")
    outcomes = await gateway.adapters.import_archive(
        owner, base, await request.body(), actor=caller.key_id
    )
    return {"items": [wire.encode_import(owner, outcome) for outcome in outcomes]}


# -- aliases --------------------------------------------------------------------------------------


@router.get(POLICY + "/aliases")
async def list_aliases(tenant: str, name: str, caller: Caller, gateway: App) -> wire.Json:
    """The policy's aliases and what they name now."""
    caller.require(*READERS)
    aliases = gateway.catalog.aliases(owned(caller, tenant), name)
    return {"items": [wire.encode_alias(alias) for alias in aliases]}


@router.get(ALIAS + "/history")
async def alias_history(
    tenant: str,
    name: str,
    alias: str,
    caller: Caller,
    gateway: App,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> wire.Json:
    """Every move of an alias, newest first."""
    caller.require(*READERS)
    events = gateway.catalog.alias_history(
        owned(caller, tenant), name, alias, limit=limit, before_id=_number(cursor)
    )
    return _page([wire.encode_alias_event(event) for event in events], limit, "event_id")


@router.post(ALIAS + "/promote", openapi_extra=takes(wire.Promote))
async def promote(
    tenant: str,
    name: str,
    alias: str,
    request: Request,
    caller: Caller,
    gateway: App,
    if_match: IfMatch = None,
) -> Response:
    """Point an alias at a revision; holds for the next request."""
    caller.require("train")
    body = await read(request, wire.Promote)
    moved = await gateway.promotion.promote(
        owned(caller, tenant),
        name,
        alias,
        body.revision,
        actor=caller.key_id,
        reason=body.reason,
        expected_version=expected_version(body.if_version, if_match),
        override_reason=body.override_reason,
    )
    return alias_answer(moved)


@router.post(ALIAS + "/rollback", openapi_extra=takes(wire.Rollback))
async def rollback(
    tenant: str,
    name: str,
    alias: str,
    request: Request,
    caller: Caller,
    gateway: App,
    if_match: IfMatch = None,
) -> Response:
    """Abort a running canary, else point an alias back at what it named before; holds for the next
    request."""
    caller.require("train")
    body = await read(request, wire.Rollback)
    moved = await gateway.promotion.rollback(
        owned(caller, tenant),
        name,
        alias,
        actor=caller.key_id,
        reason=body.reason,
        expected_version=expected_version(body.if_version, if_match),
    )
    return alias_answer(moved)


# -- memory ----------------------------------------------------------------------------------------


@router.get("/pins")
async def list_pins(caller: Caller, gateway: App, tenant: str | None = None) -> wire.Json:
    """A tenant's pinned aliases, the oldest pin first, and whether what they name is in memory."""
    caller.require(*READERS)
    found = await gateway.pinning.statuses(owned(caller, tenant or caller.tenant))
    return {"items": [wire.encode_pin(status.pin, status.states) for status in found]}


@router.put(ALIAS + "/pin")
async def pin(tenant: str, name: str, alias: str, caller: Caller, gateway: App) -> wire.Json:
    """Keep what an alias names in memory from now on, also after its moves."""
    caller.require("train")
    owner = owned(caller, tenant)
    status = await gateway.pinning.pin(owner, name, alias, actor=caller.key_id)
    return wire.encode_pin(status.pin, status.states)


@router.delete(ALIAS + "/pin", status_code=204)
async def unpin(tenant: str, name: str, alias: str, caller: Caller, gateway: App) -> Response:
    """Let what an alias names leave memory like any other; fine when it isn't pinned."""
    caller.require("train")
    await gateway.pinning.unpin(owned(caller, tenant), name, alias, actor=caller.key_id)
    return Response(status_code=204)


@router.post("/prewarm", openapi_extra=takes(wire.PrewarmModels))
async def prewarm(request: Request, caller: Caller, gateway: App) -> wire.Json:
    """Have revisions read into memory before they are asked for; answers once they are there."""
    caller.require("serve", "train")
    body = await read(request, wire.PrewarmModels)
    digests = await gateway.prewarming.prewarm(
        caller.tenant, body.models, body.load_deadline_seconds
    )
    pairs = zip(body.models, digests, strict=True)
    return {"items": [{"model": model, "digest": digest} for model, digest in pairs]}


# -- evaluation -----------------------------------------------------------------------------------


@router.get("/tasks")
async def list_tasks(caller: Caller, gateway: App) -> wire.Json:
    """The tenant's evaluation tasks, without their items."""
    caller.require(*READERS)
    tasks = gateway.catalog.tasks(caller.tenant)
    return {"items": [wire.encode_task_record(task, whole=False) for task in tasks]}


@router.post("/tasks", status_code=201)
async def create_task(request: Request, caller: Caller, gateway: App) -> wire.Json:
    """Keep a task under its name and digest; the same task again changes nothing."""
    caller.require("train")
    raw = parse_json(await request.body())
    record = await gateway.evaluations.store_task(caller.tenant, raw)
    return wire.encode_task_record(record, whole=False)


@router.get("/tasks/{reference}")
async def get_task(reference: str, caller: Caller, gateway: App) -> wire.Json:
    """A task with its items, by digest or by name (the one last kept under it)."""
    caller.require(*READERS)
    return wire.encode_task_record(gateway.catalog.task(caller.tenant, reference), whole=True)


@router.post("/evaluations", status_code=202, openapi_extra=takes(wire.StartEvaluation))
async def start_evaluation(request: Request, caller: Caller, gateway: App) -> wire.Json:
    """Score a model on a task in the background; poll the evaluation that comes back."""
    caller.require("train")
    body = await read(request, wire.StartEvaluation)
    asked = EvaluationRequest(body.model, body.task, body.n, body.seed, body.temperature)
    return _evaluation(await gateway.evaluations.start(caller.tenant, asked))


@router.get("/evaluations")
async def list_evaluations(
    caller: Caller,
    gateway: App,
    policy: Annotated[str | None, Query(max_length=128)] = None,
    digest: Annotated[str | None, Query(max_length=71)] = None,
    task: Annotated[str | None, Query(max_length=128)] = None,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> wire.Json:
    """The tenant's evaluations, newest first; of one policy, revision or task where asked."""
    caller.require(*READERS)
    found = gateway.catalog.evaluations(
        caller.tenant,
        policy=policy,
        digest=full_digest(digest) if digest else None,
        task_name=task,
        limit=limit,
        before_id=_number(cursor),
    )
    shown = [_evaluation(evaluation) for evaluation in found]
    return _page(shown, limit, "evaluation_id")


@router.get("/evaluations/{evaluation_id}")
async def get_evaluation(evaluation_id: RowId, caller: Caller, gateway: App) -> wire.Json:
    """An evaluation; with its progress while it runs."""
    caller.require(*READERS)
    record, progress = gateway.evaluations.get(caller.tenant, evaluation_id)
    shown = _evaluation(record)
    if progress:
        shown["progress"] = {"num_done": progress.num_done, "num_correct": progress.num_right}
    return shown


# -- operation ------------------------------------------------------------------------------------


@router.get("/keys")
async def list_keys(caller: Caller, gateway: App, tenant: str | None = None) -> wire.Json:
    """Keys, without their secrets."""
    caller.require()
    keys = gateway.catalog.keys(Tenant(tenant) if tenant else None)
    return {"items": [wire.encode_key(key) for key in keys]}


@router.post("/keys", status_code=201, openapi_extra=takes(wire.CreateKey))
async def create_key(request: Request, caller: Caller, gateway: App) -> wire.Json:
    """A new key; its text is in this answer and nowhere else."""
    caller.require()
    body = await read(request, wire.CreateKey)
    expires_at = None
    if body.ttl_seconds is not None:
        expires_at = datetime.now(UTC) + timedelta(seconds=body.ttl_seconds)
    text, key = await asyncio.to_thread(
        gateway.catalog.create_key,
        Tenant(body.tenant),
        body.role,
        note=body.note,
        expires_at=expires_at,
        actor=caller.key_id,
    )
    return {**wire.encode_key(key), "key": text}


@router.delete("/keys/{tenant}/{key_id}")
async def revoke_key(tenant: str, key_id: str, caller: Caller, gateway: App) -> Response:
    """Refuse a key from now on."""
    caller.require()
    await asyncio.to_thread(gateway.catalog.revoke_key, Tenant(tenant), key_id, actor=caller.key_id)
    return Response(status_code=204)


@router.get("/tenants")
async def list_tenants(caller: Caller, gateway: App) -> wire.Json:
    """Every tenant that has a key, with the number of keys that were ever made."""
    caller.require()
    keys = gateway.catalog.keys(None)
    counts = Counter(key.tenant for key in keys)
    return {"items": [{"tenant": name, "num_keys": counts[name]} for name in sorted(counts)]}


@router.get("/audit")
async def list_audit(
    caller: Caller,
    gateway: App,
    tenant: str | None = None,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> wire.Json:
    """A tenant's audit events, newest first."""
    caller.require("train")
    owner = owned(caller, tenant or caller.tenant)
    events = gateway.catalog.audit(owner, limit=limit, before_id=_number(cursor))
    return _page([wire.encode_audit_event(event) for event in events], limit, "event_id")


@router.get("/stats")
async def stats(caller: Caller, gateway: App) -> wire.Json:
    """What each worker holds and has done, as of about a second ago."""
    caller.require(*READERS)
    return {
        "bases": [
            wire.encode_worker(c.base, c.stats, replica=c.replica, alive=c.alive)
            for c in gateway.workers.all()
        ]
    }


def owned(caller: Principal, tenant: str) -> Tenant:
    """`tenant` when the caller may act for it. Raises NotFound, which gives nothing away."""
    if tenant != caller.tenant and caller.role != "admin":
        raise NotFound(f"no tenant {tenant[:128]!r} here for this key")
    return Tenant(tenant)


def _revision(
    gateway: Gateway, caller: Principal, tenant: str, name: str, reference: str
) -> Revision:
    return gateway.promotion.revision(owned(caller, tenant), name, reference)


def _evaluation(evaluation: Evaluation) -> wire.Json:
    return wire.encode_evaluation(evaluation, interval_95(evaluation))


def _page(items: list[wire.Json], limit: int, key: str) -> wire.Json:
    """A list answer; `next_cursor` is set when a further page may follow."""
    full = len(items) == limit
    return {"items": items, "next_cursor": str(items[-1][key]) if full else None}


def _number(cursor: str | None) -> int | None:
    if cursor is None:
        return None
    if not cursor.isascii() or not cursor.isdecimal() or len(cursor) > 18:
        raise InvalidRequest(f"cursor {cursor!r} did not come from this list")
    return int(cursor)


def expected_version(in_body: int | None, if_match: str | None) -> int | None:
    """The version that the alias must have, from body or header. Raises InvalidRequest."""
    in_header = parse_if_match(if_match)
    if None not in (in_body, in_header) and in_body != in_header:
        raise InvalidRequest("if_version and If-Match differ; send one of them")
    return in_header if in_body is None else in_body


def alias_answer(alias: Alias) -> Response:
    """An alias, with its version as ETag."""
    return JSONResponse(wire.encode_alias(alias), headers={"ETag": f'"{alias.version}"'})


async def _read_form(request: Request) -> tuple[str | None, dict[str, Any], bytes]:
    """Base, config and weights of a multipart import; the base may be left out."""
    async with request.form(max_files=2, max_fields=1) as form:
        base, config, weights = (form.get(name) for name in ("base", "config", "weights"))
        known = set(form) <= {"base", "config", "weights"} and not isinstance(base, UploadFile)
        if not (known and isinstance(config, UploadFile) and isinstance(weights, UploadFile)):
            raise InvalidRequest(
                "the form has two files, config (adapter_config.json) and weights "
                "(adapter_model.safetensors), and a field base"
            )
        config_bytes = await config.read(MAX_CONFIG_BYTES + 1)
        if len(config_bytes) > MAX_CONFIG_BYTES:
            raise InvalidRequest(f"config is over {MAX_CONFIG_BYTES} bytes")
        name = str(base) if base else None
        return name, parse_config(config_bytes), await weights.read()
