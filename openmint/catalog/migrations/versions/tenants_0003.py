"""Quotas and usage of tenants.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op

from openmint.catalog.columns import INT64, TEXT, Instant

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "quota",
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("requests_per_minute", INT64, nullable=True),
        sa.Column("tokens_per_minute", INT64, nullable=True),
        sa.Column("resident_adapters", INT64, nullable=True),
        sa.Column("stored_bytes", INT64, nullable=True),
        sa.PrimaryKeyConstraint("tenant", name="pk_quota"),
    )
    op.create_table(
        "usage",
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("base_name", TEXT, nullable=False),
        sa.Column("hour", Instant(), nullable=False),
        sa.Column("trained_tokens", INT64, nullable=False),
        sa.Column("prompt_tokens", INT64, nullable=False),
        sa.Column("cached_tokens", INT64, nullable=False),
        sa.Column("sampled_tokens", INT64, nullable=False),
        sa.Column("checkpoints", INT64, nullable=False),
        sa.Column("engine_seconds", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "base_name", "hour", name="pk_usage"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_usage_hour", "usage", ["hour"], unique=False)
