"""The database of the catalogue: transactions, schema, errors. Knows no noun.

Writers take turns, also across processes, so that what a transaction reads and then writes is one
step; readers have connections of their own, which refuse to write. Every method of the catalogue is
one transaction on one of the two. Thread-safe. What differs between databases is in `sqlite.py` and
`postgres.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import Any, Protocol

from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Connection, Engine, Select, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError

from openmint.catalog.sqlite import Sqlite
from openmint.errors import InvalidRequest, OpenMintError

URLS = "use sqlite:///path or postgresql://user:password@host/database"


def now() -> datetime:
    return datetime.now(UTC)


class Server(Protocol):
    """What one kind of database does in its own way."""

    @property
    def driver_error(self) -> type[Exception]:
        """The base of its driver's errors."""

    @property
    def writer(self) -> Engine:
        """One connection, whose transactions begin by waiting for their turn."""

    @property
    def readers(self) -> Engine:
        """Connections whose transactions see one state and change nothing."""

    @property
    def lookups(self) -> Engine:
        """Connections that read outside of transactions, with parameters by position."""

    def start(self) -> None:
        """Called once, first. Raises InvalidRequest for a database that won't do."""

    def claim(self) -> None:
        """See `Database.claim`."""

    def after_write(self, connection: Connection) -> None:
        """Called after each write, before the next."""

    def own_error(self, cause: BaseException) -> OpenMintError:
        """What an error of the driver is to us."""

    def examine(self) -> tuple[str, list[str]]:
        """Its version, and what speaks against it. Makes and changes nothing."""

    def close(self) -> None:
        """Let go of all connections."""


class Database:
    """Transactions on one database, its schema brought up to date by the constructor."""

    def __init__(self, url: str) -> None:
        """Raises InvalidRequest for a URL or a database that can't be used, Overloaded when its
        server can't be reached, StoreFailed when the disk or the file fails."""
        self._server = server_of(url)
        self._write_lock = threading.Lock()
        self._prepared = cache(self._prepare)
        with own_errors(self._server):
            self._server.start()
        with self.write() as connection:
            migrate(connection)

    def close(self) -> None:
        """Wait for the write in progress, then let go of the database."""
        with self._write_lock:
            self._server.close()

    def claim(self) -> None:
        """Be the one service on this database, until it is closed or the process ends.

        Raises Conflict while another process is, a few seconds after it was asked.
        """
        with own_errors(self._server):
            self._server.claim()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view; sees every write that returned before."""
        with own_errors(self._server), self._server.readers.connect() as connection:
            yield connection

    def look_up(self, query: Select[Any], key: str) -> tuple[Any, ...] | None:
        """The row that a query of one parameter finds; sees what `read` would.

        In a fraction of its time, for what every request asks.
        """
        statement, readers = self._prepared(query)
        with own_errors(self._server), closing(self._server.lookups.raw_connection()) as connection:
            try:
                rows = connection.cursor().execute(statement, (key,)).fetchall()
            except self._server.driver_error:
                connection.invalidate()  # it may be lost
                raise
        if not rows:
            return None
        pairs = zip(rows[0], readers, strict=True)
        return tuple(value if read is None else read(value) for value, read in pairs)

    def _prepare(self, query: Select[Any]) -> tuple[str, Sequence[Callable[[Any], Any] | None]]:
        """The query in the driver's words, and what makes values of its columns ours."""
        dialect = self._server.lookups.dialect
        kinds = [column.type.dialect_impl(dialect) for column in query.selected_columns]
        readers = [kind.result_processor(dialect, None) for kind in kinds]
        return str(query.compile(dialect=dialect)), readers

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction, durable when the block ends, undone when it raises."""
        with (
            self._write_lock,
            own_errors(self._server),
            self._server.writer.connect() as connection,
        ):
            with connection.begin():
                yield connection
            self._server.after_write(connection)


@contextmanager
def own_errors(server: Server) -> Iterator[None]:
    """Raises InvalidRequest for text that is not Unicode and for integers above 64 bits, and what
    the server makes of its driver's errors."""
    try:
        yield
    except UnicodeEncodeError:
        raise InvalidRequest("a text holds half a surrogate pair; send valid Unicode") from None
    except OverflowError:
        raise InvalidRequest("a number does not fit 64 bits; send a smaller one") from None
    except IntegrityError:
        raise
    except DBAPIError as error:
        raise server.own_error(error.orig or error) from error
    except server.driver_error as error:
        raise server.own_error(error) from error


def examine(url: str) -> tuple[str, list[str]]:
    """The database's version, and what speaks against it; makes and changes nothing.

    Raises as `Database` does.
    """
    server = server_of(url)
    try:
        with own_errors(server):
            return server.examine()
    finally:
        server.close()


def shown(url: str) -> str:
    """The URL without its password. Raises InvalidRequest for what is no URL."""
    return _parsed(url).render_as_string()


def server_of(url: str) -> Server:
    """Not yet connected to. Raises InvalidRequest for a URL of another database."""
    parsed = _parsed(url)
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        return Sqlite(parsed)
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        return _postgres(parsed)
    raise InvalidRequest(f"database_url {parsed.render_as_string()!r} is not supported; {URLS}")


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except ArgumentError:
        raise InvalidRequest(f"database_url is not a URL; {URLS}") from None


def _postgres(url: URL) -> Server:
    try:
        from openmint.catalog.postgres import Postgres
    except ImportError as error:
        raise InvalidRequest(
            f"database_url names PostgreSQL, whose driver can't be loaded ({error}); "
            "pip install 'openmint[postgres]'"
        ) from None
    return Postgres(url)


def insert_into(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """An insert that may say what happens on a conflict, in the connection's dialect."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def migrate(connection: Connection, to: str = "head") -> None:
    """Bring the schema up to date inside the caller's transaction; a no-op when it is."""
    config = Config()
    config.set_main_option("script_location", "openmint.catalog:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, to)
