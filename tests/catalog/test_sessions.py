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
    assert found(endings=[("finished", None), ("expired", None)]) == ["y"]
    assert found(endings=[("finished", "errored")]) == []
    assert found(project_ids=["p"], display_name="demo") == ["y"]
    assert found(session_id="x") == ["x"]
    with pytest.raises(InvalidRequest):
        found(user_metadata={'"': "x"})


def test_a_search_by_id_and_name_finds_what_either_finds(catalog: Catalog) -> None:
    for session_id, name in (("x", "alpha"), ("y", "beta"), ("z", "gamma")):
        catalog.add_session(ANN, SessionId(session_id), display_name=name)

    def found(display_name: str) -> list[str]:
        sessions = catalog.search_sessions(ANN, session_id="x", display_name=display_name)
        return [session.session_id for session in sessions]

    assert found("beta") == ["y", "x"]
    assert found("nothing") == ["x"]
    assert found(" ") == ["x"]


def test_each_word_of_a_searched_name_may_be_anywhere_in_it(catalog: Catalog) -> None:
    catalog.add_session(ANN, SessionId("x"), display_name="Math run with large batch")
    catalog.add_session(ANN, SessionId("y"), display_name="math, small batch")

    def found(display_name: str) -> list[str]:
        sessions = catalog.search_sessions(ANN, display_name=display_name)
        return [session.session_id for session in sessions]

    assert found("batch math") == ["y", "x"]
    assert found("LARGE  math") == ["x"]
    assert found("math missing") == []
    with pytest.raises(InvalidRequest, match="32"):
        found("word " * 1200)


def test_no_project_is_searched_for_as_none(catalog: Catalog) -> None:
    for session_id, project in (("x", None), ("y", "default"), ("z", "p")):
        catalog.add_session(ANN, SessionId(session_id), project_id=project)

    def found(*project_ids: str | None) -> list[str]:
        sessions = catalog.search_sessions(ANN, project_ids=project_ids)
        return [session.session_id for session in sessions]

    assert found("default", None) == ["y", "x"]
    assert found("p") == ["z"]
    assert found("p", None) == ["z", "x"]
    assert found() == []


def test_a_session_passes_when_it_ended_in_any_of_the_ways(catalog: Catalog) -> None:
    for session_id in ("x", "y", "z"):
        catalog.add_session(ANN, SessionId(session_id))
    catalog.finish_session(ANN, SessionId("x"), reason="errored")
    catalog.finish_session(ANN, SessionId("y"), reason="success")
    found = catalog.search_sessions(ANN, endings=[("open", None), ("finished", "errored")])
    assert [session.session_id for session in found] == ["z", "x"]
    assert catalog.search_sessions(ANN, endings=[]) == []


def test_a_search_at_every_limit_of_the_wire_is_answered(catalog: Catalog) -> None:
    metadata = {f"key {i}": "value" for i in range(64)}
    catalog.add_session(ANN, SESSION, user_metadata=metadata, display_name="a", project_id="p0")
    found = catalog.search_sessions(
        ANN,
        session_id="another",
        display_name="a " * 32,
        user_metadata=metadata,
        project_ids=[f"p{i}" for i in range(1000)],
        endings=[("open", None), *(("finished", f"reason {i}") for i in range(127))],
    )
    assert [session.session_id for session in found] == [SESSION]


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
