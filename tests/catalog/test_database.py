import sqlite3
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from openmint.catalog.catalog import Catalog
from openmint.catalog.database import WRITES_PER_WAL_CHECKPOINT, Database
from openmint.catalog.rows import SHAPES, SPEC_FIELDS
from openmint.catalog.tables import METADATA
from openmint.errors import InvalidRequest, NotFound, Overloaded, StoreFailed
from tests.catalog.made import ANN, RUN, SESSION, add_run, blob


def test_migrations_lead_to_the_tables(url: str) -> None:
    database = Database(url)
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": False})
        assert compare_metadata(context, METADATA) == []
    database.close()


def test_each_select_has_the_columns_of_its_record() -> None:
    for kind, query in SHAPES:
        wanted = {field.name for field in fields(kind)}
        if "spec" in wanted:
            wanted = wanted - {"spec"} | set(SPEC_FIELDS)
        assert wanted <= set(query.selected_columns.keys()), kind


def test_what_was_written_is_there_after_reopening(url: str) -> None:
    first = Catalog.open(url)
    add_run(first)
    first.close()
    again = Catalog.open(url)
    assert again.run(ANN, RUN).policy_name == "math"
    again.close()


def test_connections_sync_fully_and_map_nothing(url: str) -> None:
    database = Database(url)
    with database.write() as connection:
        values = [
            connection.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "mmap_size")
        ]
    database.close()
    assert values == ["wal", 2, 1, 0]


def test_a_failed_write_leaves_nothing(catalog: Catalog) -> None:
    with pytest.raises(RuntimeError), catalog._database.write() as connection:
        connection.execute(text("INSERT INTO setting VALUES ('a', x'00')"))
        raise RuntimeError
    with catalog._database.read() as connection:
        found = connection.execute(text("SELECT count(*) FROM setting WHERE name = 'a'"))
        assert found.scalar() == 0


def test_readers_cannot_write(catalog: Catalog) -> None:
    with pytest.raises(StoreFailed, match="readonly"), catalog._database.read() as connection:
        connection.execute(text("DELETE FROM setting"))


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE revision SET size_bytes = 1",
        "UPDATE revision SET ephemeral = 1",
        "DELETE FROM revision",
        "UPDATE alias_event SET reason = 'x'",
        "DELETE FROM alias_event",
        "UPDATE audit_event SET actor = 'x'",
        "DELETE FROM audit_event",
    ],
)
def test_revisions_and_events_stay_as_they_were_written(catalog: Catalog, change: str) -> None:
    catalog.add_checkpoint(ANN, add_run(catalog), "sampler_weights", "one", blob(1))
    with pytest.raises(IntegrityError, match="immutable"), catalog._database.write() as connection:
        connection.execute(text(change))


def test_the_log_is_checkpointed_now_and_then(url: str, tmp_path: Path) -> None:
    catalog = Catalog.open(url)
    catalog.add_session(ANN, SESSION)
    for _ in range(3 * WRITES_PER_WAL_CHECKPOINT):
        catalog.touch_sessions([SESSION])
    log_bytes = (tmp_path / "catalog.db-wal").stat().st_size
    catalog.close()
    assert log_bytes < 2 * WRITES_PER_WAL_CHECKPOINT * 3 * 4096


@pytest.mark.parametrize("url", ["", "nonsense", "sqlite://", "postgresql://host/db"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="sqlite:///path"):
        Database(url)


def test_text_and_numbers_that_sqlite_cannot_hold_are_the_callers_fault(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        catalog.policy(ANN, "\ud800")
    with pytest.raises(InvalidRequest, match="64 bits"):
        catalog.sessions(ANN, offset=1 << 63)
    with pytest.raises(NotFound):
        catalog.policy(ANN, "\0")


def test_a_write_that_waits_too_long_for_another_process_may_be_retried(
    catalog: Catalog, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "catalog.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Overloaded, match="retry"):
            catalog.add_session(ANN, SESSION)
        other.execute("ROLLBACK")
    assert catalog.add_session(ANN, SESSION).status == "open"


def test_a_file_that_is_no_database_is_a_store_failure(tmp_path: Path) -> None:
    (tmp_path / "catalog.db").write_bytes(b"something else" * 500)
    with pytest.raises(StoreFailed, match="not a database"):
        Catalog.open(f"sqlite:///{tmp_path}/catalog.db")
    with pytest.raises(StoreFailed, match="unable to open"):
        Catalog.open(f"sqlite:///{tmp_path}/missing/catalog.db")
