"""The first schema. Triggers keep revisions, alias events and audit events as they were written.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

from openmint.catalog.columns import INT64, JSON, NULLABLE_JSON, TEXT, Instant

revision = "0001"
down_revision = None

FROZEN = (
    "policy_id",
    "number",
    "digest",
    "rank",
    "alpha",
    "train_attn",
    "train_mlp",
    "train_unembed",
    "parent_digest",
    "run_id",
    "num_optim_steps",
    "size_bytes",
    "origin",
    "created_at",
)
"""Columns of a revision that never change; it may be deleted, restored, or stop being ephemeral."""

REFUSE = """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% rows are immutable', TG_TABLE_NAME
            USING ERRCODE = 'integrity_constraint_violation';
    END $$
"""


def upgrade() -> None:
    op.create_table(
        "api_key",
        sa.Column("key_id", TEXT, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("role", TEXT, nullable=False),
        sa.Column("note", TEXT, nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("expires_at", Instant(), nullable=True),
        sa.Column("revoked_at", Instant(), nullable=True),
        sa.PrimaryKeyConstraint("key_id", name="pk_api_key"),
    )
    op.create_index("ix_api_key_tenant", "api_key", ["tenant"], unique=False)
    op.create_table(
        "audit_event",
        sa.Column("event_id", INT64, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("actor", TEXT, nullable=False),
        sa.Column("action", TEXT, nullable=False),
        sa.Column("subject", TEXT, nullable=False),
        sa.Column("details", JSON, nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.PrimaryKeyConstraint("event_id", name="pk_audit_event"),
    )
    op.create_index(
        "ix_audit_event_tenant_event_id", "audit_event", ["tenant", "event_id"], unique=False
    )
    op.create_table(
        "evaluation_task",
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("digest", TEXT, nullable=False),
        sa.Column("body", JSON, nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "name", "digest", name="pk_evaluation_task"),
    )
    op.create_table(
        "policy",
        sa.Column("policy_id", INT64, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("base_name", TEXT, nullable=False),
        sa.Column("base_digest", TEXT, nullable=False),
        sa.Column("user_metadata", JSON, nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.PrimaryKeyConstraint("policy_id", name="pk_policy"),
        sa.UniqueConstraint("tenant", "name", name="uq_policy_tenant_name"),
    )
    op.create_table(
        "session",
        sa.Column("session_id", TEXT, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("tags", JSON, nullable=False),
        sa.Column("user_metadata", JSON, nullable=False),
        sa.Column("display_name", TEXT, nullable=True),
        sa.Column("project_id", TEXT, nullable=True),
        sa.Column("sdk_version", TEXT, nullable=True),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("last_seen_at", Instant(), nullable=False),
        sa.Column("finished_at", Instant(), nullable=True),
        sa.Column("status", TEXT, nullable=False),
        sa.Column("finish_reason", TEXT, nullable=True),
        sa.Column("finish_detail", TEXT, nullable=True),
        sa.PrimaryKeyConstraint("session_id", name="pk_session"),
    )
    op.create_index(
        "ix_session_status_last_seen_at", "session", ["status", "last_seen_at"], unique=False
    )
    op.create_index(
        "ix_session_tenant_created_at_session_id",
        "session",
        ["tenant", "created_at", "session_id"],
        unique=False,
    )
    op.create_table(
        "setting",
        sa.Column("name", TEXT, nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_setting"),
    )
    op.create_table(
        "alias",
        sa.Column("policy_id", INT64, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("digest", TEXT, nullable=False),
        sa.Column("version", INT64, nullable=False),
        sa.Column("updated_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(["policy_id"], ["policy.policy_id"], name="fk_alias_policy_id"),
        sa.PrimaryKeyConstraint("policy_id", "name", name="pk_alias"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_alias_policy_id_digest", "alias", ["policy_id", "digest"], unique=False)
    op.create_table(
        "alias_event",
        sa.Column("event_id", INT64, nullable=False),
        sa.Column("policy_id", INT64, nullable=False),
        sa.Column("alias", TEXT, nullable=False),
        sa.Column("action", TEXT, nullable=False),
        sa.Column("from_digest", TEXT, nullable=True),
        sa.Column("to_digest", TEXT, nullable=False),
        sa.Column("actor", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(
            ["policy_id"], ["policy.policy_id"], name="fk_alias_event_policy_id"
        ),
        sa.PrimaryKeyConstraint("event_id", name="pk_alias_event"),
    )
    op.create_index(
        "ix_alias_event_policy_id_alias_event_id",
        "alias_event",
        ["policy_id", "alias", "event_id"],
        unique=False,
    )
    op.create_table(
        "evaluation",
        sa.Column("evaluation_id", INT64, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("policy_id", INT64, nullable=True),
        sa.Column("digest", TEXT, nullable=True),
        sa.Column("base_name", TEXT, nullable=False),
        sa.Column("task_name", TEXT, nullable=False),
        sa.Column("task_digest", TEXT, nullable=False),
        sa.Column("seed", INT64, nullable=False),
        sa.Column("num_items", INT64, nullable=False),
        sa.Column("num_correct", INT64, nullable=False),
        sa.Column("score", sa.Float(), nullable=True),
        sa.Column("sampling", JSON, nullable=False),
        sa.Column("status", TEXT, nullable=False),
        sa.Column("error", TEXT, nullable=True),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("finished_at", Instant(), nullable=True),
        sa.ForeignKeyConstraint(
            ["policy_id"], ["policy.policy_id"], name="fk_evaluation_policy_id"
        ),
        sa.PrimaryKeyConstraint("evaluation_id", name="pk_evaluation"),
    )
    op.create_index(
        "ix_evaluation_policy_id_digest", "evaluation", ["policy_id", "digest"], unique=False
    )
    op.create_index(
        "ix_evaluation_tenant_evaluation_id",
        "evaluation",
        ["tenant", "evaluation_id"],
        unique=False,
    )
    op.create_table(
        "run",
        sa.Column("run_id", TEXT, nullable=False),
        sa.Column("session_id", TEXT, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("policy_id", INT64, nullable=False),
        sa.Column("model_seq_id", INT64, nullable=False),
        sa.Column("rank", INT64, nullable=False),
        sa.Column("alpha", sa.Float(), nullable=False),
        sa.Column("train_attn", sa.Boolean(), nullable=False),
        sa.Column("train_mlp", sa.Boolean(), nullable=False),
        sa.Column("train_unembed", sa.Boolean(), nullable=False),
        sa.Column("seed", INT64, nullable=True),
        sa.Column("user_metadata", JSON, nullable=False),
        sa.Column("optimizer_config", NULLABLE_JSON, nullable=True),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("last_request_at", Instant(), nullable=False),
        sa.Column("status", TEXT, nullable=False),
        sa.Column("num_optim_steps", INT64, nullable=False),
        sa.ForeignKeyConstraint(["policy_id"], ["policy.policy_id"], name="fk_run_policy_id"),
        sa.ForeignKeyConstraint(["session_id"], ["session.session_id"], name="fk_run_session_id"),
        sa.PrimaryKeyConstraint("run_id", name="pk_run"),
        sa.UniqueConstraint("session_id", "model_seq_id", name="uq_run_session_id_model_seq_id"),
    )
    op.create_index("ix_run_policy_id", "run", ["policy_id"], unique=False)
    op.create_index(
        "ix_run_tenant_created_at_run_id", "run", ["tenant", "created_at", "run_id"], unique=False
    )
    op.create_table(
        "sampler",
        sa.Column("sampler_id", TEXT, nullable=False),
        sa.Column("session_id", TEXT, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("seq_id", INT64, nullable=False),
        sa.Column("base_name", TEXT, nullable=False),
        sa.Column("base_digest", TEXT, nullable=False),
        sa.Column("revision", TEXT, nullable=True),
        sa.Column("model_path", TEXT, nullable=True),
        sa.Column("created_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(
            ["session_id"], ["session.session_id"], name="fk_sampler_session_id"
        ),
        sa.PrimaryKeyConstraint("sampler_id", name="pk_sampler"),
        sa.UniqueConstraint("session_id", "seq_id", name="uq_sampler_session_id_seq_id"),
    )
    op.create_index("ix_sampler_revision", "sampler", ["revision"], unique=False)
    op.create_table(
        "doomed_blob",
        sa.Column("digest", TEXT, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_doomed_blob"),
    )
    op.create_table(
        "checkpoint",
        sa.Column("run_id", TEXT, nullable=False),
        sa.Column("segment", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("digest", TEXT, nullable=False),
        sa.Column("size_bytes", INT64, nullable=False),
        sa.Column("rank", INT64, nullable=False),
        sa.Column("alpha", sa.Float(), nullable=False),
        sa.Column("train_attn", sa.Boolean(), nullable=False),
        sa.Column("train_mlp", sa.Boolean(), nullable=False),
        sa.Column("train_unembed", sa.Boolean(), nullable=False),
        sa.Column("num_optim_steps", INT64, nullable=False),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column("user_metadata", JSON, nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("expires_at", Instant(), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["run.run_id"], name="fk_checkpoint_run_id"),
        sa.PrimaryKeyConstraint("run_id", "segment", "name", name="pk_checkpoint"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_checkpoint_digest", "checkpoint", ["digest"], unique=False)
    op.create_index("ix_checkpoint_expires_at", "checkpoint", ["expires_at"], unique=False)
    op.create_index(
        "ix_checkpoint_tenant_created_at", "checkpoint", ["tenant", "created_at"], unique=False
    )
    op.create_table(
        "revision",
        sa.Column("policy_id", INT64, nullable=False),
        sa.Column("number", INT64, nullable=False),
        sa.Column("digest", TEXT, nullable=False),
        sa.Column("rank", INT64, nullable=False),
        sa.Column("alpha", sa.Float(), nullable=False),
        sa.Column("train_attn", sa.Boolean(), nullable=False),
        sa.Column("train_mlp", sa.Boolean(), nullable=False),
        sa.Column("train_unembed", sa.Boolean(), nullable=False),
        sa.Column("parent_digest", TEXT, nullable=True),
        sa.Column("run_id", TEXT, nullable=True),
        sa.Column("num_optim_steps", INT64, nullable=False),
        sa.Column("size_bytes", INT64, nullable=False),
        sa.Column("origin", TEXT, nullable=False),
        sa.Column("ephemeral", sa.Boolean(), nullable=False),
        sa.Column("user_metadata", JSON, nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("deleted_at", Instant(), nullable=True),
        sa.ForeignKeyConstraint(["policy_id"], ["policy.policy_id"], name="fk_revision_policy_id"),
        sa.ForeignKeyConstraint(["run_id"], ["run.run_id"], name="fk_revision_run_id"),
        sa.PrimaryKeyConstraint("policy_id", "digest", name="pk_revision"),
        sa.UniqueConstraint("policy_id", "number", name="uq_revision_policy_id_number"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_revision_digest", "revision", ["digest"], unique=False)
    op.create_index(
        "ix_revision_ephemeral_deleted_at", "revision", ["ephemeral", "deleted_at"], unique=False
    )
    op.create_index("ix_revision_run_id", "revision", ["run_id"], unique=False)
    _freeze_rows()


def _freeze_rows() -> None:
    if _is_postgres():
        op.execute(REFUSE)
    differs = "IS DISTINCT FROM" if _is_postgres() else "IS NOT"
    changed = " OR ".join(f"NEW.{name} {differs} OLD.{name}" for name in FROZEN)
    became_ephemeral = "(NEW.ephemeral AND NOT OLD.ephemeral)"
    _refuse("revision", "UPDATE", f"WHEN ({changed} OR {became_ephemeral})")
    _refuse("revision", "DELETE")
    for table in ("alias_event", "audit_event"):
        _refuse(table, "UPDATE")
        _refuse(table, "DELETE")


def _refuse(table: str, verb: str, condition: str = "") -> None:
    then = f"BEGIN SELECT RAISE(ABORT, '{table} rows are immutable'); END"
    if _is_postgres():
        then = "EXECUTE FUNCTION refuse_change()"
    op.execute(
        f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
        f"FOR EACH ROW {condition} {then}"
    )


def _is_postgres() -> bool:
    return op.get_context().dialect.name == "postgresql"
