"""The data folder as commands see it: its catalogue, its lock, its first key."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openmint.catalog.catalog import Catalog
from openmint.catalog.database import shown
from openmint.config import Settings
from openmint.errors import Conflict, InvalidRequest, ServiceError

ADMIN_KEY_FILE, DATABASE_FILE = "admin.key", "openmint.db"


def catalog_url(settings: Settings) -> str:
    """The configured database, else SQLite inside the data folder."""
    return settings.database_url or f"sqlite:///{settings.data.resolve() / DATABASE_FILE}"


@contextmanager
def opened_catalog(settings: Settings, *, create: bool) -> Iterator[Catalog]:
    """The catalogue of a data folder; beside a running server too, as writers take turns.

    Raises InvalidRequest when there is no such folder and `create` is False, ServiceError that
    names the database when it is away, and as `Catalog.open`.
    """
    data = settings.data
    if not (create or settings.database_url or (data / DATABASE_FILE).is_file()):
        raise InvalidRequest(f"{data} holds no {DATABASE_FILE}; give --data, or start a server")
    data.mkdir(parents=True, exist_ok=True)
    catalog = _open_catalog(settings)
    try:
        yield catalog
    finally:
        catalog.close()


def _open_catalog(settings: Settings) -> Catalog:
    try:
        return Catalog.open(catalog_url(settings))
    except ServiceError as error:
        if not settings.database_url:
            raise
        raise ServiceError(
            f"can't open the catalogue at {shown(settings.database_url)}: {error.message}, or "
            "correct database_url"
        ) from None


def locked_for_server(data: Path) -> int:
    """An open file that holds the folder for one server, until it and its copies in other processes
    are closed. Raises Conflict while another server holds it."""
    data.mkdir(parents=True, exist_ok=True)
    file = os.open(data / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise Conflict(
            f"another server uses {data}; stop it, or give this one a --data of its own"
        ) from None
    return file


def write_admin_key(data: Path, key: str) -> Path:
    """Put the first key where only this user reads it; returns the file."""
    path = data / ADMIN_KEY_FILE
    part = path.with_suffix(".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(key + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    return path
