"""Gates, canaries, watches and schedules of aliases, and the outcome of each item of an evaluation.

Revision ID: 0005
"""

import sqlalchemy as sa
from alembic import op

from openmint.catalog.columns import INT64, TEXT, Instant

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "gate",
        sa.Column("gate_id", INT64, nullable=False),
        sa.Column("policy_id", INT64, nullable=False),
        sa.Column("alias", TEXT, nullable=False),
        sa.Column("task_name", TEXT, nullable=False),
        sa.Column("task_digest", TEXT, nullable=True),
        sa.Column("num_items", INT64, nullable=True),
        sa.Column("min_score", sa.Float(), nullable=True),
        sa.Column("margin", sa.Float(), nullable=True),
        sa.Column("confidence", sa.Float(), nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(["policy_id"], ["policy.policy_id"], name="fk_gate_policy_id"),
        sa.PrimaryKeyConstraint("gate_id", name="pk_gate"),
    )
    op.create_index("ix_gate_policy_id_alias", "gate", ["policy_id", "alias"], unique=False)
    op.create_table(
        "watch",
        sa.Column("watch_id", INT64, nullable=False),
        sa.Column("policy_id", INT64, nullable=False),
        sa.Column("alias", TEXT, nullable=False),
        sa.Column("metric", TEXT, nullable=False),
        sa.Column("at_least", sa.Float(), nullable=True),
        sa.Column("at_most", sa.Float(), nullable=True),
        sa.Column("confidence", sa.Float(), nullable=False),
        sa.Column("min_observations", INT64, nullable=False),
        sa.Column("window_seconds", INT64, nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(["policy_id"], ["policy.policy_id"], name="fk_watch_policy_id"),
        sa.PrimaryKeyConstraint("watch_id", name="pk_watch"),
    )
    op.create_index("ix_watch_policy_id_alias", "watch", ["policy_id", "alias"], unique=False)
    op.create_table(
        "observation",
        sa.Column("policy_id", INT64, nullable=False),
        sa.Column("digest", TEXT, nullable=False),
        sa.Column("metric", TEXT, nullable=False),
        sa.Column("span", Instant(), nullable=False),
        sa.Column("num", INT64, nullable=False),
        sa.Column("total", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["policy_id"], ["policy.policy_id"], name="fk_observation_policy_id"
        ),
        sa.PrimaryKeyConstraint("policy_id", "digest", "metric", "span", name="pk_observation"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_observation_span", "observation", ["span"], unique=False)
    op.create_table(
        "schedule",
        sa.Column("schedule_id", INT64, nullable=False),
        sa.Column("policy_id", INT64, nullable=False),
        sa.Column("alias", TEXT, nullable=False),
        sa.Column("task", TEXT, nullable=False),
        sa.Column("num_items", INT64, nullable=True),
        sa.Column("every_hours", sa.Float(), nullable=True),
        sa.Column("last_digest", TEXT, nullable=True),
        sa.Column("next_at", Instant(), nullable=True),
        sa.Column("created_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(["policy_id"], ["policy.policy_id"], name="fk_schedule_policy_id"),
        sa.PrimaryKeyConstraint("schedule_id", name="pk_schedule"),
    )
    op.create_index("ix_schedule_policy_id_alias", "schedule", ["policy_id", "alias"], unique=False)
    op.add_column("evaluation", sa.Column("outcomes", TEXT, nullable=True))
    op.add_column("alias", sa.Column("canary_digest", TEXT, nullable=True))
    op.add_column("alias", sa.Column("canary_share", sa.Float(), nullable=True))
    op.add_column("alias", sa.Column("canary_since", Instant(), nullable=True))
    op.add_column("alias_event", sa.Column("share", sa.Float(), nullable=True))
    op.add_column("alias_event", sa.Column("override_reason", TEXT, nullable=True))
