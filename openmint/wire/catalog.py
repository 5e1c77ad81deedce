"""Catalogue JSON under /catalog/v1 <-> our records. Times are ISO 8601 in UTC."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Annotated, Any

from pydantic import Field

from openmint.catalog.records import (
    Alias,
    AliasEvent,
    ApiKey,
    AuditEvent,
    DoomedBlob,
    Evaluation,
    ImportOutcome,
    Pin,
    Policy,
    Quota,
    RetentionPlan,
    Revision,
    Role,
    TaskRecord,
    UsageHour,
)
from openmint.errors import InvalidRequest
from openmint.scheduler.work import WorkerStats
from openmint.types import BaseInfo, LoraSpec
from openmint.wire.requests import Body

Json = dict[str, Any]

Reason = Annotated[str, Field(max_length=1000)]
Override = Annotated[str, Field(min_length=1, max_length=1000)]
"""Why a revision is promoted that does not pass the alias's gates."""
Version = Annotated[int, Field(ge=0, lt=1 << 62)]
"""What the alias must still be at; 0 means that it must be new."""
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
Reference = Annotated[str, Field(min_length=1, max_length=512)]
MAX_TTL_SECONDS = 10 * 366 * 86400


class Promote(Body):
    """Point an alias at a revision of its policy: a digest, or another alias of the policy."""

    revision: Reference
    reason: Reason = ""
    if_version: Version | None = None
    override_reason: Override | None = None


class Rollback(Body):
    """Undo an alias's last change: abort its canary, else point it back at what it named before."""

    reason: Reason = ""
    if_version: Version | None = None


class PrewarmModels(Body):
    """Have the revisions of these models read into memory."""

    models: Annotated[list[Reference], Field(min_length=1, max_length=256)]
    load_deadline_seconds: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] | None = None


class ImportAdapter(Body):
    """A PEFT adapter as JSON: the two files of its folder, the weights in base64."""

    base: Reference | None = None
    config: dict[str, Any]
    weights: str


class StartEvaluation(Body):
    """Score a model on a task that is given whole, or by the name or digest of a stored one."""

    model: Reference
    task: dict[str, Any] | Reference
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] = 0
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0


class CreateKey(Body):
    """A key for a tenant; a tenant begins with its first key."""

    tenant: Name
    role: Role = "train"
    note: Reason = ""
    ttl_seconds: Annotated[int, Field(ge=1, le=MAX_TTL_SECONDS)] | None = None


def decode_base64(text: str, field: str) -> bytes:
    """The bytes of strict base64. Raises InvalidRequest that names the field."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{field} is not valid base64") from None


def encode_policy(policy: Policy) -> Json:
    return {
        "policy": f"{policy.tenant}/{policy.name}",
        "tenant": policy.tenant,
        "name": policy.name,
        "base_name": policy.base_name,
        "base_digest": policy.base_digest,
        "user_metadata": dict(policy.user_metadata),
        "created_at": _time(policy.created_at),
        "owner": policy.owner,
        "keep_revisions": policy.keep_revisions,
    }


def encode_revision(revision: Revision) -> Json:
    return {
        "policy": f"{revision.tenant}/{revision.policy_name}",
        "number": revision.number,
        "digest": revision.digest,
        "base_name": revision.base_name,
        "base_digest": revision.base_digest,
        **encode_spec(revision.spec),
        "parent_digest": revision.parent_digest,
        "run_id": revision.run_id,
        "num_optim_steps": revision.num_optim_steps,
        "size_bytes": revision.size_bytes,
        "origin": revision.origin,
        "ephemeral": revision.ephemeral,
        "user_metadata": dict(revision.user_metadata),
        "created_at": _time(revision.created_at),
        "deleted_at": _time(revision.deleted_at),
        "drift": revision.drift,
        "base_difference": revision.base_difference,
        "owner": revision.owner,
    }


class SetRetention(Body):
    """How many of its newest revisions a policy keeps; null is what the service's settings say."""

    keep_revisions: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None


def encode_plan(plan: RetentionPlan) -> Json:
    return {
        "policy": f"{plan.policy.tenant}/{plan.policy.name}",
        "own": plan.policy.keep_revisions,
        "keep_revisions": plan.keep_revisions,
        "keep_rollbacks": plan.keep.rollbacks,
        "surplus": [encode_revision(revision) for revision in plan.surplus],
    }


def encode_doomed(blob: DoomedBlob, grace_seconds: float) -> Json:
    goes_at = blob.doomed_at and blob.doomed_at + timedelta(seconds=grace_seconds)
    return {"digest": blob.digest, "goes_at": _time(goes_at)}


def encode_relative(distance: int, revision: Revision) -> Json:
    """A revision of a lineage, and how many steps away it is."""
    return {**encode_revision(revision), "distance": distance}


