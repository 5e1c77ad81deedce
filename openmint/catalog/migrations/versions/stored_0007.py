"""How many bytes each tenant stores, counted as they come and go; what databases plan by.

Revision ID: 0007
"""

import sqlalchemy as sa
from alembic import op

from openmint.catalog.columns import INT64, TEXT

revision = "0007"
down_revision = "0006"

EXPECTED = {"revision": -0.01, "alias": -0.1}
"""As PostgreSQL has it: of so many of a table's rows each has a policy of its own. In the mean a
policy has one revision and one alias, and then any index that begins with the policy seems to be as
good as that of the whole key; but some policies have very many."""

COUNT = """
    INSERT INTO stored (tenant, num_bytes)
    SELECT tenant, SUM(size_bytes) FROM (
        SELECT tenant, digest, size_bytes FROM checkpoint
        UNION
        SELECT policy.tenant, revision.digest, revision.size_bytes
        FROM revision JOIN policy ON policy.policy_id = revision.policy_id
        WHERE revision.deleted_at IS NULL
    ) AS named GROUP BY tenant
"""


def upgrade() -> None:
    op.create_table(
        "stored",
        sa.Column("tenant", TEXT, nullable=False),
        sa.Column("num_bytes", INT64, nullable=False),
        sa.PrimaryKeyConstraint("tenant", name="pk_stored"),
    )
    op.execute(COUNT)
    op.drop_index("ix_revision_ephemeral_deleted_at", "revision")
    op.create_index(
        "ix_revision_of_sessions",
        "revision",
        ["deleted_at"],
        unique=False,
        sqlite_where=sa.text("ephemeral IS 1"),
        postgresql_where=sa.text("ephemeral IS TRUE"),
    )
    if op.get_context().dialect.name == "postgresql":
        for table, share in EXPECTED.items():
            op.execute(f"ALTER TABLE {table} ALTER policy_id SET (n_distinct = {share})")
