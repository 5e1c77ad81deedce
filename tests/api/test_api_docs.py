"""docs/api.md names every route with its method and its one line; it can't fall behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from openmint.api.app import ROUTERS

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text("utf-8")
ROUTES = [
    (method, re.sub(r":path\}", "}", route.path))
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in sorted(route.methods)
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_is_documented(method: str, path: str) -> None:
    assert f"| {method} | `{path}` |" in PAGE


def test_every_documented_route_exists() -> None:
    documented = re.findall(r"^\| ([A-Z]+) \| `(/[^`]*)` \|", PAGE, re.MULTILINE)
    assert set(documented) == set(ROUTES)
    assert len(documented) == len(set(documented))
