"""What search, lineage and retention need: owners, tags, indexes, times of doom.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op

from openmint.catalog.columns import INT64, TEXT, Instant

revision = "0004"
down_revision = "0003"

OWN_POLICIES = """
    UPDATE policy SET owner = COALESCE((
        SELECT run.session_id FROM run WHERE run.policy_id = policy.policy_id
        ORDER BY run.created_at LIMIT 1
    ), '')
"""
OWN_REVISIONS = """
    UPDATE revision SET owner = (
        SELECT run.session_id FROM run WHERE run.run_id = revision.run_id
    ) WHERE run_id IS NOT NULL
"""
INDEXES = {
    "policy": (("tenant", "base_name", "name"), ("tenant", "owner", "name")),
    "revision": (("owner", "policy_id", "number"), ("policy_id", "parent_digest")),
    "evaluation": (("tenant", "task_name", "score", "evaluation_id"),),
    "policy_tag": (("policy_id",),),
    "revision_tag": (("policy_id", "digest"),),
    "doomed_blob": (("doomed_at",),),
}


def upgrade() -> None:
    for table in ("policy", "revision"):
        op.add_column(table, sa.Column("owner", TEXT, nullable=False, server_default=""))
    op.execute(OWN_POLICIES)
    op.execute(OWN_REVISIONS)
    _freeze_owners()
    op.add_column("policy", sa.Column("keep_revisions", INT64, nullable=True))
    op.add_column("doomed_blob", sa.Column("doomed_at", Instant(), nullable=True))
    op.create_table(
        "policy_tag",
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("tag", TEXT, nullable=False),
        sa.Column("policy_name", TEXT, nullable=False),
        sa.Column("policy_id", INT64, nullable=False),
        sa.ForeignKeyConstraint(
            ["policy_id"], ["policy.policy_id"], name="fk_policy_tag_policy_id"
        ),
        sa.PrimaryKeyConstraint("tenant", "tag", "policy_name", name="pk_policy_tag"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "revision_tag",
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("tag", TEXT, nullable=False),
        sa.Column("policy_name", TEXT, nullable=False),
        sa.Column("number", INT64, nullable=False),
        sa.Column("policy_id", INT64, nullable=False),
        sa.Column("digest", TEXT, nullable=False),
        sa.ForeignKeyConstraint(
            ["policy_id"], ["policy.policy_id"], name="fk_revision_tag_policy_id"
        ),
        sa.PrimaryKeyConstraint("tenant", "tag", "policy_name", "number", name="pk_revision_tag"),
        sqlite_with_rowid=False,
    )
    keeping = sa.text("keep_revisions IS NOT NULL")
    op.create_index(
        "ix_policy_keeping",
        "policy",
        ["policy_id"],
        unique=False,
        sqlite_where=keeping,
        postgresql_where=keeping,
    )
    for table, indexes in INDEXES.items():
        for columns in indexes:
            name = f"ix_{table}_{'_'.join(columns)}"
            op.create_index(name, table, list(columns), unique=False)


def _freeze_owners() -> None:
    """As `initial_0001.py` does with what else never changes of a revision."""
    condition, then = "NEW.owner IS NOT OLD.owner", "BEGIN SELECT RAISE(ABORT, '{}'); END"
    then = then.format("revision rows are immutable")
    if op.get_context().dialect.name == "postgresql":
        condition, then = "NEW.owner <> OLD.owner", "EXECUTE FUNCTION refuse_change()"
    op.execute(
        "CREATE TRIGGER revision_no_new_owner BEFORE UPDATE ON revision "
        f"FOR EACH ROW WHEN ({condition}) {then}"
    )
