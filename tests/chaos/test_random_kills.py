"""Four clients train through `kill -9`s as if there had been none.

`make chaos` kills 200 times; a test run 20 times.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.chaos.killing import Killer
from tests.chaos.training import LOSSES, Job, Outcome, digests_of, latest_of, train
from tests.servers import TestServer, running_server, start_server, stop_server, wait_until_ready

pytestmark = [pytest.mark.chaos, pytest.mark.integration, pytest.mark.slow]

NUM_KILLS = int(os.environ.get("OPENMINT_CHAOS_KILLS", "20"))
ENVIRON = {
    "OPENMINT_WORKER_DETERMINISTIC": "true",
    "OPENMINT_SERVICE_SNAPSHOT_UPDATES": "6",
}


def train_all(
    server: TestServer, jobs: list[Job], goes_on: Callable[[Job, int], bool]
) -> list[Outcome]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [
            pool.submit(train, server, job, lambda step, job=job: goes_on(job, step))
            for job in jobs
        ]
        return [future.result() for future in futures]


def test_what_was_acknowledged_is_in_effect_exactly_once(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    jobs = [Job(seed, loss) for seed, loss in enumerate(LOSSES)]
    bases = [str(tiny_base("llama"))]
    (tmp_path / "killed").mkdir()
    killed = start_server(tmp_path / "killed", tmp_path / "data", bases=bases, environ=ENVIRON)
    try:
        wait_until_ready(killed)
        killer = Killer(killed, NUM_KILLS, seed=1)
        killer.start()
        told = train_all(killed, jobs, lambda job, step: not killer.is_over.is_set())
        assert killer.failure is None, killer.failure
    finally:
        stop_server(killed)
    num_steps = {job: outcome.num_steps for job, outcome in zip(jobs, told, strict=True)}
    with running_server(tmp_path / "undisturbed", bases=bases, environ=ENVIRON) as undisturbed:
        expected = train_all(undisturbed, jobs, lambda job, step: step < num_steps[job])
    print(f"killed {killer.killed}; steps {list(num_steps.values())}")
    for job, ours, theirs in zip(jobs, told, expected, strict=True):
        assert ours.losses == theirs.losses, job
        assert ours.grad_norms == theirs.grad_norms, job
        assert ours.drawn == theirs.drawn, job
        digests = digests_of(killed.data, ours.paths)
        assert digests == digests_of(undisturbed.data, theirs.paths), job
        assert latest_of(killed.data, job.policy) == digests[-1], job
