"""Every test of the catalogue runs on both databases."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from openmint.catalog.catalog import Catalog
from tests.postgres import PostgresServer

NewUrl = Callable[[], str]


@pytest.fixture(params=["sqlite", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def new_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NewUrl]:
    """Gives the URL of another new database each time."""
    if kind == "postgresql":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        yield postgres.new_database
        postgres.drop_databases()
    else:
        numbers = iter(range(1000))
        yield lambda: f"sqlite:///{tmp_path}/catalog-{next(numbers)}.db"


@pytest.fixture
def url(new_url: NewUrl) -> str:
    return new_url()


@pytest.fixture
def empty_url(kind: str, request: pytest.FixtureRequest, url: str) -> str:
    """The URL of a database without tables, as a first start finds it."""
    if kind == "postgresql":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        return postgres.new_database(empty=True)
    return url


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    opened = Catalog.open(url)
    yield opened
    opened.close()
