"""Sessions: one call opens one session, whatever fails or restarts in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from openmint.catalog.catalog import Catalog
from openmint.errors import Overloaded
from openmint.service.sessions import Sessions
from openmint.types import SessionId, Tenant

ANN, BOB = Tenant("ann"), Tenant("bob")
RETRY = "stainless-python-retry-1"


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog.open(f"sqlite:///{tmp_path / 'openmint.db'}")
    yield catalog
    catalog.close()


def opened(sessions: Sessions, tenant: Tenant, retry_key: str | None = RETRY) -> SessionId:
    about: dict[str, Any] = {"user_metadata": {}, "display_name": None, "project_id": None}
    return asyncio.run(sessions.create(tenant, retry_key, tags=(), **about))


def test_a_retried_call_opens_one_session_also_across_a_restart(catalog: Catalog) -> None:
    first = opened(Sessions(catalog, 60.0), ANN)
    assert opened(Sessions(catalog, 60.0), ANN) == first
    assert [session.session_id for session in catalog.sessions(ANN)] == [first]
    assert opened(Sessions(catalog, 60.0), BOB) != first


def test_calls_without_a_retry_key_open_a_session_each(catalog: Catalog) -> None:
    sessions = Sessions(catalog, 60.0)
    assert opened(sessions, ANN, None) != opened(sessions, ANN, None)


def test_a_session_whose_record_failed_is_opened_by_the_retry(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(catalog, 60.0)
    with monkeypatch.context() as patch:

        def busy(*_: object, **__: object) -> None:
            raise Overloaded("another process is writing")

        patch.setattr(catalog, "add_session", busy)
        with pytest.raises(Overloaded):
            opened(sessions, ANN)
    assert catalog.session(ANN, opened(sessions, ANN)).status == "open"


def test_the_last_day_of_the_calendar_has_an_audit(catalog: Catalog) -> None:
    catalog.add_audit(ANN, "key", "policy.create", "ann/x")
    sessions = Sessions(catalog, 60.0)
    assert sessions.audit(ANN, date.max) == []
    assert sessions.audit(ANN, date.min) == []
    assert [event.action for event in sessions.audit(ANN, None)] == ["policy.create"]


def test_a_failing_hook_keeps_nothing_else_from_being_freed_and_is_tried_again(
    catalog: Catalog,
) -> None:
    sessions = Sessions(catalog, timeout_seconds=0.0)
    calls: list[tuple[str, SessionId]] = []
    broken = True

    async def first(_: Tenant, session_id: SessionId) -> None:
        calls.append(("first", session_id))
        if broken:
            raise RuntimeError("the worker did not answer")

    async def second(_: Tenant, session_id: SessionId) -> None:
        calls.append(("second", session_id))

    sessions.on_close(first)
    sessions.on_close(second)
    ids = [opened(sessions, ANN, None), opened(sessions, ANN, None)]

    def sweep() -> set[tuple[str, SessionId]]:
        calls.clear()
        asyncio.run(sessions.keep_time(time.monotonic() + 1.0))
        return set(calls)

    assert sweep() == {(hook, one) for hook in ("first", "second") for one in ids}
    assert sweep() == {("first", one) for one in ids}
    broken = False
    assert sweep() == {("first", one) for one in ids}
    assert sweep() == set()


def test_a_client_ends_its_session_although_a_hook_fails(catalog: Catalog) -> None:
    sessions = Sessions(catalog, 60.0)

    async def hook(_: Tenant, session_id: SessionId) -> None:
        raise Overloaded("no room")

    sessions.on_close(hook)
    session_id = opened(sessions, ANN)
    asyncio.run(sessions.finish(ANN, session_id, "success"))
    assert catalog.session(ANN, session_id).status == "finished"
