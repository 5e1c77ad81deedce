"""The database file: connections, transactions, schema. Knows no noun.

Writers share one connection behind a lock and begin IMMEDIATE; readers have their own, which refuse
to write. Every method of the catalogue is one transaction on one of the two. Thread-safe.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError
from sqlalchemy.pool import NullPool, QueuePool

from openmint.errors import InvalidRequest, Overloaded, StoreFailed

WRITES_PER_WAL_CHECKPOINT = 256
WAL_SECONDS, WAL_RETRY_SECONDS = 5.0, 0.01
PRAGMAS = (
    "synchronous=FULL",
    "busy_timeout=5000",
    "foreign_keys=ON",
    "cache_size=-16384",
    "mmap_size=0",
    # SQLite before 3.51.3 may corrupt the log when one connection checkpoints while another
    # writes. So none does by itself: a catalogue does, between writes of its own (`_maintain`), and
    # a short-lived second process never writes enough to.
    "wal_autocheckpoint=0",
)


def now() -> datetime:
    return datetime.now(UTC)


class Database:
    """Transactions on one SQLite file, its schema brought up to date by the constructor."""

    def __init__(self, url: str) -> None:
        """Raises InvalidRequest for a URL that is not of an SQLite file."""
        try:
            parsed = make_url(url)
        except ArgumentError:
            raise InvalidRequest("database_url is not a URL; use sqlite:///path") from None
        if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
            raise InvalidRequest(
                f"database_url {parsed.render_as_string()!r} is not supported; use sqlite:///path"
            )
        with _own_errors():
            _use_wal(url)
        self._write_lock = threading.Lock()
        self._num_writes = 0
        self._writer = _engine(url, readonly=False)
        self._readers = _engine(url, readonly=True)
        with self.write() as connection:
            migrate(connection)

    def close(self) -> None:
        """Wait for the write in progress, then let go of the file."""
        with self._write_lock:
            self._readers.dispose()
            self._writer.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view; sees every write that returned before."""
        with _own_errors(), self._readers.connect() as connection:
            yield connection

    def look_up(self, query: str, key: str) -> tuple[Any, ...] | None:
        """The row that a query finds under a key, as SQLite holds it; sees what `read` would.

        In a tenth of its time, for what every request asks.
        """
        with _own_errors(), closing(self._readers.raw_connection()) as connection:
            rows = connection.cursor().execute(query, (key,)).fetchall()
        return rows[0] if rows else None

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction, durable when the block ends, undone when it raises."""
        with self._write_lock, _own_errors(), self._writer.connect() as connection:
            with connection.begin():
                yield connection
            self._maintain(connection)

    def _maintain(self, connection: Connection) -> None:
        self._num_writes += 1
        if self._num_writes % WRITES_PER_WAL_CHECKPOINT == 0:
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.execute("PRAGMA wal_checkpoint(PASSIVE)").close()
            connection.rollback()


def _use_wal(url: str) -> None:
    """Have the file, which may be new, keep a write-ahead log, as it then always will.

    Of two processes that switch at once one fails at once, whatever its timeout; so it tries again.
    """
    engine = create_engine(url, poolclass=NullPool)
    deadline = time.monotonic() + WAL_SECONDS
    while True:
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            return
        except DatabaseError as error:
            if not _is_busy(error) or time.monotonic() > deadline:
                raise
        time.sleep(WAL_RETRY_SECONDS)


def _is_busy(error: DatabaseError | sqlite3.DatabaseError) -> bool:
    code: int = getattr(getattr(error, "orig", error), "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_BUSY  # the rest tells variants apart


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raises InvalidRequest for text that is not Unicode and for integers above 64 bits, Overloaded
    when another process holds the write lock, StoreFailed when the disk or the file fails."""
    try:
        yield
    except UnicodeEncodeError:
        raise InvalidRequest("a text holds half a surrogate pair; send valid Unicode") from None
    except OverflowError:
        raise InvalidRequest("a number does not fit 64 bits; send a smaller one") from None
    except IntegrityError:
        raise
    except (DatabaseError, sqlite3.DatabaseError) as error:
        if _is_busy(error):
            raise Overloaded("another process is writing to the catalogue; retry") from error
        cause = getattr(error, "orig", error)
        raise StoreFailed(f"the catalogue's database failed: {cause}") from error


def _engine(url: str, *, readonly: bool) -> Engine:
    size = {"pool_size": 8, "max_overflow": 56} if readonly else {"pool_size": 1, "max_overflow": 0}
    engine = create_engine(url, poolclass=QueuePool, **size)
    begin = "BEGIN" if readonly else "BEGIN IMMEDIATE"

    @event.listens_for(engine, "connect")
    def prepare(driver: Any, _record: object) -> None:
        driver.isolation_level = None  # the driver's own BEGIN would be a deferred one
        for pragma in (*PRAGMAS, f"query_only={int(readonly)}"):
            driver.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def migrate(connection: Connection) -> None:
    """Bring the schema up to date inside the caller's transaction; a no-op when it is."""
    config = Config()
    config.set_main_option("script_location", "openmint.catalog:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
