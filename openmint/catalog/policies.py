"""Policies and the runs that train them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, func, select, update

from openmint.catalog import tables as t
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database, now
from openmint.catalog.records import Policy, Run
from openmint.catalog.rows import (
    MAX_LIST,
    POLICIES,
    RUNS,
    many,
    metadata,
    one,
    spec_values,
)
from openmint.catalog.sessions import find_session
from openmint.errors import Conflict, InvalidRequest, NotFound
from openmint.types import BaseInfo, LoraSpec, RunId, SessionId, Tenant


def find_policy(connection: Connection, tenant: Tenant, name: str) -> Policy:
    """Raises NotFound, for another tenant's too."""
    owned = (t.policy.c.tenant == tenant) & (t.policy.c.name == name)
    if found := one(connection, Policy, POLICIES.where(owned)):
        return found
    raise NotFound(f"no policy {name[:200]!r}")


def get_or_create(
    connection: Connection,
    tenant: Tenant,
    name: str,
    base: BaseInfo,
    user_metadata: Mapping[str, str] | None = None,
    *,
    actor: str,
    owner: str | None = None,
) -> Policy:
    """The policy, new where there was none; its owner is `actor` unless another is named.

    Raises InvalidRequest when it has another base.
    """
    try:
        found = find_policy(connection, tenant, name)
    except NotFound:
        connection.execute(
            t.policy.insert().values(
                tenant=tenant,
                name=name,
                base_name=base.name,
                base_digest=base.digest,
                user_metadata=metadata(user_metadata),
                created_at=now(),
                owner=actor if owner is None else owner,
            )
        )
        note_event(connection, tenant, actor, "policy.create", f"{tenant}/{name}")
        return find_policy(connection, tenant, name)
    if found.base_digest != base.digest:
        raise InvalidRequest(
            f"policy {name!r} belongs to base {found.base_name}, not {base.name}; "
            "choose another policy name or that base"
        )
    return found


def find_run(connection: Connection, tenant: Tenant, run_id: RunId) -> Run:
    """Raises NotFound, for another tenant's too."""
    owned = (t.run.c.tenant == tenant) & (t.run.c.run_id == run_id)
    if found := one(connection, Run, RUNS.where(owned)):
        return found
    raise NotFound(f"no training run {run_id[:200]!r}")


def put_run(
    connection: Connection,
    tenant: Tenant,
    run_id: RunId,
    *,
    session_id: SessionId,
    policy: str,
    base: BaseInfo,
    spec: LoraSpec,
    user_metadata: Mapping[str, str] | None = None,
    seed: int | None = None,
    optimizer_config: Mapping[str, Any] | None = None,
) -> Run:
    """The run, and its policy where there was none. Raises as `add_run`."""
    status = "live" if find_session(connection, tenant, session_id).status == "open" else "closed"
    owner = get_or_create(connection, tenant, policy, base, actor=run_id, owner=session_id)
    known = one(connection, Run, RUNS.where(t.run.c.run_id == run_id))
    if known is None:
        started_at = now()
        connection.execute(
            t.run.insert().values(
                run_id=run_id,
                session_id=session_id,
                tenant=tenant,
                policy_id=owner.policy_id,
                model_seq_id=int(run_id.rpartition(":")[2]),
                **spec_values(spec),
                seed=seed,
                user_metadata=metadata(user_metadata),
                optimizer_config=optimizer_config and dict(optimizer_config),
                created_at=started_at,
                last_request_at=started_at,
                status=status,
                num_optim_steps=0,
            )
        )
        note_event(connection, tenant, session_id, "run.create", run_id)
    elif (known.tenant, known.spec, known.policy_id) != (tenant, spec, owner.policy_id):
        raise Conflict(f"run {run_id} exists and differs; use the next model_seq_id")
    return find_run(connection, tenant, run_id)


