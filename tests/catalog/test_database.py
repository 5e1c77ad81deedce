"""What the catalogue relies on, whichever database it is."""

from dataclasses import fields
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.exc import IntegrityError

from openmint.catalog import tables as t
from openmint.catalog.catalog import Catalog
from openmint.catalog.database import Database, migrate, now
from openmint.catalog.rows import SHAPES, SPEC_FIELDS, blob_values
from openmint.errors import InvalidRequest, StoreFailed
from tests.catalog.made import (
    ANN,
    BASE,
    BOB,
    RUN,
    add_run,
    blob,
)

REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006", "0007")


def differences(connection: Any) -> list[Any]:
    """Between the tables as migrations made them and as the code knows them."""
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    return compare_metadata(context, t.METADATA)


def test_migrations_lead_to_the_tables(empty_url: str) -> None:
    database = Database(empty_url)
    with database.read() as connection:
        assert differences(connection) == []
    database.close()


def test_migrations_follow_each_other(empty_url: str) -> None:
    engine = create_engine(empty_url)
    for revision in REVISIONS:
        with engine.begin() as connection:
            assert differences(connection) != []
            migrate(connection, revision)
    with engine.connect() as connection:
        assert differences(connection) == []
    engine.dispose()
    Database(empty_url).close()


def test_a_migration_counts_the_bytes_that_are_stored_already(empty_url: str) -> None:
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        migrate(connection, "0005")
        for policy_id, tenant in enumerate((ANN, ANN, BOB), 1):
            made = {"policy_id": policy_id, "tenant": tenant, "name": f"p{policy_id}"}
            base = {"base_name": BASE.name, "base_digest": BASE.digest}
            values = {**made, **base, "user_metadata": {}, "created_at": now()}
            connection.execute(t.policy.insert().values(values))
        for policy_id, word, deleted_at in (
            (1, 1, None),
            (2, 1, None),
            (2, 2, now()),
            (3, 2, None),
        ):
            values = {
                **blob_values(blob(word)),
                "policy_id": policy_id,
                "number": word,
                "origin": "imported",
                "ephemeral": False,
                "user_metadata": {},
                "created_at": now(),
                "deleted_at": deleted_at,
            }
            connection.execute(t.revision.insert().values(values))
    engine.dispose()
    catalog = Catalog.open(empty_url)
    assert catalog.stored_bytes(ANN) == blob(1).size_bytes
    assert catalog.stored_bytes(BOB) == blob(2).size_bytes
    catalog.close()


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


def test_a_failed_write_leaves_nothing(catalog: Catalog) -> None:
    with pytest.raises(RuntimeError), catalog._database.write() as connection:
        connection.execute(t.setting.insert().values(name="a", value=b"\0"))
        raise RuntimeError
    with catalog._database.read() as connection:
        named = select(func.count()).where(t.setting.c.name == "a")
        assert connection.execute(named).scalar() == 0


def test_readers_cannot_write(catalog: Catalog) -> None:
    with pytest.raises(StoreFailed, match=r"read-?only"), catalog._database.read() as connection:
        connection.execute(t.setting.delete())


def test_a_look_up_finds_what_a_read_finds(catalog: Catalog) -> None:
    _, key = catalog.create_key(ANN, "admin")
    query = select(t.api_key).where(t.api_key.c.key_id == text(":key").bindparams(key="x"))
    with catalog._database.read() as connection:
        (row,) = connection.execute(query, {"key": key.key_id}).all()
    assert catalog._database.look_up(query, key.key_id) == tuple(row)
    assert catalog._database.look_up(query, "another") is None


def test_a_look_up_sees_the_write_before_it(catalog: Catalog) -> None:
    for _ in range(20):
        text_of_key, record = catalog.create_key(ANN, "read")
        assert catalog.authenticate(text_of_key).key_id == record.key_id


def test_a_read_is_one_view(catalog: Catalog) -> None:
    count = select(func.count()).select_from(t.session)
    with catalog._database.read() as connection:
        before = connection.execute(count).scalar()
        add_run(catalog)
        assert connection.execute(count).scalar() == before == 0


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE revision SET size_bytes = 1",
        "UPDATE revision SET ephemeral = TRUE",
        "UPDATE revision SET owner = 'x'",
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


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://host/db", "postgresql+psycopg2://h/db"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"sqlite:///path or postgresql://"):
        Database(url)


def test_a_refused_url_hides_its_password() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Database("mysql://ann:secret@host/db")
    assert "secret" not in caught.value.message


def test_text_and_numbers_that_no_database_can_hold_are_the_callers_fault(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        catalog.policy(ANN, "\ud800")
    with pytest.raises(InvalidRequest, match="64 bits"):
        catalog.sessions(ANN, offset=1 << 63)
    with pytest.raises(InvalidRequest, match="64 bits"):
        catalog.audit(ANN, before_id=1 << 63)
    assert catalog.sessions(ANN, offset=1 << 62) == []
    assert catalog.audit(ANN, before_id=(1 << 63) - 1) == []


def test_numbers_of_64_bits_come_back(catalog: Catalog) -> None:
    add_run(catalog)
    largest = (1 << 63) - 1
    catalog.touch_run(ANN, RUN, num_optim_steps=largest)
    assert catalog.run(ANN, RUN).num_optim_steps == largest
