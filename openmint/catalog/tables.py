"""The tables. Portable SQL; what only SQLite needs is marked so. Times: UTC epoch seconds."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)


class Instant(TypeDecorator[datetime]):
    """An aware UTC datetime, stored as epoch seconds so that order and arithmetic stay plain."""

    impl = Float
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> float | None:
        return None if value is None else value.timestamp()

    def process_result_value(self, value: float | None, dialect: Dialect) -> datetime | None:
        return None if value is None else datetime.fromtimestamp(value, UTC)


METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _required(name: str, kind: type[TypeDecorator[datetime]] | type[Text]) -> Column[object]:
    return Column(name, kind, nullable=False)


def _spec_columns() -> tuple[Column[object], ...]:
    """LoraSpec, one column per field."""
    return (
        Column("rank", Integer, nullable=False),
        Column("alpha", Float, nullable=False),
        Column("train_attn", Boolean, nullable=False),
        Column("train_mlp", Boolean, nullable=False),
        Column("train_unembed", Boolean, nullable=False),
    )


setting = Table(
    "setting",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("value", LargeBinary, nullable=False),
)

api_key = Table(
    "api_key",
    METADATA,
    Column("key_id", Text, primary_key=True),
    _required("tenant", Text),
    _required("role", Text),
    _required("note", Text),
    Column("secret_hash", LargeBinary, nullable=False),
    _required("created_at", Instant),
    Column("expires_at", Instant),
    Column("revoked_at", Instant),
    Index(None, "tenant"),
)

session = Table(
    "session",
    METADATA,
    Column("session_id", Text, primary_key=True),
    _required("tenant", Text),
    Column("tags", JSON, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("display_name", Text),
    Column("project_id", Text),
    Column("sdk_version", Text),
    _required("created_at", Instant),
    _required("last_seen_at", Instant),
    Column("finished_at", Instant),
    _required("status", Text),
    Column("finish_reason", Text),
    Column("finish_detail", Text),
    Index(None, "tenant", "created_at", "session_id"),
    Index(None, "status", "last_seen_at"),
)

policy = Table(
    "policy",
    METADATA,
    Column("policy_id", Integer, primary_key=True),
    _required("tenant", Text),
    _required("name", Text),
    _required("base_name", Text),
    _required("base_digest", Text),
    Column("user_metadata", JSON, nullable=False),
    _required("created_at", Instant),
    UniqueConstraint("tenant", "name"),
)

run = Table(
    "run",
    METADATA,
    Column("run_id", Text, primary_key=True),
    Column("session_id", Text, ForeignKey("session.session_id"), nullable=False),
    _required("tenant", Text),
    Column("policy_id", Integer, ForeignKey("policy.policy_id"), nullable=False),
    Column("model_seq_id", Integer, nullable=False),
    *_spec_columns(),
    Column("seed", Integer),
    Column("user_metadata", JSON, nullable=False),
    Column("optimizer_config", JSON(none_as_null=True)),
    _required("created_at", Instant),
    _required("last_request_at", Instant),
    _required("status", Text),
    Column("num_optim_steps", Integer, nullable=False),
    # From where the run is rebuilt: its state after that request. See catalog/requests.py.
    Column("snapshot_digest", Text),
    Column("snapshot_seq", Integer),
    # A retried create_model finds its first attempt here.
    UniqueConstraint("session_id", "model_seq_id"),
    Index(None, "tenant", "created_at", "run_id"),
    Index(None, "policy_id"),
    Index(None, "snapshot_digest"),
)

request = Table(
    "request",
    METADATA,
    # No reference to a run: the first request is there before its run is.
    Column("run_id", Text, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("session_id", Text, ForeignKey("session.session_id"), nullable=False),
    _required("tenant", Text),
    _required("request_id", Text),
    _required("kind", Text),
    Column("fingerprint", LargeBinary, nullable=False),
    _required("status", Text),
    Column("body", LargeBinary),
    Column("needs", Text),
    Column("outcome", LargeBinary),
    PrimaryKeyConstraint("run_id", "seq"),
    Index(None, "session_id"),
    Index(None, "needs"),
)

revision = Table(
    "revision",
    METADATA,
    Column("policy_id", Integer, ForeignKey("policy.policy_id"), nullable=False),
    Column("number", Integer, nullable=False),
    _required("digest", Text),
    *_spec_columns(),
    Column("parent_digest", Text),
    Column("run_id", Text, ForeignKey("run.run_id")),
    Column("num_optim_steps", Integer, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    _required("origin", Text),
    Column("ephemeral", Boolean, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    _required("created_at", Instant),
    Column("deleted_at", Instant),
    # What its probe found, in nats; see service/probes.py.
    Column("drift", Float),
    Column("base_difference", Float),
    PrimaryKeyConstraint("policy_id", "digest"),
    UniqueConstraint("policy_id", "number"),
    Index(None, "digest"),
    Index(None, "run_id"),
    Index(None, "ephemeral", "deleted_at"),
    sqlite_with_rowid=False,
)

checkpoint = Table(
    "checkpoint",
    METADATA,
    Column("run_id", Text, ForeignKey("run.run_id"), nullable=False),
    _required("segment", Text),
    _required("name", Text),
    _required("tenant", Text),
    _required("digest", Text),
    Column("size_bytes", Integer, nullable=False),
    *_spec_columns(),
    Column("num_optim_steps", Integer, nullable=False),
    Column("public", Boolean, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    _required("created_at", Instant),
    Column("expires_at", Instant),
    PrimaryKeyConstraint("run_id", "segment", "name"),
    Index(None, "tenant", "created_at"),
    Index(None, "digest"),
    Index(None, "expires_at"),
    sqlite_with_rowid=False,
)

sampler = Table(
    "sampler",
    METADATA,
    Column("sampler_id", Text, primary_key=True),
    Column("session_id", Text, ForeignKey("session.session_id"), nullable=False),
    _required("tenant", Text),
    Column("seq_id", Integer, nullable=False),
    _required("base_name", Text),
    _required("base_digest", Text),
    Column("revision", Text),
    Column("model_path", Text),
    Column("inflight_run", Text),
    _required("created_at", Instant),
    UniqueConstraint("session_id", "seq_id"),
    Index(None, "revision"),
)

doomed_blob = Table(
    "doomed_blob",
    METADATA,
    # Bytes that lost a record; see catalog/garbage.py.
    Column("digest", Text, primary_key=True),
)

alias = Table(
    "alias",
    METADATA,
    Column("policy_id", Integer, ForeignKey("policy.policy_id"), nullable=False),
    _required("name", Text),
    _required("digest", Text),
    Column("version", Integer, nullable=False),
    _required("updated_at", Instant),
    PrimaryKeyConstraint("policy_id", "name"),
    Index(None, "policy_id", "digest"),
    sqlite_with_rowid=False,
)

alias_event = Table(
    "alias_event",
    METADATA,
    Column("event_id", Integer, primary_key=True),
    Column("policy_id", Integer, ForeignKey("policy.policy_id"), nullable=False),
    _required("alias", Text),
    _required("action", Text),
    Column("from_digest", Text),
    _required("to_digest", Text),
    _required("actor", Text),
    _required("reason", Text),
    _required("created_at", Instant),
    Index(None, "policy_id", "alias", "event_id"),
)

evaluation_task = Table(
    "evaluation_task",
    METADATA,
    _required("tenant", Text),
    _required("name", Text),
    _required("digest", Text),
    Column("body", JSON, nullable=False),
    _required("created_at", Instant),
    PrimaryKeyConstraint("tenant", "name", "digest"),
)

evaluation = Table(
    "evaluation",
    METADATA,
    Column("evaluation_id", Integer, primary_key=True),
    _required("tenant", Text),
    Column("policy_id", Integer, ForeignKey("policy.policy_id")),
    Column("digest", Text),
    _required("base_name", Text),
    _required("task_name", Text),
    _required("task_digest", Text),
    Column("seed", Integer, nullable=False),
    Column("num_items", Integer, nullable=False),
    Column("num_correct", Integer, nullable=False),
    Column("score", Float),
    Column("sampling", JSON, nullable=False),
    _required("status", Text),
    Column("error", Text),
    _required("created_at", Instant),
    Column("finished_at", Instant),
    Index(None, "tenant", "evaluation_id"),
    Index(None, "policy_id", "digest"),
)

audit_event = Table(
    "audit_event",
    METADATA,
    Column("event_id", Integer, primary_key=True),
    _required("tenant", Text),
    _required("actor", Text),
    _required("action", Text),
    _required("subject", Text),
    Column("details", JSON, nullable=False),
    _required("created_at", Instant),
    Index(None, "tenant", "event_id"),
)

quota = Table(
    "quota",
    METADATA,
    Column("tenant", Text, primary_key=True),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
    Column("resident_adapters", Integer),
    Column("stored_bytes", Integer),
)

usage = Table(
    "usage",
    METADATA,
    _required("tenant", Text),
    _required("base_name", Text),
    _required("hour", Instant),
    Column("trained_tokens", Integer, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("cached_tokens", Integer, nullable=False),
    Column("sampled_tokens", Integer, nullable=False),
    Column("checkpoints", Integer, nullable=False),
    Column("engine_seconds", Float, nullable=False),
    PrimaryKeyConstraint("tenant", "base_name", "hour"),
    Index(None, "hour"),
    sqlite_with_rowid=False,
)
