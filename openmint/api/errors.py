"""Failures as HTTP answers: the only place that knows status codes.

Three dialects, chosen by path: Tinker (`/api/v1`, `{"detail": ...}`), OpenAI (`/v1`, its error
envelope), and problem details (RFC 9457) on everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from openmint import errors


class HeadTooLarge(errors.RequestError):
    """The request line and headers are over the limit."""

    code = "head_too_large"


STATUS_OF: dict[type[errors.OpenMintError], int] = {
    errors.InvalidRequest: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.BodyMismatch: 422,
    errors.Gone: 410,
    errors.TooLarge: 413,
    errors.UnsupportedFormat: 415,
    HeadTooLarge: 431,
    errors.RequestError: 400,
    errors.LimitReached: 429,
    errors.Overloaded: 503,
    errors.StoreFailed: 503,
    errors.EngineFailed: 503,
    errors.ServiceError: 503,
    errors.OpenMintError: 500,
}
OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def status_of(error: errors.OpenMintError, path: str) -> int:
    """The HTTP status of an error; 409 becomes 422 for Tinker clients, which would retry a 409."""
    status = next(STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)
    return 422 if status == 409 and path.startswith("/api/v1") else status


def error_response(
    path: str,
    status: int,
    code: str,
    message: str,
    request_id: str,
    param: str | None = None,
    failures: Sequence[Mapping[str, Any]] | None = None,
) -> Response:
    """The answer in the dialect of `path`; always with a body and a Content-Length.

    `param` names the request field that is wrong, for the dialects that say so; `failures` lists
    the gates that a revision did not pass, as a member of problem details.
    """
    headers = {"X-Request-Id": request_id}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if path.startswith("/api/v1"):
        detail = _encodable(message)
        content: dict[str, object] = {"detail": detail, "code": code, "request_id": request_id}
        return JSONResponse(content, status, headers)
    if path.startswith("/v1"):
        envelope = _openai_envelope(status, code, message, param)
        return JSONResponse({**envelope, "request_id": request_id}, status, headers)
    content = {
        "type": f"urn:openmint:error:{code}",
        "title": code.replace("_", " "),
        "status": status,
        "detail": _encodable(message),
        "request_id": request_id,
    }
    if failures is not None:
        content["failures"] = list(failures)
    return JSONResponse(content, status, headers, media_type="application/problem+json")


def openai_error(error: errors.OpenMintError) -> dict[str, object]:
    """The OpenAI envelope of an error that ends a stream whose status has been sent."""
    status = status_of(error, "/v1")
    return _openai_envelope(status, error.code, error.message, getattr(error, "param", None))


def _openai_envelope(status: int, code: str, message: str, param: str | None) -> dict[str, object]:
    kind = "server_error" if status >= 500 else OPENAI_TYPES.get(status, "invalid_request_error")
    content = {
        "message": _encodable(message),
        "type": kind,
        "code": code,
        "param": None if param is None else _encodable(param),
    }
    return {"error": content}


def _encodable(text: str) -> str:
    """`text` with lone surrogates escaped: a refusal may quote one, and UTF-8 has none."""
    return text.encode("utf-8", "backslashreplace").decode()


def request_id_of(request: Request) -> str:
    """The id that the guard gave this request; it is in the log line and in every answer."""
    return str(getattr(request.state, "request_id", "-"))


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(errors.OpenMintError, _openmint_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)


async def _openmint_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.OpenMintError)
    path = request.url.path
    status = status_of(error, path)
    request_id, param = request_id_of(request), getattr(error, "param", None)
    failures = getattr(error, "failures", None)
    response = error_response(path, status, error.code, error.message, request_id, param, failures)
    if isinstance(error, errors.Overloaded):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path}: {error.detail}"
    path = request.url.path
    response = error_response(path, error.status_code, code, message, request_id_of(request))
    response.headers.update(error.headers or {})
    return response


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = "/".join(str(part) for part in first["loc"])
    message = f"{where}: {first['msg']}"
    path = request.url.path
    return error_response(path, 400, "invalid_request", message, request_id_of(request))