def encode_import(tenant: str, outcome: ImportOutcome) -> Json:
    return {**asdict(outcome), "policy": f"{tenant}/{outcome.policy}"}


Most = Annotated[int, Field(ge=1, lt=1 << 62)]


class SetQuota(Body):
    """What a tenant may use; null is without limit."""

    requests_per_minute: Most | None = None
    tokens_per_minute: Most | None = None
    resident_adapters: Most | None = None
    stored_bytes: Most | None = None

    def quota(self) -> Quota:
        return Quota(
            self.requests_per_minute,
            self.tokens_per_minute,
            self.resident_adapters,
            self.stored_bytes,
        )


def encode_quota(quota: Quota) -> Json:
    return asdict(quota)


def encode_usage(hour: UsageHour) -> Json:
    return {**asdict(hour), "hour": _time(hour.hour)}


def encode_spec(spec: LoraSpec) -> Json:
    return {"rank": spec.rank, "alpha": spec.alpha, "targets": list(spec.groups)}


def encode_alias(alias: Alias) -> Json:
    canary = None
    if alias.canary_digest is not None:
        since = _time(alias.canary_since)
        canary = {"digest": alias.canary_digest, "share": alias.canary_share, "since": since}
    return {
        "name": alias.name,
        "digest": alias.digest,
        "version": alias.version,
        "updated_at": _time(alias.updated_at),
        "canary": canary,
    }


def encode_pin(pin: Pin, states: Sequence[tuple[str, int | None]]) -> Json:
    """A pinned alias; of each revision that it names, where it is and what it takes there."""
    pairs = zip(pin.revisions, states, strict=True)
    return {
        "policy": f"{pin.tenant}/{pin.policy_name}",
        "alias": pin.alias,
        "created_at": _time(pin.created_at),
        "revisions": [
            {"digest": revision.digest, "state": state, "num_bytes": num_bytes}
            for revision, (state, num_bytes) in pairs
        ],
    }


def encode_alias_event(event: AliasEvent) -> Json:
    return {
        "event_id": event.event_id,
        "alias": event.alias,
        "action": event.action,
        "from_digest": event.from_digest,
        "to_digest": event.to_digest,
        "actor": event.actor,
        "reason": event.reason,
        "share": event.share,
        "override_reason": event.override_reason,
        "created_at": _time(event.created_at),
    }


def encode_evaluation(evaluation: Evaluation, interval_95: tuple[float, float] | None) -> Json:
    """With the score's interval, which is never stored; None until there is a score."""
    policy = evaluation.policy_name and f"{evaluation.tenant}/{evaluation.policy_name}"
    return {
        "evaluation_id": evaluation.evaluation_id,
        "status": evaluation.status,
        "error": evaluation.error,
        "policy": policy,
        "revision": evaluation.digest,
        "base_name": evaluation.base_name,
        "task": evaluation.task_name,
        "task_digest": evaluation.task_digest,
        "seed": evaluation.seed,
        "sampling": dict(evaluation.sampling),
        "n": evaluation.num_items,
        "num_correct": evaluation.num_correct,
        "score": evaluation.score,
        "interval_95": interval_95,
        "created_at": _time(evaluation.created_at),
        "finished_at": _time(evaluation.finished_at),
    }


def encode_task_record(task: TaskRecord, *, whole: bool) -> Json:
    """A stored task; `whole` with its items, else with their number."""
    head = {
        "name": task.name,
        "digest": task.digest,
        "scorer": task.body["scorer"],
        "num_items": len(task.body["items"]),
        "created_at": _time(task.created_at),
    }
    return {**head, "task": dict(task.body)} if whole else head


def encode_key(key: ApiKey) -> Json:
    return {
        "key_id": key.key_id,
        "tenant": key.tenant,
        "role": key.role,
        "note": key.note,
        "created_at": _time(key.created_at),
        "expires_at": _time(key.expires_at),
        "revoked_at": _time(key.revoked_at),
    }


def encode_audit_event(event: AuditEvent) -> Json:
    return {
        "event_id": event.event_id,
        "tenant": event.tenant,
        "actor": event.actor,
        "action": event.action,
        "subject": event.subject,
        "details": dict(event.details),
        "created_at": _time(event.created_at),
    }


def encode_worker(base: BaseInfo, stats: WorkerStats, *, replica: int, alive: bool) -> Json:
    """A base's worker: what it is and its counters; which revisions are resident stays out."""
    counters = asdict(stats)
    counters.pop("resident_revisions")
    counters.pop("slot_revisions")
    return {
        "base": base.name,
        "base_digest": base.digest,
        "architecture": base.architecture,
        "device": base.device,
        "dtype": base.dtype,
        "context_length": base.context_length,
        "weight_bytes": base.weight_bytes,
        "replica": replica,
        "alive": alive,
        **counters,
    }


def _time(instant: datetime | None) -> str | None:
    return None if instant is None else instant.isoformat()
