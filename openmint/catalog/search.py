"""Search: policies and revisions of a tenant by name, tag, owner, base and score, page by page.

Each search walks an index in the order in which it lists: with a task the best score first, else by
name; revisions of an owner in the order in which their policies were made. What else is asked for
is looked at row by row. A cursor is the last row's place in that order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, literal, select, tuple_

from openmint.catalog import tables as t
from openmint.catalog.database import Database
from openmint.catalog.records import Filters, Policy, PolicyPage, Revision, RevisionPage
from openmint.catalog.rows import MAX_LIST, POLICIES, REVISIONS, to_record
from openmint.errors import InvalidRequest
from openmint.types import Tenant

LAST_CHARACTER = "\U0010ffff"
EVERYTHING = Filters()

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class _Order:
    """Two columns that give every row a place of its own."""

    first: ColumnElement[Any]
    second: ColumnElement[Any]
    parse: Callable[[str], Any]
    """What makes a value of `first` from its text."""
    best_first: bool = False

    def page(self, query: Select[Any], limit: int, cursor: str | None) -> Select[Any]:
        """The rows after the cursor, one more than the limit."""
        place = tuple_(self.first, self.second)
        if cursor is not None:
            last = self._place(cursor)
            query = query.where(place < last if self.best_first else place > last)
        ways = [c.desc() if self.best_first else c for c in (self.first, self.second)]
        query = query.add_columns(self.first.label("at_first"), self.second.label("at_second"))
        return query.order_by(*ways).limit(limit + 1)

    def _place(self, cursor: str) -> Any:
        first, _, second = cursor.rpartition("/")
        try:
            values = self.parse(first), int(second)
        except ValueError:
            raise InvalidRequest(f"cursor {cursor[:80]!r} did not come from this list") from None
        columns = zip(values, (self.first, self.second), strict=True)
        return tuple_(*(literal(value, column.type) for value, column in columns))


class SearchRecords:
    """The policies and revisions of every tenant, searched."""

    _database: Database

    def policies(
        self,
        tenant: Tenant,
        filters: Filters = EVERYTHING,
        *,
        limit: int = 100,
        cursor: str | None = None,
        search: str | None = None,
    ) -> PolicyPage:
        """A page of the tenant's policies; `cursor` is the page before's `next_cursor`.

        `search` matches any part of a name and reads all that the filters leave. Raises
        InvalidRequest for another cursor.
        """
        query, order = policies_query(tenant, filters)
        if search:
            query = query.where(t.policy.c.name.contains(search.lower(), autoescape=True))
        with self._database.read() as connection:
            items, after = _read(connection, Policy, query, order, limit, cursor)
        return PolicyPage(items, after)

    def find_revisions(
        self,
        tenant: Tenant,
        filters: Filters = EVERYTHING,
        *,
        limit: int = 100,
        cursor: str | None = None,
    ) -> RevisionPage:
        """A page of the tenant's revisions, of all its policies, without ephemeral and deleted
        ones. Raises InvalidRequest for a cursor of another list."""
        query, order = revisions_query(tenant, filters)
        with self._database.read() as connection:
            items, after = _read(connection, Revision, query, order, limit, cursor)
        return RevisionPage(items, after)


def _read(
    connection: Connection,
    kind: type[Found],
    query: Select[Any],
    order: _Order,
    limit: int,
    cursor: str | None,
) -> tuple[tuple[Found, ...], str | None]:
    """A page, and the cursor of the next one."""
    limit = min(limit, MAX_LIST)
    rows = connection.execute(order.page(query, limit, cursor)).mappings().all()
    items = tuple(to_record(kind, row) for row in rows[:limit])
    if len(rows) <= limit:
        return items, None
    return items, f"{rows[limit - 1]['at_first']}/{rows[limit - 1]['at_second']}"


def policies_query(tenant: Tenant, filters: Filters) -> tuple[Select[Any], _Order]:
    policy, tag, score = t.policy.c, t.policy_tag.c, t.evaluation.c
    query = POLICIES.where(policy.tenant == tenant)
    name, order = policy.name, _Order(policy.name, policy.policy_id, str)
    if filters.task is not None:
        query = query.join(t.evaluation, score.policy_id == policy.policy_id)
        query = query.where(*_best(tenant, filters, of_revision=False))
        order = _Order(score.score, score.evaluation_id, float, best_first=True)
    elif filters.tag is not None:
        query = query.join(t.policy_tag, tag.policy_id == policy.policy_id)
        query = query.where(tag.tenant == tenant, tag.tag == filters.tag)
        name, order = tag.policy_name, _Order(tag.policy_name, tag.policy_id, str)
    if filters.task is not None and filters.tag is not None:
        mine = (tag.tenant == tenant) & (tag.tag == filters.tag) & (tag.policy_name == policy.name)
        query = query.where(select(tag.tag).where(mine).exists())
    if filters.owner is not None:
        query = query.where(policy.owner == filters.owner)
    return query.where(*_named(name, filters)), order


# Each revision has a policy; but only so does no database begin with the policies of the tenant,
# as if an owner's revisions were spread evenly over those of all.
_OF_OWNER = select(*REVISIONS.selected_columns).select_from(t.revision.outerjoin(t.policy))


def revisions_query(tenant: Tenant, filters: Filters) -> tuple[Select[Any], _Order]:
    policy, revision, tag, score = t.policy.c, t.revision.c, t.revision_tag.c, t.evaluation.c
    kept = revision.deleted_at.is_(None) & revision.ephemeral.is_(False)
    of_tenant: ColumnElement[bool] = policy.tenant == tenant
    query = REVISIONS
    name, order = policy.name, _Order(policy.name, revision.number, str)
    if filters.task is not None:
        same = (score.policy_id == revision.policy_id) & (score.digest == revision.digest)
        query = query.join(t.evaluation, same)
        query = query.where(*_best(tenant, filters, of_revision=True))
        order = _Order(score.score, score.evaluation_id, float, best_first=True)
    elif filters.tag is not None:
        same = (tag.policy_id == revision.policy_id) & (tag.digest == revision.digest)
        query = query.join(t.revision_tag, same)
        query = query.where(tag.tenant == tenant, tag.tag == filters.tag)
        name, order = tag.policy_name, _Order(tag.policy_name, tag.number, str)
    elif filters.owner is not None:
        query, of_tenant = _OF_OWNER, policy.tenant.is_not_distinct_from(tenant)
        order = _Order(revision.policy_id, revision.number, int)
    if filters.task is not None and filters.tag is not None:
        mine = (tag.policy_id == revision.policy_id) & (tag.digest == revision.digest)
        query = query.where(select(tag.tag).where(mine, tag.tag == filters.tag).exists())
    if filters.owner is not None:
        query = query.where(revision.owner == filters.owner)
    return query.where(of_tenant, kept, *_named(name, filters)), order


def _named(name: ColumnElement[str], filters: Filters) -> list[ColumnElement[bool]]:
    conditions = []
    if filters.prefix:
        conditions += [name >= filters.prefix, name < filters.prefix + LAST_CHARACTER]
    if filters.base is not None:
        conditions.append(t.policy.c.base_name == filters.base)
    return conditions


def _best(tenant: Tenant, filters: Filters, *, of_revision: bool) -> list[ColumnElement[bool]]:
    """The evaluation is the best of its revision, or of its policy, on the task, and good enough;
    of equal ones the last."""
    score, other = t.evaluation.c, t.evaluation.alias()
    rivals = (other.c.policy_id == score.policy_id) & (other.c.task_name == filters.task)
    if of_revision:
        rivals &= other.c.digest == score.digest
    place = tuple_(other.c.score, other.c.evaluation_id)
    better = select(other.c.score).where(rivals, place > tuple_(score.score, score.evaluation_id))
    return [
        score.tenant == tenant,
        score.task_name == filters.task,
        score.score.is_not(None) if filters.min_score is None else score.score >= filters.min_score,
        ~better.exists(),
    ]
