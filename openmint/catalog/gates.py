"""Gates: what a revision must have shown before an alias may name it.

A gate asks for a score on a task, or compares the revision with what the alias names now, item by
item. It is judged in the transaction that moves the alias, by each revision's newest finished
evaluation that asked enough items; two are compared only if they were sampled alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, delete, func, select

from openmint.catalog import tables as t
from openmint.catalog.address import LATEST
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database, now
from openmint.catalog.policies import find_policy
from openmint.catalog.records import Evaluation, Gate, GateFailure, Policy
from openmint.catalog.rows import EVALUATIONS, GATES, many
from openmint.errors import Conflict, GateFailed, InvalidRequest, NotFound
from openmint.evaluate.compare import lower_bound, pairs_of
from openmint.types import Digest, Tenant

MAX_GATES = 32


class GateRecords:
    """The gates of every tenant's aliases."""

    _database: Database

    def add_gate(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        task: str,
        *,
        min_score: float | None,
        margin: float | None,
        confidence: float,
        num_items: int | None,
        actor: str,
    ) -> Gate:
        """A gate on a task by digest, or on what is newest under a name whenever it is judged.

        Raises NotFound for the policy or the task, InvalidRequest for a gate of `latest` or one
        that has not exactly one of `min_score` and `margin`, Conflict when the alias has too many.
        """
        if (min_score is None) == (margin is None):
            raise InvalidRequest("a gate has either min_score or margin")
        if alias == LATEST:
            raise InvalidRequest(f"alias {LATEST!r} follows every save; put the gate on another")
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            if len(gates_of(connection, owner, alias)) >= MAX_GATES:
                raise Conflict(f"alias {alias!r} has {MAX_GATES} gates; remove one first")
            pinned = task.startswith("sha256:")
            name, digest = find_task(connection, tenant, task)
            values: dict[str, Any] = {
                "policy_id": owner.policy_id,
                "alias": alias,
                "task_name": name,
                "task_digest": digest if pinned else None,
                "num_items": num_items,
                "min_score": min_score,
                "margin": margin,
                "confidence": confidence,
                "created_at": now(),
            }
            added = connection.execute(t.gate.insert().values(**values))
            assert added.inserted_primary_key is not None
            (gate_id,) = added.inserted_primary_key
            gate = Gate(gate_id=gate_id, **values)
            _note(connection, owner, gate, actor, "gate.create")
            return gate

    def gates(self, tenant: Tenant, policy: str, alias: str) -> list[Gate]:
        """An alias's gates, oldest first. Raises NotFound for the policy."""
        with self._database.read() as connection:
            return gates_of(connection, find_policy(connection, tenant, policy), alias)

    def remove_gate(
        self, tenant: Tenant, policy: str, alias: str, gate_id: int, *, actor: str
    ) -> None:
        """Let the alias move without it. Raises NotFound."""
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            known = {gate.gate_id: gate for gate in gates_of(connection, owner, alias)}
            if gate_id not in known:
                raise NotFound(f"alias {alias[:200]!r} of {policy!r} has no gate {gate_id}")
            connection.execute(delete(t.gate).where(t.gate.c.gate_id == gate_id))
            _note(connection, owner, known[gate_id], actor, "gate.delete")


def gates_of(connection: Connection, policy: Policy, alias: str) -> list[Gate]:
    mine = (t.gate.c.policy_id == policy.policy_id) & (t.gate.c.alias == alias)
    return many(connection, Gate, GATES.where(mine).order_by(t.gate.c.gate_id))


def pass_gates(
    connection: Connection,
    policy: Policy,
    alias: str,
    candidate: Digest,
    current: Digest | None,
    override_reason: str | None,
) -> list[GateFailure]:
    """What of the alias's gates is overruled, nothing when the candidate passes them all.

    Raises GateFailed for what it does not pass, unless there is a reason to go on.
    """
    failures = []
    for gate in gates_of(connection, policy, alias):
        if failure := _failure(connection, policy, gate, candidate, current):
            failures.append(failure)
    if failures and not override_reason:
        told = "; ".join(f"gate {f.gate_id} wants {f.wanted}: {f.found}" for f in failures)
        raise GateFailed(
            f"{candidate} does not pass {len(failures)} of the gates of "
            f"{policy.tenant}/{policy.name}@{alias}: {told}",
            [asdict(failure) for failure in failures],
        )
    return failures


