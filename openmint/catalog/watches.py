"""Watches: what answers of an alias's revisions must show online, from what clients report.

A metric is a value from 0 to 1 for an answer. Values are kept as counts and sums of short spans of
time, and only of metrics that an alias of the policy is watched for, so they stay few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete, func, select

from openmint.catalog import tables as t
from openmint.catalog.address import LATEST
from openmint.catalog.alias_rows import find_alias
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database, insert_into, now
from openmint.catalog.policies import find_policy
from openmint.catalog.records import (
    Alias,
    Observation,
    Policy,
    Watch,
    WatchFinding,
)
from openmint.catalog.rows import WATCHES, many
from openmint.errors import Conflict, InvalidRequest, NotFound
from openmint.evaluate.sequence import mean_bounds
from openmint.types import Digest, Tenant

MAX_WATCHES = 16
SPAN_SECONDS = 5
MAX_WINDOW_SECONDS = 86400

Key = tuple[int, Digest, str]
"""Policy, revision and metric of an observation."""


class WatchRecords:
    """The watches of every tenant's aliases, and the observations that they judge."""

    _database: Database

    def add_watch(
        self,
        tenant: Tenant,
        policy: str,
        alias: str,
        metric: str,
        *,
        at_least: float | None,
        at_most: float | None,
        confidence: float,
        min_observations: int,
        window_seconds: int,
        actor: str,
    ) -> Watch:
        """A watch on the mean of a metric. Raises NotFound for the policy, InvalidRequest for a
        watch of `latest` or one that has not exactly one of `at_least` and `at_most`, Conflict when
        the alias has too many."""
        if (at_least is None) == (at_most is None):
            raise InvalidRequest("a watch has either at_least or at_most")
        if alias == LATEST:
            raise InvalidRequest(f"alias {LATEST!r} follows every save; watch another")
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            if len(_watches_of(connection, owner, alias)) >= MAX_WATCHES:
                raise Conflict(f"alias {alias!r} has {MAX_WATCHES} watches; remove one first")
            values: dict[str, Any] = {
                "policy_id": owner.policy_id,
                "alias": alias,
                "metric": metric,
                "at_least": at_least,
                "at_most": at_most,
                "confidence": confidence,
                "min_observations": min_observations,
                "window_seconds": window_seconds,
                "created_at": now(),
            }
            added = connection.execute(t.watch.insert().values(**values))
            assert added.inserted_primary_key is not None
            watch = Watch(watch_id=added.inserted_primary_key[0], **values)
            _note(connection, owner, watch, actor, "watch.create")
            return watch

    def watches(self, tenant: Tenant, policy: str, alias: str) -> list[Watch]:
        """An alias's watches, oldest first. Raises NotFound for the policy."""
        with self._database.read() as connection:
            return _watches_of(connection, find_policy(connection, tenant, policy), alias)

    def remove_watch(
        self, tenant: Tenant, policy: str, alias: str, watch_id: int, *, actor: str
    ) -> None:
        """Raises NotFound."""
        with self._database.write() as connection:
            owner = find_policy(connection, tenant, policy)
            known = {watch.watch_id: watch for watch in _watches_of(connection, owner, alias)}
            if watch_id not in known:
                raise NotFound(f"alias {alias[:200]!r} of {policy!r} has no watch {watch_id}")
            connection.execute(delete(t.watch).where(t.watch.c.watch_id == watch_id))
            _note(connection, owner, known[watch_id], actor, "watch.delete")

    def watched_policies(self, metric: str) -> set[tuple[Tenant, str]]:
        """The policies with an alias that is watched for the metric, of every tenant."""
        query = select(t.policy.c.tenant, t.policy.c.name).join_from(t.watch, t.policy)
        with self._database.read() as connection:
            rows = connection.execute(query.where(t.watch.c.metric == metric)).all()
        return {(row.tenant, row.name) for row in rows}

    def add_observations(
        self, tenant: Tenant, observations: Sequence[Observation], at: datetime
    ) -> int:
        """Add values to what was observed; says how many of them counted.

        Those count whose revision an alias names now, or tries as a canary: what comes late for an
        earlier one is dropped. What no window reaches back to is deleted. Raises NotFound for a
        policy, or for a metric that none of its aliases is watched for; then nothing is added.
        """
        span = datetime.fromtimestamp(at.timestamp() // SPAN_SECONDS * SPAN_SECONDS, UTC)
        sums: dict[Key, tuple[int, float]] = {}
        num_counted = 0
        with self._database.write() as connection:
            known: dict[str, tuple[Policy, set[str], set[Digest]]] = {}
            for each in observations:
                if each.policy not in known:
                    owner = find_policy(connection, tenant, each.policy)
                    known[each.policy] = (owner, *_counted(connection, owner))
                owner, metrics, digests = known[each.policy]
                if each.metric not in metrics:
                    raise NotFound(
                        f"no alias of {each.policy!r} is watched for {each.metric!r}; "
                        "openmint watch add"
                    )
                if each.digest in digests:
                    key = (owner.policy_id, each.digest, each.metric)
                    num, total = sums.get(key, (0, 0.0))
                    sums[key] = num + each.num, total + each.total
                    num_counted += each.num
            if sums:
                oldest = at - timedelta(seconds=MAX_WINDOW_SECONDS)
                connection.execute(delete(t.observation).where(t.observation.c.span < oldest))
                _add(connection, sums, span)
        return num_counted

    def judge(self, tenant: Tenant, policy: str) -> list[WatchFinding]:
        """What each watch of the policy's aliases finds now, for what the alias names and for its
        canary. Raises NotFound for the policy."""
        with self._database.read() as connection:
            owner = find_policy(connection, tenant, policy)
            mine = WATCHES.where(t.watch.c.policy_id == owner.policy_id)
            findings = []
            for watch in many(connection, Watch, mine.order_by(t.watch.c.watch_id)):
                alias = find_alias(connection, owner.policy_id, watch.alias)
                if alias is not None:
                    findings += _findings(connection, watch, alias)
            return findings


def _findings(connection: Connection, watch: Watch, alias: Alias) -> list[WatchFinding]:
    """For the alias's revisions, by what was observed since each of them took its place."""
    placed = [(alias.digest, alias.updated_at, False)]
    if alias.canary_digest is not None and alias.canary_since is not None:
        placed.append((alias.canary_digest, alias.canary_since, True))
    window = now() - timedelta(seconds=watch.window_seconds)
    column = t.observation.c
    findings = []
    for digest, since, is_canary in placed:
        query = select(func.sum(column.num), func.sum(column.total)).where(
            column.policy_id == alias.policy_id,
            column.digest == digest,
            column.metric == watch.metric,
            column.span >= max(since, window),
        )
        num, total = connection.execute(query).one()
        num, total = int(num or 0), float(total or 0.0)
        low, high = mean_bounds(num, total, watch.confidence)
        too_low = watch.at_least is not None and high < watch.at_least
        too_high = watch.at_most is not None and low > watch.at_most
        findings.append(
            WatchFinding(
                watch=watch,
                alias_version=alias.version,
                digest=digest,
                is_canary=is_canary,
                num=num,
                mean=total / num if num else None,
                low=low,
                high=high,
                failed=num >= watch.min_observations and (too_low or too_high),
            )
        )
    return findings


def wanted_of(watch: Watch) -> str:
    """The watch in a few words."""
    if watch.at_least is not None:
        return f"{watch.metric} of at least {watch.at_least:g}"
    return f"{watch.metric} of at most {watch.at_most:g}"


def _watches_of(connection: Connection, policy: Policy, alias: str) -> list[Watch]:
    mine = (t.watch.c.policy_id == policy.policy_id) & (t.watch.c.alias == alias)
    return many(connection, Watch, WATCHES.where(mine).order_by(t.watch.c.watch_id))


def _counted(connection: Connection, policy: Policy) -> tuple[set[str], set[Digest]]:
    """The metrics and the revisions of which observations are kept."""
    watch, alias = t.watch.c, t.alias.c
    metrics = select(watch.metric).where(watch.policy_id == policy.policy_id)
    named = select(alias.digest, alias.canary_digest).where(
        alias.policy_id == policy.policy_id, alias.name != LATEST
    )
    rows = connection.execute(named).all()
    digests = {digest for row in rows for digest in row if digest is not None}
    return set(connection.execute(metrics).scalars()), digests


def _add(connection: Connection, sums: Mapping[Key, tuple[int, float]], span: datetime) -> None:
    table = t.observation
    statement = insert_into(connection, table)
    statement = statement.on_conflict_do_update(
        index_elements=[table.c.policy_id, table.c.digest, table.c.metric, table.c.span],
        set_={
            "num": table.c.num + statement.excluded.num,
            "total": table.c.total + statement.excluded.total,
        },
    )
    rows = [
        {**dict(zip(("policy_id", "digest", "metric"), key, strict=True)), "num": n, "total": total}
        for key, (n, total) in sums.items()
    ]
    connection.execute(statement, [{**row, "span": span} for row in rows])


def _note(connection: Connection, policy: Policy, watch: Watch, actor: str, action: str) -> None:
    subject = f"{policy.tenant}/{policy.name}@{watch.alias}"
    details = {"watch_id": watch.watch_id, "wanted": wanted_of(watch)}
    note_event(connection, policy.tenant, actor, action, subject, details)
