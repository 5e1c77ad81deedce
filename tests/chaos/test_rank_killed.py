"""One process of a divided worker is killed while a client trains."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.training import Job, digests_of, train
from tests.servers import (
    TestServer,
    mortal_server,
    other_ranks_of,
    running_server,
    wait_until_ready,
)

pytestmark = [pytest.mark.chaos, pytest.mark.integration, pytest.mark.slow]

NUM_STEPS = 9
KILLED_BEFORE = (2, 5, 8)
"""Steps in whose midst, or before which, a rank dies."""
ENVIRON = {
    "OPENMINT_WORKER_TENSOR_PARALLEL": "2",
    "OPENMINT_WORKER_DETERMINISTIC": "true",
    "OPENMINT_WORKER_DTYPE": "float32",
    "OPENMINT_SERVICE_SNAPSHOT_UPDATES": "4",
}
JOB = Job(3, "ppo")


def kill_a_rank(server: TestServer, random: random.Random) -> None:
    wait_until_ready(server)
    (victim,) = other_ranks_of(server)
    threading.Timer(random.uniform(0.0, 0.3), victim.kill).start()


def test_training_goes_on_as_if_no_rank_had_died(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    """To the bit: losses, gradients, samples, states with their moments, revisions."""
    base, moments = str(tiny_base("llama")), random.Random(1)
    with mortal_server(tmp_path / "killed", bases=[base], environ=ENVIRON) as killed:

        def goes_on(step: int) -> bool:
            if step in KILLED_BEFORE:
                kill_a_rank(killed, moments)
            return step < NUM_STEPS

        told = train(killed, JOB, goes_on)
    with running_server(tmp_path / "undisturbed", bases=[base], environ=ENVIRON) as undisturbed:
        assert len(other_ranks_of(undisturbed)) == 1
        expected = train(undisturbed, JOB, lambda step: step < NUM_STEPS)
    assert told.losses == expected.losses
    assert told.grad_norms == expected.grad_norms
    assert told.drawn == expected.drawn
    assert digests_of(killed.data, told.paths) == digests_of(undisturbed.data, expected.paths)
