"""How many bytes each tenant stores: those that its checkpoints and revisions name, each once.

A counter per tenant follows every change in the change's own transaction, so that asking for it
costs the same beside a million revisions. Bytes of deleted revisions are not counted, whether or
not they are still there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, select

from openmint.catalog import tables as t
from openmint.catalog.database import insert_into
from openmint.types import Digest, Tenant


@contextmanager
def counted(connection: Connection, tenant: Tenant, digests: Collection[Digest]) -> Iterator[None]:
    """The block adds or takes away records of these bytes of the tenant; its counter follows.

    A block within such a block would be counted twice.
    """
    before = _named_bytes(connection, tenant, digests)
    yield
    added = _named_bytes(connection, tenant, digests) - before
    if added:
        statement = insert_into(connection, t.stored).values(tenant=tenant, num_bytes=added)
        total = t.stored.c.num_bytes + statement.excluded.num_bytes
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=[t.stored.c.tenant], set_={"num_bytes": total}
            )
        )


def _named_bytes(connection: Connection, tenant: Tenant, digests: Collection[Digest]) -> int:
    """The size of those of the digests that a record of the tenant names."""
    checkpoint, revision, policy = t.checkpoint.c, t.revision.c, t.policy.c
    saved = select(checkpoint.digest, checkpoint.size_bytes).where(
        checkpoint.digest.in_(digests), checkpoint.tenant == tenant
    )
    sizes = {row.digest: row.size_bytes for row in connection.execute(saved)}
    # A table at a time: there is one index that serves, and no order of joins to be wrong about.
    columns = revision.digest, revision.size_bytes, revision.policy_id, revision.deleted_at
    made = connection.execute(select(*columns).where(revision.digest.in_(digests))).all()
    live = [row for row in made if row.deleted_at is None]
    if live:
        owned = policy.policy_id.in_({row.policy_id for row in live}) & (policy.tenant == tenant)
        mine = set(connection.execute(select(policy.policy_id).where(owned)).scalars())
        sizes.update({row.digest: row.size_bytes for row in live if row.policy_id in mine})
    return sum(sizes.values())
