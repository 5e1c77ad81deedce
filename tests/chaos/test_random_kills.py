"""Four clients train through `kill -9`s as if there had been none.

`make chaos` kills 200 times; a test run 20 times.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.chaos.killing import Killer
from tests.chaos.training import (
    LOSSES,
    Job,
    Outcome,
    digests_of,
    latest_of,
    state_of,
    train,
)
from tests.servers import TestServer, running_server, start_server, stop_server, wait_until_ready

pytestmark = [pytest.mark.chaos, pytest.mark.integration, pytest.mark.slow]

NUM_KILLS = int(os.environ.get("OPENMINT_CHAOS_KILLS", "20"))
BATCHED_STEPS = 12
"""Of each client when batches are shared: then float noise grows from step to step."""
TOLERANCE = 1e-4


def environ(*, deterministic: bool) -> dict[str, str]:
    return {
        "OPENMINT_WORKER_DETERMINISTIC": str(deterministic).lower(),
        # Where bits depend on the company, fp32 keeps the noise small enough to be told from harm.
        "OPENMINT_WORKER_DTYPE": "bfloat16" if deterministic else "float32",
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


def run_through_kills(
    root: Path, base: Path, num_kills: int, *, deterministic: bool, most_steps: int | None = None
) -> tuple[Path, Path, list[tuple[Job, Outcome, Outcome]]]:
    """Data folders of a service whose processes are killed and of one that is left alone, and what
    each job was told by them. Clients go on until the last kill, or for `most_steps`."""
    # Where nothing differs by a bit, a rate that makes the most of each.
    rate = 1e-2 if deterministic else 1e-4
    jobs = [Job(seed, loss, rate) for seed, loss in enumerate(LOSSES)]
    settings = environ(deterministic=deterministic)
    (root / "killed").mkdir()
    killed = start_server(root / "killed", root / "data", bases=[str(base)], environ=settings)
    try:
        wait_until_ready(killed)
        killer = Killer(killed, num_kills, seed=1)
        killer.start()
        told = train_all(
            killed,
            jobs,
            lambda job, step: step < most_steps if most_steps else not killer.is_over.is_set(),
        )
        killer.is_over.wait()
        assert killer.failure is None, killer.failure
    finally:
        stop_server(killed)
    num_steps = {job: outcome.num_steps for job, outcome in zip(jobs, told, strict=True)}
    with running_server(root / "undisturbed", bases=[str(base)], environ=settings) as undisturbed:
        expected = train_all(undisturbed, jobs, lambda job, step: step < num_steps[job])
    print(f"killed {killer.killed}; steps {list(num_steps.values())}")
    return killed.data, undisturbed.data, list(zip(jobs, told, expected, strict=True))


@pytest.mark.timeout(3600)
def test_what_was_acknowledged_is_in_effect_exactly_once(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    """To the bit: losses, gradients, samples, states with their moments, revisions, aliases."""
    killed, undisturbed, outcomes = run_through_kills(
        tmp_path, tiny_base("llama"), NUM_KILLS, deterministic=True
    )
    for job, ours, theirs in outcomes:
        assert ours.losses == theirs.losses, job
        assert ours.grad_norms == theirs.grad_norms, job
        assert ours.drawn == theirs.drawn, job
        digests = digests_of(killed, ours.paths)
        assert digests == digests_of(undisturbed, theirs.paths), job
        assert latest_of(killed, job.policy) == digests[-1], job


@pytest.mark.timeout(3600)
def test_where_batches_are_shared_only_float_noise_differs(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    killed, undisturbed, outcomes = run_through_kills(
        tmp_path,
        tiny_base("llama"),
        max(2, NUM_KILLS // 10),
        deterministic=False,
        most_steps=BATCHED_STEPS,
    )
    for job, ours, theirs in outcomes:
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=TOLERANCE, atol=TOLERANCE)
        state, other = (
            state_of(data, told.paths[-2]) for data, told in ((killed, ours), (undisturbed, theirs))
        )
        for name, values in state.items():
            error = np.linalg.norm(values - other[name]) / np.linalg.norm(other[name])
            print(f"{job.policy} {name}: {error:.1e}")
            assert error < TOLERANCE, (job, name)
