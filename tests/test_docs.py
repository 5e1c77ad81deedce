"""Pages name files that exist, and the data walks pass through every room on the way."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]
FILE = re.compile(r"`((?:openmint|tests|docs|examples|recipes|benchmarks)/[\w./-]+)`")
LINK = re.compile(r"\]\((?!https?://)([^)#]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    named = [PROJECT / name for name in FILE.findall(text)]
    linked = [page.parent / name for name in LINK.findall(text)]
    assert [str(path) for path in (*named, *linked) if not path.exists()] == []


@pytest.mark.parametrize("walk", ["forward_backward", "sample"])
def test_data_walks_pass_through_the_rooms_in_order(walk: str) -> None:
    text = (PROJECT / "docs" / "architecture.md").read_text()
    section = text.split(f"## Data walk: `{walk}`")[1].split("\n## ")[0]
    rooms = [name.split("/")[1] for name in FILE.findall(section) if name.endswith(".py")]
    first = [rooms.index(room) for room in ("api", "service", "scheduler", "engine", "layers")]
    assert first == sorted(first)


def test_every_room_is_described() -> None:
    text = (PROJECT / "docs" / "architecture.md").read_text()
    rooms = {path.parent.name for path in (PROJECT / "openmint").glob("*/*.py")} - {"__pycache__"}
    missing = sorted(room for room in rooms if f"`openmint/{room}`" not in text)
    assert missing == []
