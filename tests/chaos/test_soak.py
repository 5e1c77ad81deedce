"""Life goes on and on: policies come, train, are saved, sampled from, and end. Nothing grows.

`OPENMINT_SOAK_SECONDS=3600` is an hour; a test run takes a minute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import tinker
from tinker import types

from tests.chaos.training import LOSSES, Job
from tests.servers import TestServer, gateway_of, running_server, workers_of

pytestmark = [pytest.mark.chaos, pytest.mark.integration, pytest.mark.slow]

SECONDS = float(os.environ.get("OPENMINT_SOAK_SECONDS", "60"))
NUM_CLIENTS = 4
WARM_UP_SHARE = 0.25
"""Of the time: caches fill, and the allocator finds its size."""
MOST_GROWTH_BYTES = {"gateway": 24 << 20, "worker": 48 << 20}
"""Between the medians of the middle and of the end."""
MOST_MORE_FILES = 4
"""The same, of descriptors that are no sockets. At any moment some thread may read."""
KEEP_ALIVE_SECONDS = 75.0
MOST_IDLE_SOCKETS = 12
"""Once the clients are gone and time has closed their connections; looked at after long runs."""
PAGE_WAIT_SECONDS = 20.0


@dataclass(frozen=True)
class Look:
    """What the service holds while nobody asks anything."""

    at_seconds: float
    gateway_bytes: int
    worker_bytes: int
    num_files: int
    pages: int
    runs: int
    resident: int


def one_life(server: TestServer, number: int) -> None:
    """A session with a run: some steps, saves, samples of each kind."""
    job = Job(number, LOSSES[number % len(LOSSES)])
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        run = service.create_lora_training_client(
            "tiny-llama", rank=1 + number % 8, seed=number, user_metadata={"policy": job.policy}
        ).result()
        for step in range(6):
            run.forward_backward(job.data(step), job.loss).result()
            run.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        run.save_state("state").result()
        run.save_weights_for_sampler("served", ttl_seconds=3600).result()
        sampler = run.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=16, seed=number)
        sampler.sample(types.ModelInput.from_ints([504, 3575, number + 3]), 4, params).result()
    body = {"model": f"default/{job.policy}@latest", "prompt": [504, 3575], "max_tokens": 8}
    headers = {"X-API-Key": server.admin_key}
    httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).raise_for_status()


def look(server: TestServer, started_at: float) -> Look:
    """Once the ended sessions' runs have left the worker."""
    (worker,) = workers_of(server)
    gateway, deadline = gateway_of(server), time.monotonic() + PAGE_WAIT_SECONDS
    while True:
        (stats,) = server.worker_stats()
        if (stats["num_training_runs"], stats["kv_pages_used"]) == (0, 0):
            break
        assert time.monotonic() < deadline, stats
        time.sleep(0.2)
    opened = [*descriptors(gateway), *descriptors(worker)]
    return Look(
        at_seconds=time.monotonic() - started_at,
        gateway_bytes=gateway.memory_info().rss,
        worker_bytes=worker.memory_info().rss,
        num_files=sum(not is_socket(each) for each in opened),
        pages=stats["kv_pages_used"],
        runs=stats["num_training_runs"],
        resident=stats["num_resident_revisions"],
    )


def descriptors(process: psutil.Process) -> list[str]:
    """What each descriptor is, from one look at it: counts of all and of connections, taken one
    after the other, differ by what closes in between."""
    found = []
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it has just been closed
            found.append(str(link.readlink()))
    return found


def is_socket(link: str) -> bool:
    return link.startswith("socket:")


@pytest.mark.timeout(SECONDS * 2 + 300)
def test_nothing_grows(tiny_base: Callable[[str], Path], tmp_path: Path) -> None:
    looks = list[Look]()
    environ = {
        "OPENMINT_SERVICE_FUTURE_TTL_SECONDS": "5",
        "OPENMINT_WORKER_HOST_BYTES": str(16 << 20),
        "OPENMINT_WORKER_SERVING_BYTES": str(16 << 20),
    }
    bases = [str(tiny_base("llama"))]
    with running_server(tmp_path / "soak", bases=bases, environ=environ) as server:
        started_at, number = time.monotonic(), 0
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            while time.monotonic() - started_at < SECONDS:
                lives = [pool.submit(one_life, server, number + i) for i in range(2 * NUM_CLIENTS)]
                number += len(lives)
                for life in lives:
                    life.result()
                looks.append(look(server, started_at))
        if SECONDS > 4 * KEEP_ALIVE_SECONDS:
            time.sleep(KEEP_ALIVE_SECONDS + 5)
            processes = gateway_of(server), *workers_of(server)
            num_sockets = sum(is_socket(link) for p in processes for link in descriptors(p))
            print(f"sockets: {num_sockets} after all clients are gone")
            assert num_sockets <= MOST_IDLE_SOCKETS
        journal = sum(path.stat().st_size for path in (server.data / "journal").glob("*/*"))
    settled = [each for each in looks if each.at_seconds > WARM_UP_SHARE * SECONDS]
    assert len(settled) >= 4, looks
    half = len(settled) // 2
    middle, end = settled[:half], settled[half:]
    print(f"{number} lives, {len(looks)} looks; first {looks[0]}, last {looks[-1]}")
    for name, most in MOST_GROWTH_BYTES.items():
        sizes = [[getattr(each, f"{name}_bytes") for each in part] for part in (middle, end)]
        grown = float(np.median(sizes[1]) - np.median(sizes[0]))
        print(f"{name}: {grown / 2**20:+.1f} MiB from the middle to the end")
        assert grown < most, name
    files = [[each.num_files for each in part] for part in (middle, end)]
    print(f"files: medians {[np.median(each) for each in files]}, most {max(map(max, files))}")
    assert np.median(files[1]) <= np.median(files[0]) + MOST_MORE_FILES
    print(f"journal {journal / 2**20:.1f} MiB at the end")
    assert journal < 64 << 20