def _failure(
    connection: Connection, policy: Policy, gate: Gate, candidate: Digest, current: Digest | None
) -> GateFailure | None:
    """Why the candidate does not pass; where nothing is named yet, there is nothing to be below."""
    _, task = find_task(connection, policy.tenant, gate.task_digest or gate.task_name)
    num_items = gate.num_items or _size_of_task(connection, policy.tenant, task)
    newest = _newest_evaluation(connection, policy, candidate, task, num_items)
    alike = newest.sampling if newest else None
    before = current and _newest_evaluation(connection, policy, current, task, num_items, alike)
    missing = [] if newest else [candidate]
    if gate.margin is not None and current and not before:
        missing.append(current)
    heat = float((alike or {}).get("temperature", 0.0))
    run = tuple(_command(policy, gate, digest, heat) for digest in missing)
    bound = None
    if not newest or missing:
        alike_too = f" at temperature {heat:g}" if newest else ""
        found = f"no evaluation on {num_items} items{alike_too}; run {' and '.join(run)}"
    elif gate.min_score is not None:
        assert newest.score is not None
        if newest.score >= gate.min_score:
            return None
        found = f"evaluation {newest.evaluation_id} scored {newest.score:.4g}"
    elif not before:
        return None
    else:
        assert gate.margin is not None
        pairs = pairs_of(_outcomes(connection, newest), _outcomes(connection, before))
        bound = lower_bound(pairs, gate.confidence)
        if bound >= -gate.margin:
            return None
        found = (
            f"{pairs.difference:+.4g} on {pairs.num_items} items, or as low as {bound:+.4g} "
            f"(evaluations {newest.evaluation_id} and {before.evaluation_id})"
        )
    return GateFailure(
        gate_id=gate.gate_id,
        wanted=wanted_by(gate),
        found=found,
        evaluation_id=newest.evaluation_id if newest else None,
        score=newest.score if newest else None,
        bound=bound,
        run=run,
    )


def wanted_by(gate: Gate) -> str:
    """The gate in a few words."""
    if gate.min_score is not None:
        return f"a score of {gate.min_score:g} on {gate.task_name}"
    confidence = f"{100 * gate.confidence:g} % confidence"
    return f"{gate.margin:g} below {gate.alias} on {gate.task_name} at most, with {confidence}"


def _newest_evaluation(
    connection: Connection,
    policy: Policy,
    digest: Digest,
    task_digest: Digest,
    num_items: int,
    alike: Mapping[str, Any] | None = None,
) -> Evaluation | None:
    """The newest that counts: finished, on enough items, with the outcome of each kept; and if it
    is to be compared with another, sampled alike."""
    column = t.evaluation.c
    query = EVALUATIONS.where(
        column.policy_id == policy.policy_id,
        column.digest == digest,
        column.task_digest == task_digest,
        column.status == "finished",
        column.num_items >= num_items,
        column.outcomes.is_not(None),
    )
    newest_first = many(connection, Evaluation, query.order_by(column.evaluation_id.desc()))
    return next((each for each in newest_first if alike in (None, each.sampling)), None)


def _outcomes(connection: Connection, evaluation: Evaluation) -> list[bool]:
    this = t.evaluation.c.evaluation_id == evaluation.evaluation_id
    digits = connection.execute(select(t.evaluation.c.outcomes).where(this)).scalar_one()
    return [digit == "1" for digit in digits]


def find_task(connection: Connection, tenant: Tenant, reference: str) -> tuple[str, Digest]:
    """Name and digest of the task of that digest, or of the newest of that name."""
    column = t.evaluation_task.c
    named = column.digest if reference.startswith("sha256:") else column.name
    query = select(column.name, column.digest).where(column.tenant == tenant, named == reference)
    found = connection.execute(query.order_by(column.created_at.desc()).limit(1)).first()
    if found is None:
        raise NotFound(f"no evaluation task {reference[:200]!r}")
    return found.name, found.digest


def _size_of_task(connection: Connection, tenant: Tenant, digest: Digest) -> int:
    column: Any = t.evaluation_task.c
    size = func.json_array_length(column.body, "$.items")
    if connection.dialect.name == "postgresql":
        size = func.jsonb_array_length(column.body["items"])
    this = (column.tenant == tenant) & (column.digest == digest)
    return int(connection.execute(select(size).where(this).limit(1)).scalar_one())


def _command(policy: Policy, gate: Gate, digest: Digest, temperature: float) -> str:
    task = gate.task_digest or gate.task_name
    n = f" --n {gate.num_items}" if gate.num_items else ""
    heat = f" --temperature {temperature:g}" if temperature else ""
    return f"openmint evaluate {policy.tenant}/{policy.name}@{digest} --task {task}{n}{heat}"


def _note(connection: Connection, policy: Policy, gate: Gate, actor: str, action: str) -> None:
    subject = f"{policy.tenant}/{policy.name}@{gate.alias}"
    details = {"gate_id": gate.gate_id, "wanted": wanted_by(gate)}
    note_event(connection, policy.tenant, actor, action, subject, details)
