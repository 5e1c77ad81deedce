"""Pure ASGI middleware around the application: limits that must hold before a body is read whole.

It gives each request its id, refuses oversized heads and bodies while they stream, ambiguous Host
headers and deeply nested JSON, answers what escaped every handler, and writes the access log.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openmint.api.errors import HeadTooLarge, error_response, status_of
from openmint.config import ServiceConfig
from openmint.errors import InvalidRequest, OpenMintError, TooLarge

log = structlog.get_logger("openmint.access")

DISCARD_SECONDS = 5.0
"""How long the rest of a refused body is read and dropped."""
_QUIET = frozenset({"/healthz", "/readyz", "/metrics", "/api/v1/healthz"})


class Guard:
    """Wraps the application; holds no state of its own but the limits."""

    def __init__(self, app: ASGIApp, limits: ServiceConfig) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"r-{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id
        exchange = Exchange(scope, send, request_id)
        try:
            self._check_head(scope)
            body = await self._read_body(scope, receive)
            await self._app(scope, _replay(body, receive), exchange.send)
        except OpenMintError as error:
            await exchange.answer(error)
        except Exception as error:
            await exchange.answer_unexpected(error)
        finally:
            exchange.write_log()

    def _check_head(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        head_bytes = sum(len(name) + len(value) + 4 for name, value in headers)
        head_bytes += len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        limit = self._limits.max_header_bytes
        if head_bytes > limit:
            raise HeadTooLarge(f"the request head has {head_bytes} bytes; the limit is {limit}")
        hosts = sum(name == b"host" for name, _ in headers)
        if hosts != 1:
            raise InvalidRequest(f"send exactly one Host header, got {hosts}")

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._limits.max_body_bytes
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            await _discard(receive, limit)
            raise _body_too_large(limit)
        parts: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise InvalidRequest("the client left before the body was complete")
            parts.append(message.get("body", b""))
            num_bytes += len(parts[-1])
            if num_bytes > limit:
                parts.clear()
                await _discard(receive, limit)
                raise _body_too_large(limit)
            if not message.get("more_body"):
                break
        return b"".join(parts)


class Exchange:
    """One request's answer: adds the request id to it and remembers what to log."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self._scope, self._send, self._request_id = scope, send, request_id
        self._started_at = time.monotonic()
        self._status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers: list[Any] = message.setdefault("headers", [])
            if not any(name.lower() == b"x-request-id" for name, _ in headers):
                headers.append((b"x-request-id", self._request_id.encode()))
        await self._send(message)

    async def answer(self, error: OpenMintError) -> None:
        path = self._scope["path"]
        status = status_of(error, path)
        response = error_response(path, status, error.code, error.message, self._request_id)
        response.headers["Connection"] = "close"
        await response(self._scope, _nothing, self.send)

    async def answer_unexpected(self, error: Exception) -> None:
        """An answer that only names the request id, unless an answer has already begun."""
        if not self._status:
            log.error("unexpected_error", request_id=self._request_id, exc_info=error)
            message = f"unexpected failure; report it with request id {self._request_id}"
            await self.answer(OpenMintError(message))

    def write_log(self) -> None:
        path = self._scope["path"]
        write = log.debug if path in _QUIET else log.info
        write(
            "request",
            request_id=self._request_id,
            method=self._scope["method"],
            path=path,
            status=self._status,
            seconds=round(time.monotonic() - self._started_at, 4),
            **self._scope["state"].get("log_fields", {}),
        )


def _body_too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes; send less data in one request")


async def _discard(receive: Receive, limit_bytes: int) -> None:
    """Read on without keeping, for a while: a client that is cut off while it sends often loses
    the answer too."""
    left_bytes = limit_bytes
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while left_bytes > 0:
                message = await receive()
                left_bytes -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
    except TimeoutError:
        return


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out the body once, and then what the server says (disconnects)."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
