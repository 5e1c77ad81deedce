"""What a damaged log costs: a torn end nothing, a damaged middle one policy, which says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tinker
from tinker import types

from openmint.journal.frames import frame_start
from openmint.journal.update_log import Segment, segments
from tests.chaos.training import Job, digests_of
from tests.servers import TestServer, run_cli, start_server, stop_server, wait_until_ready

pytestmark = [pytest.mark.chaos, pytest.mark.integration]

JOBS = [Job(1, "cross_entropy"), Job(2, "ppo")]
NUM_STEPS = 3


def step(run: tinker.TrainingClient, job: Job, number: int) -> None:
    run.forward_backward(job.data(number), job.loss).result()
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()


@contextmanager
def stopped_after(
    base: Path, root: Path, damage: Callable[[Path], None]
) -> Iterator[tuple[TestServer, list[tinker.TrainingClient]]]:
    """Two policies after some steps, on a server that was killed and started again, with the log
    damaged in between."""
    (root / "once").mkdir(parents=True)
    server = start_server(root / "once", root / "data", bases=[str(base)])
    port = int(server.url.rpartition(":")[2])
    try:
        wait_until_ready(server)
        with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
            runs = [
                service.create_lora_training_client("tiny-llama", rank=2, seed=job.seed).result()
                for job in JOBS
            ]
            for number in range(NUM_STEPS):
                for run, job in zip(runs, JOBS, strict=True):
                    step(run, job, number)
            server.process.kill()
            server.process.wait()
            (folder,) = (server.data / "journal").iterdir()
            damage(segments(folder)[-1])
            server = start_server(root / "once", root / "data", bases=[str(base)], port=port)
            wait_until_ready(server)
            yield server, runs
    finally:
        stop_server(server)


def finish(server: TestServer, run: tinker.TrainingClient, job: Job) -> str:
    """One more step, and the digest of the state after it."""
    step(run, job, NUM_STEPS)
    return digests_of(server.data, [run.save_state("end").result().path])[0]


@pytest.fixture(scope="module")
def expected(
    tiny_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Digests of the states when nothing was damaged."""
    root = tmp_path_factory.mktemp("whole")
    with stopped_after(tiny_base("llama"), root, lambda log: None) as (server, runs):
        return [finish(server, run, job) for run, job in zip(runs, JOBS, strict=True)]


def test_half_a_frame_at_the_end_costs_nothing(
    tiny_base: Callable[[str], Path], tmp_path: Path, expected: list[str]
) -> None:
    def tear(log: Path) -> None:
        with log.open("ab") as file:
            file.write(frame_start({"run": "x", "seq": 1}, bytes(10_000)) + bytes(5_000))

    with stopped_after(tiny_base("llama"), tmp_path, tear) as (server, runs):
        ends = [finish(server, run, job) for run, job in zip(runs, JOBS, strict=True)]
    assert ends == expected


def test_a_damaged_gradient_costs_its_own_policy_which_says_so(
    tiny_base: Callable[[str], Path], tmp_path: Path, expected: list[str]
) -> None:
    def flip(log: Path) -> None:
        frame = Segment.read(log, with_bodies=True).updates[2]  # of the first policy
        data = bytearray(log.read_bytes())
        data[frame.body_offset + 100] ^= 1
        log.write_bytes(data)

    with stopped_after(tiny_base("llama"), tmp_path, flip) as (server, runs):
        with pytest.raises(tinker.TinkerError, match=r"could not be rebuilt|not in memory"):
            step(runs[0], JOBS[0], NUM_STEPS)
        assert finish(server, runs[1], JOBS[1]) == expected[1]
        assert any("is damaged" in line for line in server.errors_in_log())
        run_cli("journal", "verify", "--data", str(server.data), code=1)
