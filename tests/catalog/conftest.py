"""Every test of the catalogue runs on both databases."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from openmint.catalog.catalog import Catalog
from openmint.errors import Overloaded
from tests.catalog.made import assert_stored_bytes_are_those_of_records
from tests.postgres import PostgresServer

NewUrl = Callable[[], str]


@pytest.fixture(params=["sqlite", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def new_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> NewUrl:
    """Gives the URL of a catalogue without records each time, after the one before is closed."""
    if kind == "postgresql":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        return postgres.emptied_catalogue
    numbers = iter(range(1000))
    return lambda: f"sqlite:///{tmp_path}/catalog-{next(numbers)}.db"


@pytest.fixture
def url(new_url: NewUrl) -> str:
    return new_url()


@pytest.fixture
def empty_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without tables, as a first start finds it."""
    if kind == "postgresql":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        with postgres.new_database() as url:
            yield url
    else:
        yield f"sqlite:///{tmp_path}/empty.db"


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    """Whatever a test did with it, in the end its bytes were counted right."""
    opened = Catalog.open(url)
    yield opened
    with suppress(Overloaded):  # a test may have cut its connections
        opened.has_keys()
    assert_stored_bytes_are_those_of_records(opened)
    opened.close()
