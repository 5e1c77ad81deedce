"""Sessions: one call opens one session, whatever fails or restarts in between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
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
