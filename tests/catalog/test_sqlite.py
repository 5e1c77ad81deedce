import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from openmint.catalog.catalog import Catalog
from openmint.catalog.database import Database
from openmint.catalog.sqlite import WRITES_PER_WAL_CHECKPOINT
from openmint.errors import InvalidRequest, NotFound, Overloaded, StoreFailed
from tests.catalog.made import ANN, SESSION


@pytest.fixture
def kind() -> str:
    return "sqlite"


def file_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def test_connections_sync_fully_and_map_nothing(url: str) -> None:
    database = Database(url)
    with database.write() as connection:
        values = [
            connection.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "mmap_size")
        ]
    database.close()
    assert values == ["wal", 2, 1, 0]


def test_the_log_is_checkpointed_now_and_then(url: str) -> None:
    catalog = Catalog.open(url)
    catalog.add_session(ANN, SESSION)
    for _ in range(3 * WRITES_PER_WAL_CHECKPOINT):
        catalog.touch_sessions([SESSION])
    log_bytes = Path(f"{file_of(url)}-wal").stat().st_size
    catalog.close()
    assert log_bytes < 2 * WRITES_PER_WAL_CHECKPOINT * 3 * 4096


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_url_without_a_file_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="sqlite:///path"):
        Database(url)


def test_nul_is_text(catalog: Catalog) -> None:
    with pytest.raises(NotFound):
        catalog.policy(ANN, "\0")


def test_a_write_that_waits_too_long_for_another_process_may_be_retried(
    catalog: Catalog, url: str
) -> None:
    with closing(sqlite3.connect(file_of(url), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Overloaded, match="retry"):
            catalog.add_session(ANN, SESSION)
        other.execute("ROLLBACK")
    assert catalog.add_session(ANN, SESSION).status == "open"


def test_a_file_that_is_no_database_is_a_store_failure(url: str) -> None:
    file_of(url).write_bytes(b"something else" * 500)
    with pytest.raises(StoreFailed, match="not a database"):
        Catalog.open(url)
    with pytest.raises(StoreFailed, match="unable to open"):
        Catalog.open(f"{url}/missing/catalog.db")