class PolicyRecords:
    """The policies of every tenant."""

    _database: Database

    def get_or_create_policy(
        self,
        tenant: Tenant,
        name: str,
        base: BaseInfo,
        *,
        user_metadata: Mapping[str, str] | None = None,
        actor: str = "",
    ) -> Policy:
        """The policy, new where there was none. Raises InvalidRequest when it has another base."""
        with self._database.write() as connection:
            return get_or_create(connection, tenant, name, base, user_metadata, actor=actor)

    def policy(self, tenant: Tenant, name: str) -> Policy:
        """Raises NotFound."""
        with self._database.read() as connection:
            return find_policy(connection, tenant, name)

    def num_policies(self, tenant: Tenant) -> int:
        query = select(func.count()).select_from(t.policy).where(t.policy.c.tenant == tenant)
        with self._database.read() as connection:
            return int(connection.execute(query).scalar_one())


class RunRecords:
    """The training runs of every tenant."""

    _database: Database

    def add_run(
        self,
        tenant: Tenant,
        run_id: RunId,
        *,
        session_id: SessionId,
        policy: str,
        base: BaseInfo,
        spec: LoraSpec,
        user_metadata: Mapping[str, str] | None = None,
        seed: int | None = None,
        optimizer_config: Mapping[str, Any] | None = None,
    ) -> Run:
        """The run and its policy, in one transaction; what is there already when repeated.

        Raises NotFound for the session, InvalidRequest for a policy of another base, Conflict for
        the same id with another shape or policy.
        """
        with self._database.write() as connection:
            return put_run(
                connection,
                tenant,
                run_id,
                session_id=session_id,
                policy=policy,
                base=base,
                spec=spec,
                user_metadata=user_metadata,
                seed=seed,
                optimizer_config=optimizer_config,
            )

    def run(self, tenant: Tenant, run_id: RunId) -> Run:
        """Raises NotFound."""
        with self._database.read() as connection:
            return find_run(connection, tenant, run_id)

    def runs(
        self,
        tenant: Tenant,
        *,
        limit: int = 20,
        offset: int = 0,
        project_id: str | None = None,
        policy: str | None = None,
    ) -> tuple[list[Run], int]:
        """A page of the tenant's runs, newest first, and how many there are in all."""
        query = RUNS.where(t.run.c.tenant == tenant)
        if project_id is not None:
            query = query.join(t.session, t.session.c.session_id == t.run.c.session_id)
            query = query.where(t.session.c.project_id == project_id)
        if policy is not None:
            query = query.where(t.policy.c.name == policy)
        newest = query.order_by(t.run.c.created_at.desc(), t.run.c.run_id.desc())
        count = query.with_only_columns(func.count())
        with self._database.read() as connection:
            page = many(connection, Run, newest.limit(min(limit, MAX_LIST)).offset(offset))
            return page, int(connection.execute(count).scalar_one())

    def runs_of_session(self, tenant: Tenant, session_id: SessionId) -> list[Run]:
        """A session's runs in the order of their model_seq_id."""
        owned = (t.run.c.tenant == tenant) & (t.run.c.session_id == session_id)
        with self._database.read() as connection:
            return many(connection, Run, RUNS.where(owned).order_by(t.run.c.model_seq_id))

    def touch_run(
        self, tenant: Tenant, run_id: RunId, *, num_optim_steps: int | None = None
    ) -> None:
        """Count the run as asked of now. Raises NotFound."""
        values: dict[str, Any] = {"last_request_at": now()}
        if num_optim_steps is not None:
            values["num_optim_steps"] = num_optim_steps
        with self._database.write() as connection:
            find_run(connection, tenant, run_id)
            connection.execute(update(t.run).where(t.run.c.run_id == run_id).values(**values))

    def lose_runs(self, run_ids: Sequence[RunId] | None = None) -> int:
        """Mark live runs as lost: these, or those of which no request is known.

        Their checkpoints remain.
        """
        lost = t.run.c.status == "live"
        if run_ids is not None:
            lost &= t.run.c.run_id.in_(run_ids)
        else:
            lost &= t.run.c.run_id.not_in(select(t.request.c.run_id))
        with self._database.write() as connection:
            return connection.execute(update(t.run).where(lost).values(status="lost")).rowcount
