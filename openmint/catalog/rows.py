"""Rows into records: the joined selects that name what a row refers to, and their readers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, RowMapping, Select, select

from openmint.catalog import tables as t
from openmint.catalog.records import (
    Alias,
    AliasEvent,
    ApiKey,
    AuditEvent,
    Checkpoint,
    DoomedBlob,
    Evaluation,
    Gate,
    Policy,
    RequestRecord,
    Revision,
    Run,
    Sampler,
    Schedule,
    Session,
    TaskRecord,
    UsageHour,
    Watch,
)
from openmint.types import Digest, LoraSpec

SPEC_FIELDS = tuple(field.name for field in fields(LoraSpec))
MAX_LIST = 1000
MAX_ID = (1 << 63) - 1

Record = TypeVar("Record")


class SavedBytes(Protocol):
    """Bytes that are durable in the store, as a worker reports them."""

    @property
    def digest(self) -> Digest: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def spec(self) -> LoraSpec: ...
    @property
    def num_optim_steps(self) -> int: ...


def spec_values(spec: LoraSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in SPEC_FIELDS}


def blob_values(blob: SavedBytes) -> dict[str, Any]:
    return {
        "digest": blob.digest,
        "size_bytes": blob.size_bytes,
        "num_optim_steps": blob.num_optim_steps,
        **spec_values(blob.spec),
    }


def to_record(kind: type[Record], row: RowMapping) -> Record:
    """A record of `kind` from the columns of its fields; LoraSpec is gathered from its own."""
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name == "spec":
            values["spec"] = LoraSpec(**{name: row[name] for name in SPEC_FIELDS})
        elif field.name == "tags":
            values["tags"] = tuple(row["tags"])
        else:
            values[field.name] = row[field.name]
    return kind(**values)


def one(connection: Connection, kind: type[Record], query: Select[Any]) -> Record | None:
    row = connection.execute(query).mappings().first()
    return None if row is None else to_record(kind, row)


def many(connection: Connection, kind: type[Record], query: Select[Any]) -> list[Record]:
    return [to_record(kind, row) for row in connection.execute(query).mappings()]


def metadata(given: Mapping[str, str] | None) -> dict[str, str]:
    return dict(given or {})


_OWNER = (t.policy.c.name.label("policy_name"), t.policy.c.base_name, t.policy.c.base_digest)

KEYS = select(*(t.api_key.c[f.name] for f in fields(ApiKey)))
SESSIONS = select(t.session)
POLICIES = select(t.policy)
RUNS = select(t.run, *_OWNER).join_from(t.run, t.policy)
REVISIONS = select(t.revision, *_OWNER, t.policy.c.tenant).join_from(t.revision, t.policy)
CHECKPOINTS = (
    select(t.checkpoint, *_OWNER, t.run.c.policy_id, t.run.c.optimizer_config)
    .join_from(t.checkpoint, t.run)
    .join(t.policy)
)
SAMPLERS = select(t.sampler)
ALIASES = select(t.alias, t.policy.c.name.label("policy_name")).join_from(t.alias, t.policy)
ALIAS_EVENTS = select(t.alias_event)
TASKS = select(t.evaluation_task)
GATES = select(t.gate)
WATCHES = select(t.watch)
SCHEDULES = select(t.schedule)
EVALUATIONS = select(
    *(column for column in t.evaluation.c if column is not t.evaluation.c.outcomes),
    t.policy.c.name.label("policy_name"),
).join_from(t.evaluation, t.policy, isouter=True)
AUDIT_EVENTS = select(t.audit_event)
DOOMED_BLOBS = select(t.doomed_blob)
REQUESTS = select(t.request)
USAGE_HOURS = select(t.usage)

SHAPES: tuple[tuple[type[Any], Select[Any]], ...] = (
    (ApiKey, KEYS),
    (Session, SESSIONS),
    (Policy, POLICIES),
    (Run, RUNS),
    (Revision, REVISIONS),
    (Checkpoint, CHECKPOINTS),
    (Sampler, SAMPLERS),
    (Alias, ALIASES),
    (AliasEvent, ALIAS_EVENTS),
    (Gate, GATES),
    (Watch, WATCHES),
    (Schedule, SCHEDULES),
    (TaskRecord, TASKS),
    (Evaluation, EVALUATIONS),
    (AuditEvent, AUDIT_EVENTS),
    (DoomedBlob, DOOMED_BLOBS),
    (RequestRecord, REQUESTS),
    (UsageHour, USAGE_HOURS),
)
"""Which select fills which record; a test holds them together."""
