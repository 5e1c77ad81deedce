"""Whose is a request's time: the engine's, or the scheduler's?"""

from __future__ import annotations

import pytest

from openmint.scheduler.engine_time import EngineTime


def test_steps_since_the_arrival_are_the_engines_and_the_rest_the_schedulers() -> None:
    time = EngineTime()
    time.add_step(0.0, 5.0)
    arrival = time.arrival(6.0)
    assert time.add_step(7.0, 9.0) == 2.0
    time.add_step(9.5, 10.0)
    spent = time.since(arrival, 10.25)
    assert (spent.engine_seconds, spent.scheduler_seconds) == (2.5, 1.75)
    assert spent.seconds == 4.25


def test_the_rest_of_a_step_that_ran_on_arrival_is_the_engines() -> None:
    time = EngineTime()
    time.add_step(0.0, 4.0)
    # It came at 1.0, and is taken in after the step's end.
    arrival = time.arrival(1.0)
    time.add_step(4.5, 5.0)
    spent = time.since(arrival, 5.0)
    assert spent.engine_seconds == pytest.approx(3.5)
    assert spent.scheduler_seconds == pytest.approx(0.5)
