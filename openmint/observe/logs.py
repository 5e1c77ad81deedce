"""Structured logs of every process: JSON lines, or readable ones on a terminal.

`OPENMINT_LOG_FORMAT` (`json`, `console`; otherwise chosen by whether stderr is a terminal) and
`OPENMINT_LOG_LEVEL` (`debug`, `info`, `warning`, `error`) are read from the environment, which the
workers inherit. Keys never reach a log line.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

SECRET_FIELDS = frozenset({"api_key", "authorization", "key", "password", "secret", "x-api-key"})
SECRET_TEXT = re.compile(r"\b(tml-om_[A-Za-z0-9]+)_[A-Za-z0-9_-]+|\bBearer\s+\S+", re.IGNORECASE)
REDACTED = "[redacted]"


def configure_logs() -> None:
    """Send structlog, and what libraries log at warning or above, to stderr. Called once a process.

    Raises ValueError for an unknown level.
    """
    level = logging.getLevelNamesMapping().get(os.environ.get("OPENMINT_LOG_LEVEL", "info").upper())
    if level is None:
        raise ValueError("OPENMINT_LOG_LEVEL must be one of debug, info, warning, error")
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, *_renderers()],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers()],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


def redact(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """The event without keys: secret fields replaced, key-like text inside strings cut."""
    return {name: _redact_value(name, value) for name, value in event.items()}


def redact_text(text: str) -> str:
    """The text with the secret part of API keys and bearer tokens replaced; key ids stay."""
    return SECRET_TEXT.sub(lambda m: f"{m[1]}_{REDACTED}" if m[1] else f"Bearer {REDACTED}", text)


def _redact_value(name: str, value: Any) -> Any:
    if name.lower() in SECRET_FIELDS:
        return REDACTED
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {key: _redact_value(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_value("", inner) for inner in value]
    return value


def _renderers() -> list[Processor]:
    wanted = os.environ.get("OPENMINT_LOG_FORMAT", "")
    if wanted == "console" or (wanted != "json" and sys.stderr.isatty()):
        return [redact, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    frames = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    return [
        structlog.processors.ExceptionRenderer(frames),
        redact,
        structlog.processors.JSONRenderer(default=str),
    ]
