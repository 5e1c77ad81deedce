"""The catalogue in a PostgreSQL database, whose server may be shared by several gateways.

The module needs psycopg, an optional dependency; `database.py` imports it when a URL asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError

from openmint.errors import Conflict, InvalidRequest, OpenMintError, Overloaded, StoreFailed

WRITE_LOCK = 0x6F70656E6D696E74
"""Advisory lock of the one who writes ("openmint" in ASCII)."""
SERVICE_LOCK = WRITE_LOCK + 1
"""Of the one service on this database."""
SESSION = {
    "timezone": "UTC",
    "synchronous_commit": "on",
    "lock_timeout": "5s",
    # A writer whose machine was cut off must not keep the others from writing for long.
    "idle_in_transaction_session_timeout": "60s",
    # Nor must it keep a claim: that the machine is gone is noticed within a minute.
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}
PLANS = {
    # Each query of the catalogue has an index that it walks, and stops after a page. Left to its
    # counts the planner joins, sorts or reads whole tables instead: before it has counted what an
    # import brought, or because all of an owner's revisions are one tenant's.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_sort": "off",
    "max_parallel_workers_per_gather": "0",
    # Up to version 17 what is off counts as so dear that a query would first be compiled.
    "jit": "off",
}
"""Such plans are not forbidden, only never preferred."""
WRITES = {
    # What is read after the lock was got must be what its last holder wrote, not what was there
    # when the transaction began to wait for it.
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
}
READS = {
    "default_transaction_isolation": "repeatable read",
    "default_transaction_read_only": "on",
}
REACH = {
    # Reads hold the event loop, so a server that vanished is soon noticed.
    "connect_timeout": "3",
    "keepalives_idle": "10",
    "keepalives_interval": "3",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
"""Of the connection, in libpq's words; what the URL says goes before them."""
LOCKED = frozenset({"40001", "40P01", "55P03"})
"""Serialization failure, deadlock, lock timeout."""
LOST = frozenset({"25P03", "53300", "57014"})
"""Idle transaction ended, too many connections, query cancelled. Classes 08 and 57P mean it too."""
OUT_OF_RANGE = "22003"
DURABLE = ("fsync", "full_page_writes")


class Postgres:
    """Engines on one database. Writers hold an advisory lock, so they take turns also across
    processes and machines."""

    driver_error: type[Exception] = psycopg.Error

    def __init__(self, url: URL) -> None:
        url = url.set(drivername="postgresql+psycopg", query={**REACH, **url.query})
        self.writer = _writer(url)
        self.readers = _engine(url, READS, pool_size=8, max_overflow=56)
        self.lookups = _engine(url, READS, isolation_level="AUTOCOMMIT", paramstyle="format")
        self._claim: Connection | None = None

    def start(self) -> None:
        """Raises InvalidRequest for a database that can't hold all of Unicode."""
        with self.readers.connect() as connection:
            encoding = _shown(connection, "server_encoding")
        if encoding != "UTF8":
            raise InvalidRequest(
                f"the database's encoding is {encoding}; create it with ENCODING 'UTF8'"
            )

    def claim(self) -> None:
        """See `Server`. A connection holds the claim; should it be lost, so is the claim."""
        self._claim = self.lookups.connect()
        try:
            self._claim.exec_driver_sql(f"SELECT pg_advisory_lock({SERVICE_LOCK})")
        except DBAPIError as error:
            self._claim.close()
            if getattr(error.orig, "sqlstate", None) in LOCKED:
                raise Conflict(
                    "another server uses this database; stop it, or give this one its own"
                ) from None
            raise

    def after_write(self, connection: Connection) -> None:
        pass

    def examine(self) -> tuple[str, list[str]]:
        """See `Server`. Raises as `start` does."""
        self.start()
        with self.readers.connect() as connection:
            version = _shown(connection, "server_version")
            off = [name for name in DURABLE if _shown(connection, name) == "off"]
        doubts = [
            f"{name} is off: a power cut may damage all that was acknowledged" for name in off
        ]
        return f"PostgreSQL {version}", doubts

    def close(self) -> None:
        if self._claim is not None:
            self._claim.close()
        for engine in (self.lookups, self.readers, self.writer):
            engine.dispose()

    def own_error(self, cause: BaseException) -> OpenMintError:
        """InvalidRequest for values that PostgreSQL has no place for, Overloaded for locks and lost
        connections, which a retry may mend, else StoreFailed."""
        state = getattr(cause, "sqlstate", None) or ""
        if state == OUT_OF_RANGE:
            return InvalidRequest("a number does not fit 64 bits; send a smaller one")
        if isinstance(cause, psycopg.DataError):
            return InvalidRequest(f"PostgreSQL has no place for a value: {_said(cause)}")
        if state in LOCKED:
            return Overloaded("another process is writing to the catalogue; retry")
        if state in LOST or state.startswith(("08", "57P")) or _is_disconnect(cause, state):
            return Overloaded(f"the catalogue's database can't be reached: {_said(cause)}; retry")
        return StoreFailed(f"the catalogue's database failed: {_said(cause)}")


def _shown(connection: Connection, setting: str) -> str:
    return str(connection.exec_driver_sql(f"SHOW {setting}").scalar_one())


def _is_disconnect(cause: BaseException, state: str) -> bool:
    """Whether the driver alone noticed: such an error has no state of the server's."""
    return not state and isinstance(cause, psycopg.OperationalError | psycopg.InterfaceError)


def _said(cause: BaseException) -> str:
    """Without the details, which may quote a row."""
    message = cause.diag.message_primary if isinstance(cause, psycopg.Error) else None
    return message or str(cause)


def _writer(url: URL) -> Engine:
    engine = _engine(url, WRITES, pool_size=1, max_overflow=0)

    @event.listens_for(engine, "begin")
    def take_turn(connection: Connection) -> None:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITE_LOCK})")

    return engine


def _engine(url: URL, session: Mapping[str, str], **options: Any) -> Engine:
    engine = create_engine(url, **options)
    settings = {**SESSION, **PLANS, **session}
    setting = ";".join(f"SET {name} = '{value}'" for name, value in settings.items())

    @event.listens_for(engine, "connect")
    def prepare(driver: psycopg.Connection[Any], _record: object) -> None:
        driver.execute(setting)
        driver.commit()

    return engine
