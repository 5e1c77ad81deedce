"""Requests of runs as rows: what is there when, and what a start needs of them."""

from dataclasses import replace

import pytest
from sqlalchemy.exc import IntegrityError

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Finished, RequestRecord, SavedState
from openmint.types import RunId, SessionId
from tests.catalog.made import ANN, RUN, SESSION, add_run, digest_of


def record(seq: int, run: RunId = RUN) -> RequestRecord:
    session = SessionId(run.partition(":")[0])
    return RequestRecord(
        run, seq, session, ANN, f"r{seq}", "kind", b"print", "accepted", b"body", None, None
    )


def finished(seq: int, *, keeps_body: bool) -> Finished:
    return Finished(RUN, seq, "done", b"outcome", keeps_body)


def test_a_start_gets_what_is_to_do_and_what_came_of_the_rest(catalog: Catalog) -> None:
    add_run(catalog)
    catalog.write_requests([record(seq) for seq in range(4)], [])
    catalog.write_requests([], [finished(0, keeps_body=True), finished(1, keeps_body=True)])
    catalog.write_requests([], [finished(2, keeps_body=False)])
    rows = {row.seq: row for row in catalog.open_requests()}
    assert [(row.status, row.body, row.outcome) for row in rows.values()] == [
        ("done", b"body", b"outcome"),
        ("done", None, b"outcome"),
        ("done", None, b"outcome"),
        ("accepted", b"body", None),
    ]
    assert catalog.requests_of(RUN)[1].body == b"body", "a rebuild needs it"


def test_a_snapshot_takes_the_place_of_what_came_before(catalog: Catalog) -> None:
    add_run(catalog)
    catalog.write_requests([record(seq) for seq in range(4)], [])
    ends = [finished(seq, keeps_body=True) for seq in range(4)]
    catalog.write_requests([], ends)
    catalog.forget_outcomes([(RUN, 1)])
    saved = SavedState(digest_of("state"), 2)
    catalog.move_snapshot(RUN, saved)
    assert catalog.snapshot_of(RUN) == saved
    left = {row.seq: (row.body, row.outcome) for row in catalog.requests_of(RUN)}
    kept = (b"body", b"outcome")
    assert left == {0: kept, 2: (None, b"outcome"), 3: kept}
    catalog.move_snapshot(RUN, SavedState(digest_of("later"), 3))
    assert digest_of("state") in catalog.unused_blobs()
    assert digest_of("later") not in catalog.unused_blobs()


def test_requests_end_with_their_session(catalog: Catalog) -> None:
    add_run(catalog)
    catalog.write_requests([replace(record(0), needs=digest_of("loaded"))], [])
    catalog.move_snapshot(RUN, SavedState(digest_of("state"), 0))
    catalog.finish_session(ANN, SessionId(SESSION), reason="success")
    assert catalog.requests_of(RUN) == []
    assert catalog.snapshot_of(RUN) is None
    assert digest_of("state") in catalog.unused_blobs()
    catalog.write_requests([record(1)], [])  # it was on its way
    assert catalog.open_requests() == []


def test_a_group_is_written_whole_or_not_at_all(catalog: Catalog) -> None:
    add_run(catalog)
    catalog.write_requests([record(1)], [])
    unknown = replace(record(3), session_id=SessionId("unknown"))
    with pytest.raises(IntegrityError):
        catalog.write_requests([record(2), unknown], [finished(1, keeps_body=False)])
    assert [(row.seq, row.status) for row in catalog.requests_of(RUN)] == [(1, "accepted")]


def test_what_is_accepted_again_takes_the_place_of_what_nobody_heard_of(catalog: Catalog) -> None:
    add_run(catalog)
    catalog.write_requests([record(1), record(2)], [])
    catalog.write_requests([], [finished(1, keeps_body=True)])
    again = [replace(record(seq), body=b"other", request_id="again") for seq in (1, 2)]
    catalog.write_requests(again, [])
    rows = catalog.requests_of(RUN)
    assert [(row.status, row.body, row.request_id) for row in rows] == [
        ("done", b"body", "r1"),
        ("accepted", b"other", "again"),
    ]
