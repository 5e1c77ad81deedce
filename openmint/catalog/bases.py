"""What is known of the bases of this data folder before they are resident again."""

from __future__ import annotations

from sqlalchemy import delete, select

from openmint.catalog import tables as t
from openmint.catalog.database import Database

PREFIX = "base:"


class BaseRecords:
    """A description of each base, in the service's bytes, under what the settings call it."""

    _database: Database

    def known_base(self, name: str) -> bytes | None:
        query = select(t.setting.c.value).where(t.setting.c.name == PREFIX + name)
        with self._database.read() as connection:
            found = connection.execute(query).scalar()
        return None if found is None else bytes(found)

    def remember_base(self, name: str, description: bytes) -> None:
        with self._database.write() as connection:
            connection.execute(delete(t.setting).where(t.setting.c.name == PREFIX + name))
            connection.execute(t.setting.insert().values(name=PREFIX + name, value=description))
