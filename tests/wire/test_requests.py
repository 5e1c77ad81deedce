import json
from datetime import UTC, datetime
from typing import Any

import pytest

from openmint.errors import InvalidRequest
from openmint.wire.requests import SearchSessions, parse


def search(**fields: Any) -> SearchSessions:
    return parse(SearchSessions, json.dumps(fields).encode())


def search_after(moment: str) -> SearchSessions:
    return search(cursor={"last_created_at": moment, "last_session_id": "x"})


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00", "2026-01-01T00:00:00", "soon"])
def test_a_cursor_without_an_aware_time_is_refused(moment: str) -> None:
    with pytest.raises(InvalidRequest, match="cursor/last_created_at"):
        search_after(moment)


def test_a_cursor_keeps_its_microseconds() -> None:
    shown = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
    cursor = search_after(shown.isoformat()).cursor
    assert cursor is not None
    assert cursor.last_created_at == shown


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_the_earliest_and_latest_moments_have_a_timestamp(moment: str) -> None:
    cursor = search_after(moment).cursor
    assert cursor is not None
    cursor.last_created_at.timestamp()


@pytest.mark.parametrize(
    ("filters", "limit"),
    [
        ({"user_metadata": {str(i): "" for i in range(1200)}}, "64"),
        ({"project_ids": ["p"] * 300_000}, "1000"),
        ({"statuses": [{"type": "active"}] * 2000}, "8"),
        ({"statuses": [{"type": "client_finished", "reasons": ["success"] * 2000}]}, "8"),
    ],
)
def test_more_filters_than_a_search_takes_are_refused_with_the_limit(
    filters: dict[str, Any], limit: str
) -> None:
    with pytest.raises(InvalidRequest, match=rf"at most {limit}\b"):
        search(**filters)
