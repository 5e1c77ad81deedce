"""Search finds what it is asked for, page by page, and walks an index to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import event

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Filters
from openmint.errors import InvalidRequest, NotFound
from openmint.types import Digest
from tests.catalog.made import ANN, BASE, BOB, SESSION, add_run, base_named, blob, digest_of

OTHER = base_named("other")


def score(
    catalog: Catalog, policy: str, digest: Digest, num_correct: int, task: str = "sums"
) -> None:
    made = catalog.start_evaluation(
        ANN, policy_name=policy, digest=digest, base_name="tiny", task_name=task,
        task_digest=digest_of(task), num_items=10,
    )  # fmt: skip
    outcomes = [item < num_correct for item in range(10)]
    catalog.finish_evaluation(ANN, made.evaluation_id, outcomes)


@pytest.fixture
def filled(catalog: Catalog) -> Catalog:
    """Ann's `a-1` (three revisions), `a-2`, `b-1` on another base, and a run's `math`; Bob's."""
    first = [("a-1", blob(1)), ("a-1", blob(2)), ("a-2", blob(3)), ("a-1", blob(4))]
    catalog.import_revisions(ANN, BASE, first, actor="key")
    catalog.import_revisions(ANN, OTHER, [("b-1", blob(5))], actor="else")
    catalog.import_revisions(BOB, BASE, [("a-1", blob(1))], actor="key-of-bob")
    catalog.add_run_revision(ANN, add_run(catalog), blob(6), ephemeral=False)
    catalog.add_run_revision(ANN, add_run(catalog, n=1), blob(7), ephemeral=True)
    catalog.set_tag(ANN, "a-2", None, "cheap", actor="key")
    catalog.set_tag(ANN, "math", None, "cheap", actor="key")
    catalog.set_tag(BOB, "a-1", None, "cheap", actor="bob")
    for policy, word in (("a-1", 4), ("a-1", 1), ("a-2", 3)):
        catalog.set_tag(ANN, policy, digest_of(word), "good", actor="key")
    score(catalog, "a-1", digest_of(1), 5)
    score(catalog, "a-1", digest_of(1), 9)
    score(catalog, "a-1", digest_of(2), 7)
    score(catalog, "a-2", digest_of(3), 8)
    score(catalog, "a-2", digest_of(3), 10, task="poems")
    return catalog


def policies(catalog: Catalog, **wanted: Any) -> list[str]:
    return [policy.name for policy in catalog.policies(ANN, Filters(**wanted)).items]


def revisions(catalog: Catalog, **wanted: Any) -> list[tuple[str, int]]:
    found = catalog.find_revisions(ANN, Filters(**wanted)).items
    return [(revision.policy_name, revision.number) for revision in found]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({}, ["a-1", "a-2", "b-1", "math"]),
        ({"prefix": "a-"}, ["a-1", "a-2"]),
        ({"tag": "cheap"}, ["a-2", "math"]),
        ({"tag": "good"}, []),
        ({"owner": "key"}, ["a-1", "a-2"]),
        ({"owner": SESSION}, ["math"]),
        ({"base": "other"}, ["b-1"]),
        ({"task": "sums"}, ["a-1", "a-2"]),
        ({"task": "sums", "min_score": 0.85}, ["a-1"]),
        ({"task": "poems", "min_score": 1.0}, ["a-2"]),
        ({"tag": "cheap", "prefix": "a"}, ["a-2"]),
        ({"tag": "cheap", "owner": SESSION, "base": "tiny"}, ["math"]),
        ({"tag": "cheap", "base": "other"}, []),
        ({"task": "sums", "tag": "cheap"}, ["a-2"]),
        ({"task": "sums", "owner": "else"}, []),
    ],
)
def test_policies_are_found_by_what_is_wanted(
    filled: Catalog, wanted: dict[str, Any], names: list[str]
) -> None:
    assert policies(filled, **wanted) == names


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, [("a-1", 1), ("a-1", 2), ("a-1", 3), ("a-2", 1), ("b-1", 1), ("math", 1)]),
        ({"prefix": "a-2"}, [("a-2", 1)]),
        ({"tag": "good"}, [("a-1", 1), ("a-1", 3), ("a-2", 1)]),
        ({"tag": "cheap"}, []),
        ({"tag": "good", "prefix": "a-2"}, [("a-2", 1)]),
        ({"owner": "key"}, [("a-1", 1), ("a-1", 2), ("a-1", 3), ("a-2", 1)]),
        ({"owner": SESSION}, [("math", 1)]),
        ({"base": "other"}, [("b-1", 1)]),
        ({"task": "sums"}, [("a-1", 1), ("a-2", 1), ("a-1", 2)]),
        ({"task": "sums", "min_score": 0.8}, [("a-1", 1), ("a-2", 1)]),
        ({"task": "sums", "tag": "good", "min_score": 0.7}, [("a-1", 1), ("a-2", 1)]),
        ({"task": "other"}, []),
    ],
)
def test_revisions_are_found_by_what_is_wanted(
    filled: Catalog, wanted: dict[str, Any], found: list[tuple[str, int]]
) -> None:
    assert revisions(filled, **wanted) == found


