"""The tables, in portable SQL; what only SQLite needs is marked so."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    UniqueConstraint,
    text,
)

from openmint.catalog.columns import INT64, JSON, NULLABLE_JSON, TEXT, Instant

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _required(name: str, kind: Any) -> Column[object]:
    return Column(name, kind, nullable=False)


def _spec_columns() -> tuple[Column[object], ...]:
    """LoraSpec, one column per field."""
    return (
        Column("rank", INT64, nullable=False),
        Column("alpha", Float, nullable=False),
        Column("train_attn", Boolean, nullable=False),
        Column("train_mlp", Boolean, nullable=False),
        Column("train_unembed", Boolean, nullable=False),
    )


setting = Table(
    "setting",
    METADATA,
    Column("name", TEXT, primary_key=True),
    Column("value", LargeBinary, nullable=False),
)

api_key = Table(
    "api_key",
    METADATA,
    Column("key_id", TEXT, primary_key=True),
    _required("tenant", TEXT),
    _required("role", TEXT),
    _required("note", TEXT),
    Column("secret_hash", LargeBinary, nullable=False),
    _required("created_at", Instant),
    Column("expires_at", Instant),
    Column("revoked_at", Instant),
    Index(None, "tenant"),
)

session = Table(
    "session",
    METADATA,
    Column("session_id", TEXT, primary_key=True),
    _required("tenant", TEXT),
    Column("tags", JSON, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("display_name", TEXT),
    Column("project_id", TEXT),
    Column("sdk_version", TEXT),
    _required("created_at", Instant),
    _required("last_seen_at", Instant),
    Column("finished_at", Instant),
    _required("status", TEXT),
    Column("finish_reason", TEXT),
    Column("finish_detail", TEXT),
    Index(None, "tenant", "created_at", "session_id"),
    Index(None, "status", "last_seen_at"),
)

policy = Table(
    "policy",
    METADATA,
    Column("policy_id", INT64, primary_key=True),
    _required("tenant", TEXT),
    _required("name", TEXT),
    _required("base_name", TEXT),
    _required("base_digest", TEXT),
    Column("user_metadata", JSON, nullable=False),
    _required("created_at", Instant),
    # The session or the key that made it; "" for what is older than this column.
    Column("owner", TEXT, nullable=False, server_default=""),
    # How many of its newest revisions are kept; see catalog/retention.py.
    Column("keep_revisions", INT64),
    UniqueConstraint("tenant", "name"),
    Index(None, "tenant", "base_name", "name"),
    Index(None, "tenant", "owner", "name"),
    Index(
        "ix_policy_keeping",
        "policy_id",
        sqlite_where=text("keep_revisions IS NOT NULL"),
        postgresql_where=text("keep_revisions IS NOT NULL"),
    ),
)

policy_tag = Table(
    "policy_tag",
    METADATA,
    # In the order in which search lists what has a tag; no policy changes its name.
    _required("tenant", TEXT),
    _required("tag", TEXT),
    _required("policy_name", TEXT),
    Column("policy_id", INT64, ForeignKey("policy.policy_id"), nullable=False),
    PrimaryKeyConstraint("tenant", "tag", "policy_name"),
    Index(None, "policy_id"),
    sqlite_with_rowid=False,
)

run = Table(
    "run",
    METADATA,
    Column("run_id", TEXT, primary_key=True),
    Column("session_id", TEXT, ForeignKey("session.session_id"), nullable=False),
    _required("tenant", TEXT),
    Column("policy_id", INT64, ForeignKey("policy.policy_id"), nullable=False),
    Column("model_seq_id", INT64, nullable=False),
    *_spec_columns(),
    Column("seed", INT64),
    Column("user_metadata", JSON, nullable=False),
    Column("optimizer_config", NULLABLE_JSON),
    _required("created_at", Instant),
    _required("last_request_at", Instant),
    _required("status", TEXT),
    Column("num_optim_steps", INT64, nullable=False),
    # From where the run is rebuilt: its state after that request. See catalog/requests.py.
    Column("snapshot_digest", TEXT),
    Column("snapshot_seq", INT64),
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
    Column("run_id", TEXT, nullable=False),
    Column("seq", INT64, nullable=False),
    Column("session_id", TEXT, ForeignKey("session.session_id"), nullable=False),
    _required("tenant", TEXT),
    _required("request_id", TEXT),
    _required("kind", TEXT),
    Column("fingerprint", LargeBinary, nullable=False),
    _required("status", TEXT),
    Column("body", LargeBinary),
    Column("needs", TEXT),
    Column("outcome", LargeBinary),
    PrimaryKeyConstraint("run_id", "seq"),
    Index(None, "session_id"),
    Index(None, "needs"),
)

revision = Table(
    "revision",
    METADATA,
    Column("policy_id", INT64, ForeignKey("policy.policy_id"), nullable=False),
    Column("number", INT64, nullable=False),
    _required("digest", TEXT),
    *_spec_columns(),
    Column("parent_digest", TEXT),
    Column("run_id", TEXT, ForeignKey("run.run_id")),
    Column("num_optim_steps", INT64, nullable=False),
    Column("size_bytes", INT64, nullable=False),
    _required("origin", TEXT),
    Column("ephemeral", Boolean, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    _required("created_at", Instant),
    Column("deleted_at", Instant),
    # What its probe found, in nats; see service/probes.py.
    Column("drift", Float),
    Column("base_difference", Float),
    Column("owner", TEXT, nullable=False, server_default=""),
    PrimaryKeyConstraint("policy_id", "digest"),
    UniqueConstraint("policy_id", "number"),
    Index(None, "digest"),
    Index(None, "run_id"),
    # Of these few alone: as an index of all it would seem to serve every search.
    Index(
        "ix_revision_of_sessions",
        "deleted_at",
        sqlite_where=text("ephemeral IS 1"),
        postgresql_where=text("ephemeral IS TRUE"),
    ),
    Index(None, "owner", "policy_id", "number"),
    Index(None, "policy_id", "parent_digest"),
    sqlite_with_rowid=False,
)

revision_tag = Table(
    "revision_tag",
    METADATA,
    _required("tenant", TEXT),
    _required("tag", TEXT),
    _required("policy_name", TEXT),
    Column("number", INT64, nullable=False),
    Column("policy_id", INT64, ForeignKey("policy.policy_id"), nullable=False),
    _required("digest", TEXT),
    PrimaryKeyConstraint("tenant", "tag", "policy_name", "number"),
    Index(None, "policy_id", "digest"),
    sqlite_with_rowid=False,
)

checkpoint = Table(
    "checkpoint",
    METADATA,
    Column("run_id", TEXT, ForeignKey("run.run_id"), nullable=False),
    _required("segment", TEXT),
    _required("name", TEXT),
    _required("tenant", TEXT),
    _required("digest", TEXT),
    Column("size_bytes", INT64, nullable=False),
    *_spec_columns(),
    Column("num_optim_steps", INT64, nullable=False),
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
    Column("sampler_id", TEXT, primary_key=True),
    Column("session_id", TEXT, ForeignKey("session.session_id"), nullable=False),
    _required("tenant", TEXT),
    Column("seq_id", INT64, nullable=False),
    _required("base_name", TEXT),
    _required("base_digest", TEXT),
    Column("revision", TEXT),
    Column("model_path", TEXT),
    Column("inflight_run", TEXT),
    _required("created_at", Instant),
    UniqueConstraint("session_id", "seq_id"),
    Index(None, "revision"),
)

doomed_blob = Table(
    "doomed_blob",
    METADATA,
    # Bytes that lost a record; see catalog/garbage.py.
    Column("digest", TEXT, primary_key=True),
    # Since when they wait out their grace; those without one may go at once.
    Column("doomed_at", Instant),
    Index(None, "doomed_at"),
)

alias = Table(
    "alias",
    METADATA,
    Column("policy_id", INT64, ForeignKey("policy.policy_id"), nullable=False),
    _required("name", TEXT),
    _required("digest", TEXT),
    Column("version", INT64, nullable=False),
    _required("updated_at", Instant),
    # A second revision, which answers a share of the requests; see catalog/canaries.py.
    Column("canary_digest", TEXT),
    Column("canary_share", Float),
    Column("canary_since", Instant),
    PrimaryKeyConstraint("policy_id", "name"),
    Index(None, "policy_id", "digest"),
    sqlite_with_rowid=False,
)

alias_event = Table(
    "alias_event",
    METADATA,
    Column("event_id", INT64, primary_key=True),
    Column("policy_id", INT64, ForeignKey("policy.policy_id"), nullable=False),
    _required("alias", TEXT),
    _required("action", TEXT),
    Column("from_digest", TEXT),
    _required("to_digest", TEXT),
    _required("actor", TEXT),
    _required("reason", TEXT),
    _required("created_at", Instant),
    Column("share", Float),
    # Why gates that it did not pass were overruled.
    Column("override_reason", TEXT),
    Index(None, "policy_id", "alias", "event_id"),
)

gate = Table(
    "gate",
    METADATA,
    Column("gate_id", INT64, primary_key=True),
    Column("policy_id", INT64, ForeignKey("policy.policy_id"), nullable=False),
    _required("alias", TEXT),
    _required("task_name", TEXT),
    Column("task_digest", TEXT),
    Column("num_items", INT64),
    # One of the two; see catalog/gates.py.
    Column("min_score", Float),
    Column("margin", Float),
    Column("confidence", Float, nullable=False),
    _required("created_at", Instant),
    Index(None, "policy_id", "alias"),
)

watch = Table(
    "watch",
    METADATA,
    Column("watch_id", INT64, primary_key=True),
    Column("policy_id", INT64, ForeignKey("policy.policy_id"), nullable=False),
    _required("alias", TEXT),
    _required("metric", TEXT),
    # One of the two; see catalog/watches.py.
    Column("at_least", Float),
    Column("at_most", Float),
    Column("confidence", Float, nullable=False),
    Column("min_observations", INT64, nullable=False),
    Column("window_seconds", INT64, nullable=False),
    _required("created_at", Instant),
    Index(None, "policy_id", "alias"),
)

observation = Table(
    "observation",
    METADATA,
    Column("policy_id", INT64, ForeignKey("policy.policy_id"), nullable=False),
    _required("digest", TEXT),
    _required("metric", TEXT),
    # When the short time begins whose values these are.
    _required("span", Instant),
    Column("num", INT64, nullable=False),
    Column("total", Float, nullable=False),
    PrimaryKeyConstraint("policy_id", "digest", "metric", "span"),
    Index(None, "span"),
    sqlite_with_rowid=False,
)

pin = Table(
    "pin",
    METADATA,
    # An alias whose revisions stay in host memory; see catalog/pins.py.
    Column("policy_id", INT64, ForeignKey("policy.policy_id"), nullable=False),
    _required("alias", TEXT),
    _required("created_at", Instant),
    PrimaryKeyConstraint("policy_id", "alias"),
    sqlite_with_rowid=False,
)

schedule = Table(
    "schedule",
    METADATA,
    Column("schedule_id", INT64, primary_key=True),
    Column("policy_id", INT64, ForeignKey("policy.policy_id"), nullable=False),
    _required("alias", TEXT),
    _required("task", TEXT),
    Column("num_items", INT64),
    Column("every_hours", Float),
    Column("last_digest", TEXT),
    Column("next_at", Instant),
    _required("created_at", Instant),
    Index(None, "policy_id", "alias"),
)

evaluation_task = Table(
    "evaluation_task",
    METADATA,
    _required("tenant", TEXT),
    _required("name", TEXT),
    _required("digest", TEXT),
    Column("body", JSON, nullable=False),
    _required("created_at", Instant),
    PrimaryKeyConstraint("tenant", "name", "digest"),
)

evaluation = Table(
    "evaluation",
    METADATA,
    Column("evaluation_id", INT64, primary_key=True),
    _required("tenant", TEXT),
    Column("policy_id", INT64, ForeignKey("policy.policy_id")),
    Column("digest", TEXT),
    _required("base_name", TEXT),
    _required("task_name", TEXT),
    _required("task_digest", TEXT),
    Column("seed", INT64, nullable=False),
    Column("num_items", INT64, nullable=False),
    Column("num_correct", INT64, nullable=False),
    Column("score", Float),
    Column("sampling", JSON, nullable=False),
    _required("status", TEXT),
    Column("error", TEXT),
    _required("created_at", Instant),
    Column("finished_at", Instant),
    # A digit for each item, 1 where the answer was right.
    Column("outcomes", TEXT),
    Index(None, "tenant", "evaluation_id"),
    Index(None, "policy_id", "digest"),
    Index(None, "tenant", "task_name", "score", "evaluation_id"),
)

audit_event = Table(
    "audit_event",
    METADATA,
    Column("event_id", INT64, primary_key=True),
    _required("tenant", TEXT),
    _required("actor", TEXT),
    _required("action", TEXT),
    _required("subject", TEXT),
    Column("details", JSON, nullable=False),
    _required("created_at", Instant),
    Index(None, "tenant", "event_id"),
)

quota = Table(
    "quota",
    METADATA,
    Column("tenant", TEXT, primary_key=True),
    Column("requests_per_minute", INT64),
    Column("tokens_per_minute", INT64),
    Column("resident_adapters", INT64),
    Column("stored_bytes", INT64),
)

stored = Table(
    "stored",
    METADATA,
    # See catalog/stored.py.
    Column("tenant", TEXT, primary_key=True),
    Column("num_bytes", INT64, nullable=False),
)

usage = Table(
    "usage",
    METADATA,
    _required("tenant", TEXT),
    _required("base_name", TEXT),
    _required("hour", Instant),
    Column("trained_tokens", INT64, nullable=False),
    Column("prompt_tokens", INT64, nullable=False),
    Column("cached_tokens", INT64, nullable=False),
    Column("sampled_tokens", INT64, nullable=False),
    Column("checkpoints", INT64, nullable=False),
    Column("engine_seconds", Float, nullable=False),
    PrimaryKeyConstraint("tenant", "base_name", "hour"),
    Index(None, "hour"),
    sqlite_with_rowid=False,
)
