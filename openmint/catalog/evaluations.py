"""Evaluation tasks, by digest, and the scores that revisions reached on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Float, cast, func, update

from openmint.catalog import tables as t
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database, now
from openmint.catalog.policies import find_policy
from openmint.catalog.records import Evaluation, EvaluationStatus, TaskRecord
from openmint.catalog.revisions import find_live_revision
from openmint.catalog.rows import EVALUATIONS, MAX_LIST, TASKS, many, one
from openmint.errors import InvalidRequest, NotFound
from openmint.types import Digest, Tenant


class EvaluationRecords:
    """The tasks and evaluations of every tenant."""

    _database: Database

    def put_task(
        self, tenant: Tenant, name: str, digest: Digest, body: Mapping[str, Any]
    ) -> TaskRecord:
        """The task under its digest; the one there is when repeated."""
        column = t.evaluation_task.c
        this = (column.tenant == tenant) & (column.name == name) & (column.digest == digest)
        with self._database.write() as connection:
            if known := one(connection, TaskRecord, TASKS.where(this)):
                return known
            row = TaskRecord(tenant, name, digest, dict(body), now())
            connection.execute(
                t.evaluation_task.insert().values(
                    tenant=tenant,
                    name=name,
                    digest=digest,
                    body=row.body,
                    created_at=row.created_at,
                )
            )
            note_event(connection, tenant, "", "task.create", name, {"digest": digest})
            return row

    def task(self, tenant: Tenant, reference: str) -> TaskRecord:
        """The task of that digest, or the one last put under that name. Raises NotFound."""
        column = t.evaluation_task.c
        named = column.digest if reference.startswith("sha256:") else column.name
        query = TASKS.where(column.tenant == tenant, named == reference)
        with self._database.read() as connection:
            newest = query.order_by(column.created_at.desc()).limit(1)
            if found := one(connection, TaskRecord, newest):
                return found
        raise NotFound(f"no evaluation task {reference[:200]!r}")

    def tasks(self, tenant: Tenant) -> list[TaskRecord]:
        """The tenant's tasks by name, every version of each, newest version first."""
        column = t.evaluation_task.c
        query = TASKS.where(column.tenant == tenant)
        with self._database.read() as connection:
            ordered = query.order_by(column.name, column.created_at.desc())
            return many(connection, TaskRecord, ordered.limit(MAX_LIST))

    def start_evaluation(
        self,
        tenant: Tenant,
        *,
        policy_name: str | None,
        digest: Digest | None,
        base_name: str,
        task_name: str,
        task_digest: Digest,
        num_items: int,
        seed: int = 0,
        sampling: Mapping[str, Any] | None = None,
    ) -> Evaluation:
        """A running evaluation of a policy's revision, or of the bare base without both.

        Raises NotFound for the policy or the revision, InvalidRequest for one without the other.
        """
        if (policy_name is None) != (digest is None):
            raise InvalidRequest("name a policy and a revision of it, or neither for the base")
        with self._database.write() as connection:
            policy_id = None
            if policy_name is not None and digest is not None:
                owner = find_policy(connection, tenant, policy_name)
                find_live_revision(connection, owner, digest)
                policy_id = owner.policy_id
            added = connection.execute(
                t.evaluation.insert().values(
                    tenant=tenant,
                    policy_id=policy_id,
                    digest=digest,
                    base_name=base_name,
                    task_name=task_name,
                    task_digest=task_digest,
                    seed=seed,
                    num_items=num_items,
                    num_correct=0,
                    sampling=dict(sampling or {}),
                    status="running",
                    created_at=now(),
                )
            )
            assert added.inserted_primary_key is not None
            (evaluation_id,) = added.inserted_primary_key
            details = {"task": task_name, "policy": policy_name, "digest": digest}
            note_event(connection, tenant, "", "evaluation.create", str(evaluation_id), details)
            return _find(connection, tenant, evaluation_id)

    def finish_evaluation(
        self, tenant: Tenant, evaluation_id: int, outcomes: Sequence[bool]
    ) -> Evaluation:
        """The evaluation with its score, from whether each answer was right. Raises NotFound."""
        num_correct = sum(outcomes)
        num_items = cast(func.nullif(t.evaluation.c.num_items, 0), Float)
        values = {
            "num_correct": num_correct,
            "score": num_correct / num_items,
            "outcomes": "".join("1" if right else "0" for right in outcomes),
        }
        return self._end(tenant, evaluation_id, "finished", values)

    def fail_evaluation(self, tenant: Tenant, evaluation_id: int, error: str) -> Evaluation:
        """The evaluation, ended without a score. Raises NotFound."""
        return self._end(tenant, evaluation_id, "failed", {"error": error})

    def _end(
        self,
        tenant: Tenant,
        evaluation_id: int,
        status: EvaluationStatus,
        values: Mapping[str, Any],
    ) -> Evaluation:
        this = t.evaluation.c.evaluation_id == evaluation_id
        ended = {**values, "status": status, "finished_at": now()}
        with self._database.write() as connection:
            _find(connection, tenant, evaluation_id)
            connection.execute(update(t.evaluation).where(this).values(**ended))
            return _find(connection, tenant, evaluation_id)

    def fail_running_evaluations(self, error: str) -> int:
        """End what an earlier process left running; says how many there were."""
        running = t.evaluation.c.status == "running"
        ended = {"status": "failed", "error": error, "finished_at": now()}
        with self._database.write() as connection:
            return connection.execute(update(t.evaluation).where(running).values(**ended)).rowcount

    def evaluation(self, tenant: Tenant, evaluation_id: int) -> Evaluation:
        """Raises NotFound."""
        with self._database.read() as connection:
            return _find(connection, tenant, evaluation_id)

    def evaluations(
        self,
        tenant: Tenant,
        *,
        policy: str | None = None,
        digest: Digest | None = None,
        task_name: str | None = None,
        limit: int = 100,
        before_id: int | None = None,
    ) -> list[Evaluation]:
        """The tenant's evaluations that match, newest first."""
        column = t.evaluation.c
        query = EVALUATIONS.where(column.tenant == tenant)
        if policy is not None:
            query = query.where(t.policy.c.name == policy)
        if digest is not None:
            query = query.where(column.digest == digest)
        if task_name is not None:
            query = query.where(column.task_name == task_name)
        if before_id is not None:
            query = query.where(column.evaluation_id < before_id)
        newest = query.order_by(column.evaluation_id.desc()).limit(min(limit, MAX_LIST))
        with self._database.read() as connection:
            return many(connection, Evaluation, newest)


def _find(connection: Connection, tenant: Tenant, evaluation_id: int) -> Evaluation:
    owned = (t.evaluation.c.tenant == tenant) & (t.evaluation.c.evaluation_id == evaluation_id)
    if found := one(connection, Evaluation, EVALUATIONS.where(owned)):
        return found
    raise NotFound(f"no evaluation {evaluation_id}")
