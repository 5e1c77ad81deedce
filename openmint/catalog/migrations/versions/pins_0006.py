"""Pins: aliases whose revisions stay in host memory.

Revision ID: 0006
"""

import sqlalchemy as sa
from alembic import op

from openmint.catalog.columns import INT64, TEXT, Instant

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "pin",
        sa.Column("policy_id", INT64, nullable=False),
        sa.Column("alias", TEXT, nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(["policy_id"], ["policy.policy_id"], name="fk_pin_policy_id"),
        sa.PrimaryKeyConstraint("policy_id", "alias", name="pk_pin"),
        sqlite_with_rowid=False,
    )
