"""A team does every piece of every phase once, and no phase before the one before is done."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numba import njit

from openmint.kernels.team import share, team

PHASES, PIECES = 40, 25


@njit(nogil=True)
def _add_up(i: Any, phase: Any, done_PN: Any) -> None:
    """One more than the sum of what the phase before left."""
    total = 1
    if phase > 0:
        for n in range(done_PN.shape[1]):
            total += done_PN[phase - 1, n] % 7
    done_PN[phase, i] += total


@njit(nogil=True)
def _run(counters: Any, done_PN: Any) -> None:
    for phase in range(len(done_PN)):
        share(counters, phase, done_PN.shape[1], _add_up, (phase, done_PN))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_phases_follow_each_other_and_pieces_are_done_once(num_threads: int) -> None:
    expected = np.zeros((PHASES, PIECES), np.int64)
    _run(team(PHASES), expected)
    with ThreadPoolExecutor(num_threads) as threads:
        for _ in range(20):
            counters, done = team(PHASES), np.zeros((PHASES, PIECES), np.int64)
            running = [threads.submit(_run, counters, done) for _ in range(num_threads)]
            for each in running:
                each.result()
            np.testing.assert_array_equal(done, expected)
