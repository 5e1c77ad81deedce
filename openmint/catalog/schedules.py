"""Schedules: evaluations that start by themselves, for each revision that is new to an alias, or
every so many hours."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete, or_, select, update

from openmint.catalog import tables as t
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database, now
from openmint.catalog.gates import find_task
from openmint.catalog.policies import find_policy
from openmint.catalog.records import DueEvaluation, Policy, Schedule
from openmint.catalog.rows import SCHEDULES, many, to_record
from openmint.errors import Conflict, NotFound
from openmint.types import Digest, Tenant

MAX_SCHEDULES = 16
MAX_DUE = 100


class ScheduleRecords:
    """The schedules of every tenant's aliases."""

    _database: Database

    def add_schedule(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        task: str,
        *,
        every_hours: float | None,
        num_items: int | None,
        actor: str,
    ) -> Schedule:
        """A schedule that is due as soon as the alias names something; `task` is a name (its newest
        task is asked) or a digest. Raises NotFound for the policy or the task, Conflict when the
        alias has too many."""
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            find_task(connection, tenant, task)
            if len(_schedules_of(connection, owner, alias)) >= MAX_SCHEDULES:
                raise Conflict(f"alias {alias!r} has {MAX_SCHEDULES} schedules; remove one first")
            created_at = now()
            values: dict[str, Any] = {
                "policy_id": owner.policy_id,
                "alias": alias,
                "task": task,
                "num_items": num_items,
                "every_hours": every_hours,
                "last_digest": None,
                "next_at": created_at if every_hours else None,
                "created_at": created_at,
            }
            added = connection.execute(t.schedule.insert().values(**values))
            assert added.inserted_primary_key is not None
            schedule = Schedule(schedule_id=added.inserted_primary_key[0], **values)
            _note(connection, owner, schedule, actor, "schedule.create")
            return schedule

    def schedules(self, tenant: Tenant, policy: str, alias: str) -> list[Schedule]:
        """An alias's schedules, oldest first. Raises NotFound for the policy."""
        with self._database.read() as connection:
            return _schedules_of(connection, find_policy(connection, tenant, policy), alias)

    def remove_schedule(
        self, tenant: Tenant, policy: str, alias: str, schedule_id: int, *, actor: str
    ) -> None:
        """Raises NotFound."""
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            known = {each.schedule_id: each for each in _schedules_of(connection, owner, alias)}
            if schedule_id not in known:
                raise NotFound(f"alias {alias[:200]!r} of {policy!r} has no schedule {schedule_id}")
            this = t.schedule.c.schedule_id == schedule_id
            connection.execute(delete(t.schedule).where(this))
            _note(connection, owner, known[schedule_id], actor, "schedule.delete")

    def due_evaluations(self, at: datetime) -> list[DueEvaluation]:
        """What is to be evaluated by now, of every tenant, some at a time: the revision that an
        alias names, where that is new to its schedule, or where the hours are over."""
        column, alias = t.schedule.c, t.alias.c
        same = (alias.policy_id == column.policy_id) & (alias.name == column.alias)
        is_new = or_(column.last_digest.is_(None), column.last_digest != alias.digest)
        due = or_(column.every_hours.is_(None) & is_new, column.next_at <= at)
        query = (
            select(t.schedule, alias.digest, t.policy.c.tenant, t.policy.c.name)
            .join_from(t.schedule, t.alias, same)
            .join(t.policy, t.policy.c.policy_id == column.policy_id)
        )
        query = query.where(due).order_by(column.schedule_id).limit(MAX_DUE)
        with self._database.read() as connection:
            rows = connection.execute(query).mappings().all()
        return [
            DueEvaluation(row["tenant"], row["name"], row["digest"], to_record(Schedule, row))
            for row in rows
        ]

    def note_scheduled(self, schedule: Schedule, digest: Digest, at: datetime) -> None:
        """Its evaluation of the revision was started, or can't be."""
        values: dict[str, Any] = {"last_digest": digest}
        if schedule.every_hours is not None:
            values["next_at"] = at + timedelta(hours=schedule.every_hours)
        this = t.schedule.c.schedule_id == schedule.schedule_id
        with self._database.write() as connection:
            connection.execute(update(t.schedule).where(this).values(**values))


def _schedules_of(connection: Connection, policy: Policy, alias: str) -> list[Schedule]:
    mine = (t.schedule.c.policy_id == policy.policy_id) & (t.schedule.c.alias == alias)
    return many(connection, Schedule, SCHEDULES.where(mine).order_by(t.schedule.c.schedule_id))


def _note(
    connection: Connection, policy: Policy, schedule: Schedule, actor: str, action: str
) -> None:
    subject = f"{policy.tenant}/{policy.name}@{schedule.alias}"
    details = {"schedule_id": schedule.schedule_id, "task": schedule.task}
    note_event(connection, policy.tenant, actor, action, subject, details)
