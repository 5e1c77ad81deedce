"""Futures: handles on results that are still being computed. In memory, on the event loop.

A future is found by its `request_id`, or by the key under which it was opened, so that a retried
request gets the first one's future. A finished future is kept for a while and then forgotten.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from openmint.errors import BodyMismatch, EngineFailed, Gone, NotFound, OpenMintError
from openmint.types import Tenant

log = structlog.get_logger(__name__)

Key = tuple[object, ...]
SAMPLE = "sample-"
"""How ids of samples begin. A process that knows nothing else of one knows that it can be repeated;
the Tinker SDK does so by itself when it hears 410."""


@dataclass(eq=False, slots=True)
class ResultFuture:
    """One pending or finished result. `done` is set exactly once, with `result` or `error`."""

    request_id: str
    tenant: Tenant
    kind: str
    key: Key
    fingerprint: bytes
    done: asyncio.Event = field(default_factory=asyncio.Event)
    result: object = None
    error: OpenMintError | None = None
    opened_at_seconds: float = field(default_factory=time.monotonic)
    finished_at_seconds: float = 0.0
    task: asyncio.Task[None] | None = None
    accepting: asyncio.Task[None] | None = None
    """Writes the request down, for those that outlive the process."""
    holdup: Callable[[], str | None] = lambda: None
    """Says what it waits for, beyond its turn."""
    encoded: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def resolve(self, result: object) -> None:
        if not self.done.is_set():
            self.result, self.finished_at_seconds = result, time.monotonic()
            self.done.set()

    def fail(self, error: OpenMintError) -> None:
        if not self.done.is_set():
            self.error, self.finished_at_seconds = error, time.monotonic()
            self.done.set()

    async def accepted(self) -> None:
        """Wait until the request is written down. Raises what kept it from being."""
        if self.accepting is not None:
            await asyncio.shield(self.accepting)

    async def settle(self, work: Awaitable[object]) -> None:
        """Wait for `work` and take its outcome; nothing is left pending, whatever happens."""
        try:
            self.take(*await outcome_of(work, self))
        except asyncio.CancelledError:
            self.fail(Gone("given up: its client cancelled it, or its session ended"))
            raise

    def take(self, result: object, error: OpenMintError | None) -> None:
        if error is None:
            self.resolve(result)
        else:
            self.fail(error)


async def outcome_of(
    work: Awaitable[object], future: ResultFuture
) -> tuple[object, OpenMintError | None]:
    """The result of the future's work, or its error; what isn't one of ours is logged whole."""
    try:
        return await work, None
    except OpenMintError as error:
        return None, error
    except Exception as error:
        log.error("request_failed", request_id=future.request_id, kind=future.kind, exc_info=error)
        return None, EngineFailed(f"unexpected failure; report it with {future.request_id}")


class Futures:
    """Every future of this gateway."""

    def __init__(self, ttl_seconds: float) -> None:
        self._ttl_seconds = ttl_seconds
        self._by_id: dict[str, ResultFuture] = {}
        self._by_key: dict[Key, ResultFuture] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def num_pending(self) -> int:
        return sum(not future.done.is_set() for future in self._by_id.values())

    def existing(self, key: Key, fingerprint: bytes) -> ResultFuture | None:
        """The future opened earlier under `key`. Raises BodyMismatch if that request differed."""
        future = self._by_key.get(key)
        if future and future.fingerprint != fingerprint:
            name = "/".join(str(part) for part in key[1:])
            raise BodyMismatch(
                f"{name} was already used by a different {future.kind} request; "
                "a retry must repeat the body, a new request needs a new seq_id"
            )
        return future

    def has(self, key: Key) -> bool:
        return key in self._by_key

    def open(self, tenant: Tenant, kind: str, key: Key, fingerprint: bytes) -> ResultFuture:
        """A new pending future; the caller has seen that there is none under `key`."""
        request_id = f"{SAMPLE if kind == 'sample' else 'req-'}{secrets.token_hex(12)}"
        return self.add(ResultFuture(request_id, tenant, kind, key, fingerprint))

    def add(self, future: ResultFuture) -> ResultFuture:
        """Have this future be found, one of an earlier process too."""
        self._by_id[future.request_id] = self._by_key[future.key] = future
        return future

    def get(self, tenant: Tenant, request_id: str) -> ResultFuture:
        """The tenant's future. Raises NotFound when it is unknown, forgotten or another's.

        For a sample it is Gone instead: it may be of an earlier process, and clients ask anew.
        """
        future = self._by_id.get(request_id)
        if future is None or future.tenant != tenant:
            if request_id.startswith(SAMPLE):
                raise Gone(f"the result of {request_id[:80]!r} is not here any more; sample again")
            raise NotFound(
                f"no request {request_id[:80]!r}; results are kept for "
                f"{self._ttl_seconds:g} s after they are ready"
            )
        return future

    async def wait(self, future: ResultFuture, timeout_seconds: float) -> bool:
        """Whether the future finished within the time."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await future.done.wait()
        except TimeoutError:
            return False
        return True

    def forget(self, future: ResultFuture) -> None:
        self._by_id.pop(future.request_id, None)
        self._by_key.pop(future.key, None)

    def sweep(self, now_seconds: float) -> list[ResultFuture]:
        """Forget what finished more than the time to live ago; returns the forgotten."""
        oldest = now_seconds - self._ttl_seconds
        old = [
            f for f in self._by_id.values() if f.done.is_set() and f.finished_at_seconds < oldest
        ]
        for future in old:
            self.forget(future)
        return old

    def trace(self, session_id: str) -> bytes:
        """The timeline of a session's remembered requests, as Chrome trace events in JSON."""
        events = []
        for future in self._by_id.values():
            owner = str(future.key[1])
            if not owner.startswith(f"{session_id}:"):
                continue
            end = future.finished_at_seconds or time.monotonic()
            events.append(
                {
                    "name": future.kind,
                    "ph": "X",
                    "ts": future.opened_at_seconds * 1e6,
                    "dur": (end - future.opened_at_seconds) * 1e6,
                    "pid": session_id,
                    "tid": owner,
                    "args": {"request_id": future.request_id, "key": str(future.key[-1])},
                }
            )
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode()
