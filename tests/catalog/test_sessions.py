from datetime import timedelta

import pytest

from openmint.catalog.catalog import Catalog
from openmint.catalog.database import now
from openmint.errors import Conflict, InvalidRequest, NotFound
from openmint.types import SessionId
from tests.catalog.made import ANN, BOB, RUN, SESSION, add_run


def test_a_session_is_as_it_was_opened(catalog: Catalog) -> None:
    opened = catalog.add_session(
        ANN,
        SESSION,
        tags=("a", "b"),
        user_metadata={"team": "rl"},
        display_name="Demo",
        project_id="p",
        sdk_version="0.38",
    )
    assert catalog.session(ANN, SESSION) == opened
    assert (opened.tags, opened.user_metadata, opened.status) == (
        ("a", "b"),
        {"team": "rl"},
        "open",
    )
    assert catalog.add_session(ANN, SESSION) == opened


def test_another_tenants_session_is_not_found(catalog: Catalog) -> None:
    catalog.add_session(ANN, SESSION)
    with pytest.raises(NotFound):
        catalog.session(BOB, SESSION)
    with pytest.raises(NotFound):
        catalog.finish_session(BOB, SESSION, reason="success")
    with pytest.raises(Conflict):
        catalog.add_session(BOB, SESSION)


def test_a_session_ends_once_and_closes_its_runs(catalog: Catalog) -> None:
    add_run(catalog)
    catalog.finish_session(ANN, SESSION, reason="errored", detail="oops")
    catalog.finish_session(ANN, SESSION, reason="success")
    ended = catalog.session(ANN, SESSION)
    assert (ended.status, ended.finish_reason, ended.finish_detail) == (
        "finished",
        "errored",
        "oops",
    )
    assert ended.finished_at is not None
    assert catalog.run(ANN, RUN).status == "closed"
    assert catalog.open_sessions() == []


def test_only_silent_open_sessions_expire(catalog: Catalog) -> None:
    for name in ("1", "2", "3"):
        catalog.add_session(ANN, SessionId(name))
    catalog.finish_session(ANN, SessionId("1"), reason="success")
    middle = now()
    catalog.touch_sessions([SessionId("1"), SessionId("2"), SessionId("unknown")])
    assert catalog.expire_idle(middle) == [(ANN, "3")]
    assert catalog.expire_idle(middle) == []
    assert [s.session_id for s in catalog.open_sessions()] == ["2"]


def test_sessions_are_listed_newest_first_in_pages(catalog: Catalog) -> None:
    for i in range(5):
        catalog.add_session(ANN, SessionId(f"{i}"))
    catalog.add_session(BOB, SessionId("bobs"))
    assert [s.session_id for s in catalog.sessions(ANN, limit=2)] == ["4", "3"]
    assert [s.session_id for s in catalog.sessions(ANN, limit=9, offset=3)] == ["1", "0"]
    last = catalog.sessions(ANN, limit=2)[-1]
    rest = catalog.search_sessions(ANN, before=(last.created_at, last.session_id))
    assert [s.session_id for s in rest] == ["2", "1", "0"]


def test_search_joins_its_filters(catalog: Catalog) -> None:
    metadata = {"team": "rl", "a.b c": "1"}
    catalog.add_session(ANN, SessionId("x"), display_name="50% Demo", user_metadata=metadata)
    catalog.add_session(ANN, SessionId("y"), display_name="501 demo", project_id="p")
    catalog.finish_session(ANN, SessionId("y"), reason="success")

    def found(**filters: object) -> list[str]:
        return [s.session_id for s in catalog.search_sessions(ANN, **filters)]  # type: ignore[arg-type]

    assert found(display_name="demo") == ["y", "x"]
    assert found(display_name="0% d") == ["x"]
    assert found(user_metadata=metadata) == ["x"]
    assert found(user_metadata={"team": "other"}) == []
    assert found(statuses=["finished", "expired"]) == ["y"]
    assert found(finish_reasons=["errored"]) == []
    assert found(project_ids=["p"], display_name="demo") == ["y"]
    assert found(session_id="x") == ["x"]
    with pytest.raises(InvalidRequest):
        found(user_metadata={'"': "x"})


def test_a_session_moves_to_a_project(catalog: Catalog) -> None:
    catalog.add_session(ANN, SESSION)
    catalog.set_session_project(ANN, SESSION, "p")
    assert catalog.session(ANN, SESSION).project_id == "p"
    with pytest.raises(NotFound):
        catalog.set_session_project(BOB, SESSION, "q")


def test_times_are_utc(catalog: Catalog) -> None:
    created_at = catalog.add_session(ANN, SESSION).created_at
    assert created_at.utcoffset() == timedelta(0)
    assert abs(created_at - now()) < timedelta(minutes=1)