def test_deleted_and_ephemeral_revisions_are_not_found(filled: Catalog) -> None:
    filled.delete_revision(ANN, "a-1", digest_of(1), actor="key")
    assert ("a-1", 1) not in revisions(filled)
    assert revisions(filled, tag="good") == [("a-1", 3), ("a-2", 1)]
    assert revisions(filled, task="sums") == [("a-2", 1), ("a-1", 2)]


@pytest.mark.parametrize(
    "wanted", [{}, {"tag": "good"}, {"owner": "key"}, {"task": "sums"}, {"prefix": "a-"}]
)
def test_pages_give_every_row_once_in_order(filled: Catalog, wanted: dict[str, Any]) -> None:
    whole = filled.find_revisions(ANN, Filters(**wanted)).items
    seen, cursor = list(whole[:0]), None
    while True:
        page = filled.find_revisions(ANN, Filters(**wanted), limit=1, cursor=cursor)
        seen += page.items
        if (cursor := page.next_cursor) is None:
            break
    assert seen == list(whole)


def test_cursors_of_other_lists_and_scores_without_a_task_are_refused(filled: Catalog) -> None:
    for cursor in ("", "x", "a/b", "nan"):
        with pytest.raises(InvalidRequest, match="cursor"):
            filled.find_revisions(ANN, Filters(task="sums"), cursor=cursor)
    with pytest.raises(InvalidRequest, match="name the task"):
        Filters(min_score=0.5)


def test_tags_are_set_and_unset_and_audited(filled: Catalog) -> None:
    assert filled.tags(ANN, "a-2") == ["cheap"]
    assert filled.tags(ANN, "a-1", digest_of(1)) == ["good"]
    filled.set_tag(ANN, "a-2", None, "cheap", actor="key")
    filled.unset_tag(ANN, "a-2", None, "never", actor="key")
    before = len(filled.audit(ANN))
    filled.unset_tag(ANN, "a-2", None, "cheap", actor="key")
    filled.unset_tag(ANN, "a-1", digest_of(1), "good", actor="key")
    assert filled.tags(ANN, "a-2") == filled.tags(ANN, "a-1", digest_of(1)) == []
    assert policies(filled, tag="cheap") == ["math"]
    events = filled.audit(ANN)
    assert len(events) == before + 2
    assert [(e.action, e.actor, e.details) for e in events[:2]] == [
        ("revision.untag", "key", {"tag": "good"}),
        ("policy.untag", "key", {"tag": "cheap"}),
    ]
    with pytest.raises(NotFound):
        filled.set_tag(BOB, "math", None, "mine", actor="bob")
    with pytest.raises(NotFound):
        filled.set_tag(ANN, "a-2", digest_of(1), "good", actor="key")


def test_a_policy_has_a_bounded_number_of_tags(filled: Catalog) -> None:
    for number in range(63):
        filled.set_tag(ANN, "a-2", None, f"t{number}", actor="key")
    with pytest.raises(InvalidRequest, match="64 tags"):
        filled.set_tag(ANN, "a-2", None, "more", actor="key")
    filled.set_tag(ANN, "a-2", None, "t1", actor="key")


def test_owners_are_keys_and_sessions(filled: Catalog) -> None:
    assert filled.policy(ANN, "math").owner == filled.revision(ANN, "math", digest_of(6)).owner
    assert filled.policy(ANN, "math").owner == SESSION
    assert filled.import_revision(ANN, "new", BASE, blob(9), actor="k").owner == "k"


# -- plans ----------------------------------------------------------------------------------------

SEARCHES: list[dict[str, Any]] = [
    {},
    {"prefix": "policy-001"},
    {"tag": "rare"},
    {"tag": "rare", "prefix": "policy-0"},
    {"owner": "few"},
    {"base": "other"},
    {"task": "sums"},
    {"task": "sums", "min_score": 0.5},
]
NUM_MANY = 3000


