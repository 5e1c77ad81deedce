"""The reference pages say what the code does."""

from __future__ import annotations

import pytest

from docs.generate import FOLDER, PAGES
from openmint.config import ServiceConfig, Settings, WorkerConfig


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_made_page_is_what_make_docs_writes(name: str) -> None:
    assert (FOLDER / name).read_text() == PAGES[name](), "run `make docs`"


@pytest.mark.parametrize("section", [Settings, WorkerConfig, ServiceConfig])
def test_every_setting_is_on_the_page(section: type) -> None:
    page = (FOLDER / "configuration.md").read_text()
    names = set(section.__dataclass_fields__) - {"worker", "service"}
    assert all(f"| `{name}` |" in page for name in names)
