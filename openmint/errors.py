"""Everything that can go wrong, as one tree. HTTP status codes live in `api/errors.py` alone.

OpenMintError
├── RequestError            the caller must change something; the same request fails again
│   ├── InvalidRequest      malformed or out of range
│   │   └── NonFinite       the numbers asked for overflow
│   ├── Unauthenticated     no key, unknown key, expired key
│   ├── Forbidden           the key's role does not allow this
│   ├── NotFound            no such thing, or another tenant's
│   ├── Conflict            the thing exists, or changed since the caller read it
│   │   └── GateFailed      a revision does not pass the gates of an alias
│   ├── BodyMismatch        a retried request differs from the first one
│   ├── Gone                it existed and was deleted or expired
│   ├── TooLarge            over a size limit
│   └── UnsupportedFormat   e.g. a pickle where safetensors is wanted
└── ServiceError            our side; the caller may retry
    ├── Overloaded          no room now; `retry_after_seconds` says when to come back
    │   └── LimitReached    the tenant's own limit, not the machine's
    ├── StoreFailed         bytes could not be read or written, or do not match their digest
    └── EngineFailed        the worker died or a step failed
        └── WorkerLost      it died; what a run asked of it is sent to its successor
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class OpenMintError(Exception):
    """Base of the tree. The message names the thing, the limit and the remedy."""

    code = "error"
    retryable = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[type[OpenMintError], tuple[str]]:
        return type(self), (self.message,)


class RequestError(OpenMintError):
    code = "request_error"


class InvalidRequest(RequestError):
    code = "invalid_request"


class NonFinite(InvalidRequest):
    code = "non_finite"


class Unauthenticated(RequestError):
    code = "unauthenticated"


class Forbidden(RequestError):
    code = "forbidden"


class NotFound(RequestError):
    code = "not_found"


class Conflict(RequestError):
    code = "conflict"


class GateFailed(Conflict):
    """`failures` has an entry for each gate: what it wanted, what it found, what to run."""

    code = "gate_failed"

    def __init__(self, message: str, failures: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(message)
        self.failures = failures

    def __reduce__(self) -> tuple[type[OpenMintError], tuple[Any, ...]]:
        return type(self), (self.message, self.failures)


class BodyMismatch(RequestError):
    code = "body_mismatch"


class Gone(RequestError):
    code = "gone"


class TooLarge(RequestError):
    code = "too_large"


class UnsupportedFormat(RequestError):
    code = "unsupported_format"


class ServiceError(OpenMintError):
    code = "service_error"
    retryable = True


class Overloaded(ServiceError):
    code = "overloaded"

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds

    def __reduce__(self) -> tuple[type[OpenMintError], tuple[str, float]]:  # type: ignore[override]
        return type(self), (self.message, self.retry_after_seconds)


class LimitReached(Overloaded):
    code = "limit_reached"


class StoreFailed(ServiceError):
    code = "store_failed"


class EngineFailed(ServiceError):
    code = "engine_failed"


class WorkerLost(EngineFailed):
    code = "worker_lost"
