"""Types of columns that mean the same in both databases."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeEngine

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
"""In the order of its UTF-8 bytes, whatever the database's locale."""
INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers only an INTEGER key
JSON = sa.JSON().with_variant(JSONB(), "postgresql")
NULLABLE_JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


class Instant(sa.TypeDecorator[datetime]):
    """An aware UTC datetime. SQLite holds epoch seconds: order and arithmetic stay plain."""

    impl = sa.Float
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(sa.DateTime(timezone=True))
        return dialect.type_descriptor(sa.Float())

    def process_bind_param(
        self, value: datetime | None, dialect: sa.Dialect
    ) -> float | datetime | None:
        if value is None or dialect.name == "postgresql":
            return value
        return value.timestamp()

    def process_result_value(
        self, value: float | datetime | None, dialect: sa.Dialect
    ) -> datetime | None:
        if isinstance(value, float):
            return datetime.fromtimestamp(value, UTC)
        return value and value.astimezone(UTC)
