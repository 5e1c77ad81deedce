import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from openmint.api.auth import authenticate
from openmint.api.errors import install_error_handlers
from openmint.api.routes import tinker_session
from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Principal
from openmint.service.sessions import Sessions
from openmint.types import SessionId, Tenant

ACME = Tenant("acme")

Ask = Callable[..., httpx.Response]


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog.open(f"sqlite:///{tmp_path / 'openmint.db'}")
    yield catalog
    catalog.close()


@pytest.fixture
def ask(catalog: Catalog) -> Ask:
    app = FastAPI()
    app.include_router(tinker_session.router)
    install_error_handlers(app)
    app.state.gateway = SimpleNamespace(catalog=catalog, sessions=Sessions(catalog, 60.0))
    app.dependency_overrides[authenticate] = lambda: Principal(ACME, "admin", "key")

    def send(method: str, path: str, **options: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
                return await client.request(method, f"/api/v1{path}", **options)

        return asyncio.run(once())

    return send


def test_the_project_that_a_search_shows_can_be_searched_for(ask: Ask, catalog: Catalog) -> None:
    catalog.add_session(ACME, SessionId("x"))
    catalog.add_session(ACME, SessionId("y"), project_id="p")
    shown = ask("POST", "/sessions/search", json={}).json()["sessions"]
    projects = {session["session_id"]: session["project_id"] for session in shown}
    assert projects == {"x": "default", "y": "p"}
    for session_id, project in projects.items():
        found = ask("POST", "/sessions/search", json={"project_ids": [project]}).json()["sessions"]
        assert [session["session_id"] for session in found] == [session_id]


def test_a_search_for_active_or_errored_sessions_finds_both(ask: Ask, catalog: Catalog) -> None:
    for session_id in ("x", "y", "z"):
        catalog.add_session(ACME, SessionId(session_id))
    catalog.finish_session(ACME, SessionId("x"), reason="errored")
    catalog.finish_session(ACME, SessionId("y"), reason="success")
    errored = {"type": "client_finished", "reasons": ["errored"]}
    statuses = [{"type": "active"}, errored, {"type": "cancelled"}]
    found = ask("POST", "/sessions/search", json={"statuses": statuses}).json()["sessions"]
    assert [session["session_id"] for session in found] == ["z", "x"]


def test_pages_of_a_search_follow_their_cursor(ask: Ask, catalog: Catalog) -> None:
    for session_id in ("x", "y", "z"):
        catalog.add_session(ACME, SessionId(session_id))
    first = ask("POST", "/sessions/search", json={"limit": 2}).json()
    second = ask("POST", "/sessions/search", json={"limit": 2, "cursor": first["next_cursor"]})
    assert [session["session_id"] for session in second.json()["sessions"]] == ["x"]


def test_a_cursor_without_a_time_zone_is_refused(ask: Ask) -> None:
    cursor = {"last_created_at": "0001-01-01T00:00:00", "last_session_id": "x"}
    answer = ask("POST", "/sessions/search", json={"cursor": cursor})
    assert answer.status_code == 400
    assert "timezone" in answer.json()["detail"]


def test_the_last_day_of_the_calendar_has_an_audit(ask: Ask) -> None:
    assert ask("GET", "/audit", params={"day": "9999-12-31"}).json() == {"entries": []}
