"""The `Server-Timing` header (W3C): how much of an answer's time the worker had, and for what."""

from __future__ import annotations

from openmint.scheduler.work import Spent


def server_timing(spent: Spent) -> dict[str, str]:
    """The header, in milliseconds as its standard wants them."""
    engine_ms, scheduler_ms = 1000 * spent.engine_seconds, 1000 * spent.scheduler_seconds
    return {"Server-Timing": f"engine;dur={engine_ms:.3f}, scheduler;dur={scheduler_ms:.3f}"}
