"""API keys. A key's text is shown once; the table holds a keyed hash of its secret."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import datetime

from sqlalchemy import Connection, bindparam, exists, select, update

from openmint.catalog import tables as t
from openmint.catalog.audit import note_event
from openmint.catalog.database import Database, now
from openmint.catalog.records import ROLES, ApiKey, Principal, Role
from openmint.catalog.rows import KEYS, many
from openmint.errors import InvalidRequest, NotFound, Unauthenticated
from openmint.types import Tenant

PREFIX = "tml-om"
MAX_KEY_CHARS = 200
PEPPER = "key_pepper"
USABLE_KEY = select(
    t.api_key.c.tenant, t.api_key.c.role, t.api_key.c.secret_hash, t.api_key.c.expires_at
).where(t.api_key.c.key_id == bindparam("key"), t.api_key.c.revoked_at.is_(None))


class KeyRecords:
    """The keys of every tenant."""

    _database: Database
    _pepper: bytes

    def create_key(
        self,
        tenant: Tenant,
        role: Role,
        *,
        note: str = "",
        expires_at: datetime | None = None,
        actor: str = "operator",
    ) -> tuple[str, ApiKey]:
        """The new key's text, which nothing can show again, and its record. Durable on return."""
        if role not in ROLES:
            raise InvalidRequest(f"role {role!r} is unknown; use one of {', '.join(ROLES)}")
        key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        record = ApiKey(key_id, tenant, role, note, now(), expires_at, None)
        with self._database.write() as connection:
            connection.execute(
                t.api_key.insert().values(
                    key_id=key_id,
                    tenant=tenant,
                    role=role,
                    note=note,
                    secret_hash=self._hash(secret),
                    created_at=record.created_at,
                    expires_at=expires_at,
                )
            )
            note_event(connection, tenant, actor, "key.create", key_id, {"role": role})
        return f"{PREFIX}_{key_id}_{secret}", record

    def authenticate(self, key_text: str) -> Principal:
        """Whose key it is. Raises Unauthenticated, in the same words for every bad key."""
        prefix, _, rest = key_text[:MAX_KEY_CHARS].partition("_")
        key_id, _, secret = rest.partition("_")
        row = self._database.look_up(USABLE_KEY, key_id)
        tenant, role, wanted, expires_at = row or ("", "read", bytes(32), None)
        # An unknown id costs the same hash and comparison as a wrong secret.
        matches = hmac.compare_digest(wanted, self._hash(secret))
        if not (prefix == PREFIX and matches and row and _unexpired(expires_at)):
            raise Unauthenticated("this API key is unknown, revoked or expired")
        return Principal(tenant, role, key_id)

    def keys(self, tenant: Tenant | None = None) -> list[ApiKey]:
        """The tenant's keys, or every tenant's, oldest first, revoked ones included."""
        query = KEYS.order_by(t.api_key.c.created_at, t.api_key.c.key_id)
        if tenant is not None:
            query = query.where(t.api_key.c.tenant == tenant)
        with self._database.read() as connection:
            return many(connection, ApiKey, query)

    def revoke_key(self, tenant: Tenant, key_id: str, *, actor: str = "operator") -> None:
        """Refuse the key from now on; revoking again changes nothing. Raises NotFound."""
        owned = (t.api_key.c.tenant == tenant) & (t.api_key.c.key_id == key_id)
        with self._database.write() as connection:
            row = connection.execute(select(t.api_key.c.revoked_at).where(owned)).first()
            if row is None:
                raise NotFound(f"no key {key_id[:80]!r}")
            if row.revoked_at is None:
                connection.execute(update(t.api_key).where(owned).values(revoked_at=now()))
                note_event(connection, tenant, actor, "key.revoke", key_id)

    def has_keys(self) -> bool:
        """Whether some key would be accepted now."""
        live = t.api_key.c.expires_at.is_(None) | (t.api_key.c.expires_at > now())
        query = select(exists().where(t.api_key.c.revoked_at.is_(None), live))
        with self._database.read() as connection:
            return bool(connection.execute(query).scalar_one())

    def _hash(self, secret: str) -> bytes:
        data = secret.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(data, key=self._pepper, digest_size=32).digest()


def load_pepper(connection: Connection) -> bytes:
    """The hash key of this database, made on first use."""
    found = connection.execute(select(t.setting.c.value).where(t.setting.c.name == PEPPER)).scalar()
    if found is not None:
        return bytes(found)
    pepper = secrets.token_bytes(64)
    connection.execute(t.setting.insert().values(name=PEPPER, value=pepper))
    return pepper


def _unexpired(expires_at: datetime | None) -> bool:
    """Whether a key that may end is still good."""
    return expires_at is None or expires_at > now()
