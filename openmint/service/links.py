"""Signed links: a path that anyone may fetch without a key until it expires."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

from openmint.errors import NotFound

LINK_SECONDS = 3600.0


class Links:
    """Signs and checks links. The secret dies with the process, and so do its links."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def sign(self, subject: str) -> tuple[str, float]:
        """A token that stands for `subject`, and the Unix time at which it expires."""
        expires = int(time.time() + LINK_SECONDS)
        return f"{expires}-{self._signature(subject, expires)}", float(expires)

    def check(self, subject: str, token: str) -> None:
        """Raises NotFound unless `token` was signed for `subject` and has not expired."""
        expires_text, _, signature = token.partition("-")
        if not (expires_text.isascii() and expires_text.isdigit() and len(expires_text) < 16):
            raise NotFound("no such link")
        expires = int(expires_text)
        wanted = self._signature(subject, expires)
        if not hmac.compare_digest(signature.encode(), wanted.encode()):
            raise NotFound("no such link")
        if expires < time.time():
            raise NotFound("this link has expired; ask for a new one")

    def _signature(self, subject: str, expires: int) -> str:
        message = f"{expires}\n{subject}".encode()
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()
