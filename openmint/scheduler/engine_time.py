"""How long the engine computed since a work came; the rest of its time is the scheduler's own."""

from __future__ import annotations

from dataclasses import dataclass

from openmint.scheduler.work import Spent


@dataclass(frozen=True, slots=True)
class Arrival:
    """When a work came, and how long the engine had computed by then."""

    at_seconds: float
    engine_seconds: float


class EngineTime:
    """The engine's sampling and training steps, one after another, on one clock."""

    def __init__(self) -> None:
        self._total_seconds = 0.0
        self._last_step = (0.0, 0.0)

    def add_step(self, started_at: float, ended_at: float) -> float:
        """Count a step; its seconds."""
        self._last_step = (started_at, ended_at)
        self._total_seconds += ended_at - started_at
        return ended_at - started_at

    def arrival(self, moment: float) -> Arrival:
        """The arrival of a work that came during the last step or after it."""
        started_at, ended_at = self._last_step
        rest_seconds = max(0.0, ended_at - max(moment, started_at))
        return Arrival(moment, self._total_seconds - rest_seconds)

    def since(self, arrival: Arrival, now: float) -> Spent:
        """Where the time of a work went that ends now."""
        engine_seconds = self._total_seconds - arrival.engine_seconds
        return Spent(engine_seconds, max(0.0, now - arrival.at_seconds - engine_seconds))
