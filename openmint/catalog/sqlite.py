"""The catalogue in an SQLite file: one connection that writes, others that read."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool, QueuePool

from openmint.errors import InvalidRequest, OpenMintError, Overloaded, StoreFailed

FIXED_VERSION = (3, 51, 3)
RACE = (
    "before 3.51.3 a checkpoint beside a write of another process can damage the log. OpenMinT "
    "keeps to one writer and checkpoints there; don't open its database for writing with other "
    "tools while it runs"
)
WRITES_PER_WAL_CHECKPOINT = 256
WAL_SECONDS, WAL_RETRY_SECONDS = 5.0, 0.01
PRAGMAS = (
    "synchronous=FULL",
    "busy_timeout=5000",
    "foreign_keys=ON",
    "cache_size=-32768",  # inner pages of a million revisions' indexes fit; with half, p99 was 1.6x
    "mmap_size=0",
    # SQLite before 3.51.3 may corrupt the log when one connection checkpoints while another
    # writes. So none does by itself: a catalogue does, between writes of its own (`after_write`),
    # and a short-lived second process never writes enough to.
    "wal_autocheckpoint=0",
)


class Sqlite:
    """Engines on one file. Writers begin IMMEDIATE, so they take turns also across processes."""

    driver_error: type[Exception] = sqlite3.Error

    def __init__(self, url: URL) -> None:
        """Raises InvalidRequest for a URL without a file."""
        if url.database in (None, "", ":memory:"):
            raise InvalidRequest(
                f"database_url {url.render_as_string()!r} names no file; use sqlite:///path"
            )
        self._url = url
        self._num_writes = 0
        self.writer = _engine(url, readonly=False)
        self.readers = self.lookups = _engine(url, readonly=True)

    def start(self) -> None:
        """Have the file, which may be new, keep a write-ahead log, as it then always will.

        Of two processes that switch at once one fails at once, whatever its timeout; so it tries
        again.
        """
        engine = create_engine(self._url, poolclass=NullPool)
        deadline = time.monotonic() + WAL_SECONDS
        while True:
            try:
                with engine.connect() as connection:
                    connection.exec_driver_sql("PRAGMA journal_mode=WAL")
                return
            except DatabaseError as error:
                if not _is_busy(error.orig) or time.monotonic() > deadline:
                    raise
            time.sleep(WAL_RETRY_SECONDS)

    def claim(self) -> None:
        """See `Server`. The lock of the data folder sees to it."""

    def after_write(self, connection: Connection) -> None:
        self._num_writes += 1
        if self._num_writes % WRITES_PER_WAL_CHECKPOINT == 0:
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.execute("PRAGMA wal_checkpoint(PASSIVE)").close()
            connection.rollback()

    def examine(self) -> tuple[str, list[str]]:
        """See `Server`."""
        doubts = [] if sqlite3.sqlite_version_info >= FIXED_VERSION else [RACE]
        return f"SQLite {sqlite3.sqlite_version}", doubts

    def close(self) -> None:
        self.readers.dispose()
        self.writer.dispose()

    def own_error(self, cause: BaseException) -> OpenMintError:
        """Overloaded when another process holds the write lock, else StoreFailed."""
        if _is_busy(cause):
            return Overloaded("another process is writing to the catalogue; retry")
        return StoreFailed(f"the catalogue's database failed: {cause}")


def _is_busy(cause: BaseException | None) -> bool:
    code: int = getattr(cause, "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_BUSY  # the rest tells variants apart


def _engine(url: URL, *, readonly: bool) -> Engine:
    size = {"pool_size": 8, "max_overflow": 56} if readonly else {"pool_size": 1, "max_overflow": 0}
    # The last one that was used: its cache is warm, and those of the others stay small.
    engine = create_engine(url, poolclass=QueuePool, pool_use_lifo=True, **size)
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
