import sys

import psycopg
import pytest
from sqlalchemy import text

from openmint.catalog import tables as t
from openmint.catalog.catalog import Catalog
from openmint.catalog.database import Database
from openmint.catalog.postgres import WRITE_LOCK
from openmint.errors import Conflict, InvalidRequest, Overloaded
from tests.catalog.made import ANN, SESSION, add_run
from tests.postgres import PostgresServer


@pytest.fixture
def kind() -> str:
    return "postgresql"


def end_others(url: str) -> None:
    """End every other connection to the database, as a server that restarts does."""
    with psycopg.connect(url) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_a_commit_waits_for_the_disk(catalog: Catalog) -> None:
    with catalog._database.write() as connection:
        values = [
            connection.execute(text(f"SHOW {name}")).scalar()
            for name in ("fsync", "synchronous_commit", "transaction_isolation")
        ]
    assert values == ["on", "on", "read committed"]


def test_every_text_is_in_byte_order(catalog: Catalog) -> None:
    query = text(
        "SELECT table_name, column_name FROM information_schema.columns WHERE data_type = 'text' "
        "AND table_schema = 'public' AND collation_name IS DISTINCT FROM 'C'"
    )
    with catalog._database.read() as connection:
        assert connection.execute(query).all() == []


def test_times_carry_their_zone(catalog: Catalog) -> None:
    query = text(
        "SELECT DISTINCT data_type FROM information_schema.columns "
        "WHERE table_schema = 'public' AND (column_name LIKE '%\\_at' OR column_name = 'hour')"
    )
    with catalog._database.read() as connection:
        assert connection.execute(query).scalars().all() == ["timestamp with time zone"]


@pytest.mark.parametrize("metadata", [{"k": "a\0b"}, {"a\0b": "v"}, {"k": "\ud800"}])
def test_metadata_that_json_cannot_hold_is_the_callers_fault(
    catalog: Catalog, metadata: dict[str, str]
) -> None:
    with pytest.raises(InvalidRequest):
        catalog.add_session(ANN, SESSION, user_metadata=metadata)


def test_nul_in_a_text_is_the_callers_fault(catalog: Catalog) -> None:
    for call in (
        lambda: catalog.policy(ANN, "\0"),
        lambda: catalog.authenticate("tml-om_\0_x"),
        lambda: catalog.add_session(ANN, SESSION, display_name="a\0b"),
    ):
        with pytest.raises(InvalidRequest, match="NUL"):
            call()


def test_a_write_that_waits_too_long_for_another_process_may_be_retried(
    catalog: Catalog, url: str
) -> None:
    with psycopg.connect(url) as other:
        other.execute(f"SELECT pg_advisory_xact_lock({WRITE_LOCK})")
        with pytest.raises(Overloaded, match="another process is writing"):
            catalog.add_session(ANN, SESSION)
        other.rollback()
    assert catalog.add_session(ANN, SESSION).status == "open"


def test_a_second_service_on_the_database_is_refused(url: str) -> None:
    first, second = Catalog.open(url), Catalog.open(url)
    first.claim()
    with pytest.raises(Conflict, match="another server"):
        second.claim()
    second.add_session(ANN, SESSION)
    first.close()
    second.claim()
    second.close()


def test_after_a_lost_connection_a_retry_succeeds(catalog: Catalog, url: str) -> None:
    key, _ = catalog.create_key(ANN, "read")
    calls = (
        lambda: catalog.authenticate(key),
        lambda: catalog.keys(ANN),
        lambda: catalog.add_session(ANN, SESSION),
    )
    for call in calls:
        call()
    end_others(url)
    for call in calls:
        with pytest.raises(Overloaded, match="retry"):
            call()
        call()


def test_a_write_whose_connection_is_lost_leaves_nothing(catalog: Catalog, url: str) -> None:
    with pytest.raises(Overloaded), catalog._database.write() as connection:
        connection.execute(t.doomed_blob.insert().values(digest="a"))
        end_others(url)
        connection.execute(t.doomed_blob.insert().values(digest="b"))
    with psycopg.connect(url) as other:
        assert other.execute("SELECT * FROM doomed_blob").fetchall() == []


def test_a_server_that_is_not_there_may_come_back(postgres: PostgresServer) -> None:
    with pytest.raises(Overloaded, match="can't be reached"):
        Database(f"postgresql://postgres@/x?host={postgres.folder}/nowhere")
    with pytest.raises(Overloaded, match='database "missing" does not exist'):
        Database(postgres.url("missing"))


def test_a_database_of_another_encoding_is_refused(postgres: PostgresServer) -> None:
    latin = postgres.new_database("ENCODING LATIN1 LOCALE 'C'")
    with latin as url, pytest.raises(InvalidRequest, match="UTF8"):
        Database(url)


def test_without_the_driver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "openmint.catalog.postgres")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InvalidRequest, match=r"openmint\[postgres\]"):
        Database("postgresql://host/db")


def test_a_session_of_the_server_may_have_its_own_zone(catalog: Catalog, url: str) -> None:
    add_run(catalog)
    with psycopg.connect(url) as other:
        other.execute("SET timezone = 'Asia/Tokyo'")
        row = other.execute("SELECT created_at FROM session").fetchone()
    assert row is not None
    assert row[0] == catalog.session(ANN, SESSION).created_at
