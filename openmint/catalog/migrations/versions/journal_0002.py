"""Requests of runs, the states from which runs are rebuilt, samplers that follow a run, and what
probes of revisions found.

Revision ID: 0002
"""

import sqlalchemy as sa
from alembic import op

from openmint.catalog.columns import INT64, TEXT

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "request",
        sa.Column("run_id", TEXT, nullable=False),
        sa.Column("seq", INT64, nullable=False),
        sa.Column("session_id", TEXT, nullable=False),
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("request_id", TEXT, nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("status", TEXT, nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=True),
        sa.Column("needs", TEXT, nullable=True),
        sa.Column("outcome", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(
            ["session_id"], ["session.session_id"], name="fk_request_session_id"
        ),
        sa.PrimaryKeyConstraint("run_id", "seq", name="pk_request"),
    )
    op.create_index("ix_request_session_id", "request", ["session_id"], unique=False)
    op.create_index("ix_request_needs", "request", ["needs"], unique=False)
    op.add_column("run", sa.Column("snapshot_digest", TEXT, nullable=True))
    op.add_column("run", sa.Column("snapshot_seq", INT64, nullable=True))
    op.create_index("ix_run_snapshot_digest", "run", ["snapshot_digest"], unique=False)
    op.add_column("sampler", sa.Column("inflight_run", TEXT, nullable=True))
    op.add_column("revision", sa.Column("drift", sa.Float(), nullable=True))
    op.add_column("revision", sa.Column("base_difference", sa.Float(), nullable=True))