@pytest.fixture
def many(catalog: Catalog) -> Catalog:
    """So many that a database which has counted them would not read all."""
    for tenant in (ANN, BOB):
        for start in range(0, NUM_MANY, 1000):
            made = [(f"policy-{n:05d}", blob(n)) for n in range(start, start + 1000)]
            catalog.import_revisions(tenant, BASE, made, actor=f"key-{start}-{tenant}")
    some = [(f"few-{n}", blob(-n)) for n in range(1, 60)]
    catalog.import_revisions(ANN, OTHER, some, actor="few")
    for n in range(0, NUM_MANY, 100):
        name, digest = f"policy-{n:05d}", digest_of(n)
        catalog.set_tag(ANN, name, None, "rare", actor="key")
        catalog.set_tag(ANN, name, digest, "rare", actor="key")
        score(catalog, name, digest, n // 300)
    return catalog


def count_rows(catalog: Catalog) -> None:
    """Have the database plan by what is there; otherwise it may know of an empty table."""
    with catalog._database.write() as connection:
        connection.exec_driver_sql("ANALYZE")


@pytest.fixture
def plans(many: Catalog) -> Iterator[Callable[[Callable[[], object]], str]]:
    """Gives how the database runs the one query that a call makes."""

    def plan(call: Callable[[], object]) -> str:
        engine = many._database._server.readers
        asked: list[tuple[str, Any]] = []

        def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            if statement.startswith("SELECT") and "lock" not in statement:
                asked.append((statement, parameters))

        event.listen(engine, "before_cursor_execute", note)
        try:
            call()
        finally:
            event.remove(engine, "before_cursor_execute", note)
        ((statement, parameters),) = asked
        explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
        with many._database.read() as connection:
            rows = connection.exec_driver_sql(explain + statement, parameters)
            return "\n".join(" ".join(map(str, row)) for row in rows)

    yield plan


@pytest.mark.parametrize("is_counted", [False, True])
def test_no_search_reads_a_table_whole_or_sorts_it(
    many: Catalog, kind: str, plans: Callable[[Callable[[], object]], str], is_counted: bool
) -> None:
    if is_counted:
        count_rows(many)
    for wanted in SEARCHES:
        for search in (many.policies, many.find_revisions):
            for cursor in (None, search(ANN, Filters(**wanted), limit=5).next_cursor):

                def call(
                    search: Any = search, wanted: Any = wanted, cursor: str | None = cursor
                ) -> object:
                    return search(ANN, Filters(**wanted), limit=5, cursor=cursor)

                found = plans(call)
                what = f"{search.__name__} {wanted} {cursor}\n{found}"
                if kind == "postgresql":
                    assert not re.search(r"Seq Scan|Bitmap|Hash|Merge|-> +Sort|^Sort", found), what
                else:
                    assert "SCAN" not in found.replace("SCAN CONSTANT ROW", ""), what
                    assert "TEMP B-TREE" not in found, what


@pytest.mark.parametrize("is_counted", [False, True])
def test_a_crowded_policy_is_resolved_by_the_digest_of_its_revision(
    many: Catalog, kind: str, plans: Callable[[Callable[[], object]], str], is_counted: bool
) -> None:
    """And not by reading all of its revisions."""
    many.import_revisions(ANN, BASE, [("busy", blob(f"busy-{n}")) for n in range(300)], actor="k")
    if is_counted:
        count_rows(many)
    found = plans(lambda: many.resolve(ANN, "ann/busy"))
    if kind == "postgresql":
        assert re.search(r" on revision\b.*\n.*Index Cond: .*digest = ", found), found
    else:
        assert re.search(r"SEARCH revision USING PRIMARY KEY \(policy_id=\? AND digest=", found), (
            found
        )


@pytest.mark.parametrize("is_counted", [False, True])
def test_an_owners_page_begins_with_the_owner(
    many: Catalog, kind: str, plans: Callable[[Callable[[], object]], str], is_counted: bool
) -> None:
    if is_counted:
        count_rows(many)
    found = plans(
        lambda: many.find_revisions(ANN, Filters(owner="key-0-ann"), limit=5, cursor="500/0")
    )
    if is_counted:
        assert "ix_revision_owner_policy_id_number" in found, found
    assert not re.search(r"(uq|ix)_policy", found), found
