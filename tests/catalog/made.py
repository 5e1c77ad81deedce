"""Made-up records that the tests of the catalogue share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from sqlalchemy import text

from openmint.catalog.catalog import Catalog
from openmint.types import BaseInfo, Digest, LoraSpec, RunId, SessionId, Tenant

ANN = Tenant("ann")
BOB = Tenant("bob")
SESSION = SessionId("5e55")
RUN = RunId("5e55:train:0")
SPEC = LoraSpec(8)


def digest_of(word: object) -> Digest:
    return Digest("sha256:" + hashlib.sha256(str(word).encode()).hexdigest())


def base_named(name: str) -> BaseInfo:
    return BaseInfo(
        name, digest_of(name), "llama", "/base", "float32", "cpu", 10, 20, (1,), 30, 40, 50, ()
    )


BASE = base_named("tiny")


@dataclass(frozen=True, slots=True)
class Blob:
    digest: Digest
    size_bytes: int = 100
    spec: LoraSpec = SPEC
    num_optim_steps: int = 1


def blob(word: object, num_optim_steps: int = 1) -> Blob:
    digest = digest_of(word)
    return Blob(digest, size_bytes=size_of(digest), num_optim_steps=num_optim_steps)


def size_of(digest: Digest) -> int:
    """Hardly two of one size, so that a sum tells whose they are."""
    return 100 + int(digest[-6:], 16)


def stored_by_records(catalog: Catalog) -> dict[str, int]:
    """What each tenant stores, from its checkpoints and revisions."""
    with catalog._database.read() as connection:
        rows = connection.execute(text(STORED)).all()
    return {tenant: int(size) for tenant, size in rows}


STORED = """
    SELECT tenant, SUM(size_bytes) FROM (
        SELECT tenant, digest, size_bytes FROM checkpoint
        UNION SELECT tenant, digest, size_bytes FROM revision NATURAL JOIN (
            SELECT policy_id, tenant FROM policy
        ) AS owner WHERE deleted_at IS NULL
    ) AS named GROUP BY tenant
"""


def assert_stored_bytes_are_those_of_records(catalog: Catalog) -> None:
    with catalog._database.read() as connection:
        counted = connection.execute(text("SELECT tenant, num_bytes FROM stored")).all()
    assert {tenant: size for tenant, size in counted if size} == stored_by_records(catalog)


def add_run(catalog: Catalog, tenant: Tenant = ANN, session: str = SESSION, n: int = 0) -> RunId:
    """A run on policy `math`, with its session."""
    session_id, run_id = SessionId(session), RunId(f"{session}:train:{n}")
    catalog.add_session(tenant, session_id)
    catalog.add_run(tenant, run_id, session_id=session_id, policy="math", base=BASE, spec=SPEC)
    return run_id
