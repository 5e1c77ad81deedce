"""Two workers of one base: does it pay to send a sample to the one that has its revision?

Through the OpenAI API against real services: `python -m benchmarks routing`. The same requests once
by residency and once by a hash of the revision (`service/routing.py`).
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.arms.protocol import versions
from benchmarks.house import Line, Report, Spread, table, verdict
from benchmarks.processes import BASES, Stage
from benchmarks.raw_http import Connection, Connections, Site
from benchmarks.wave import SPEC, Answer, complete, fill
from openmint.cluster.worker_client import STATS_SECONDS
from openmint.service.routing import ROUTINGS
from tests.servers import running_server

NUM_REPLICAS, NUM_POLICIES, NUM_REQUESTS, IN_FLIGHT = 2, 256, 1_500, 16
EXPONENT = 1.0
HOST_MIB = 48
"""Of each worker: together they hold about two thirds of the adapters."""
MEASURED = (
    f"SmolLM2-135M-Instruct on {NUM_REPLICAS} workers, one thread each. {NUM_REQUESTS} completions "
    f"of {NUM_POLICIES} rank-{SPEC.rank} adapters drawn by Zipf's law (exponent {EXPONENT:g}), "
    f"{IN_FLIGHT} under way. {HOST_MIB} MiB of host memory in each worker. Each routing has a "
    "service of its own on the same folder, one after the other, whose memory is empty at first."
)


@dataclass(frozen=True)
class Drive:
    """What one routing made of the requests."""

    seconds: float
    answers: Sequence[Answer]
    loads: Sequence[int]
    """Of each worker."""

    @property
    def num_lost(self) -> int:
        return sum(not (each.status == 200 and each.is_own) for each in self.answers)

    @property
    def p95(self) -> float:
        return float(np.percentile([each.seconds for each in self.answers], 95))


async def drive(site: Site, models: Sequence[str]) -> tuple[float, list[Answer]]:
    """Completions of these models in order, so many under way."""
    answers: list[Answer] = []
    left = iter(enumerate(models))

    async def work(connection: Connection, left: Iterator[tuple[int, str]]) -> None:
        for index, model in left:
            prompt = np.random.default_rng(index).integers(100, 40_000, 32).tolist()
            answers.append(await complete(site, connection, model, prompt))

    async with Connections(site, IN_FLIGHT) as connections:
        started_at = time.monotonic()
        await asyncio.gather(*(work(connection, left) for connection in connections))
        return time.monotonic() - started_at, answers


def one(root: Path, routing: str, names: Sequence[str], seed: int) -> Drive:
    """A service of its own, driven once."""
    environ = {
        "OPENMINT_REPLICAS": str(NUM_REPLICAS),
        "OPENMINT_SERVICE_ROUTING": routing,
        "OPENMINT_WORKER_HOST_BYTES": str(HOST_MIB << 20),
        "OPENMINT_WORKER_KV_CACHE_BYTES": str(96 << 20),
        "OPENMINT_LOG_LEVEL": "warning",
    }
    numbers = np.random.default_rng(seed)
    shares = (1.0 + np.arange(len(names))) ** -EXPONENT
    drawn = numbers.choice(len(names), NUM_REQUESTS, p=shares / shares.sum())
    models = [names[index] for index in drawn]
    # Else its workers would bring in what the service before was asked for.
    shutil.rmtree(root / "data" / "residency", ignore_errors=True)
    with running_server(root, environ=environ) as server:
        while sum(worker["alive"] for worker in server.worker_stats()) < NUM_REPLICAS:
            time.sleep(STATS_SECONDS)
        site = Site.of(server.url, server.admin_key)
        seconds, answers = asyncio.run(drive(site, models))
        time.sleep(2 * STATS_SECONDS)
        return Drive(seconds, answers, [each["revision_loads"] for each in server.worker_stats()])


def ask(stage: Stage, repeats: int) -> Report:
    """`stage` is not needed: the service brings its own processes."""
    found: dict[str, list[Drive]] = {name: [] for name in ROUTINGS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = fill(root / "data", NUM_POLICIES)
        (root / "data" / "bases").symlink_to((BASES / "bases").resolve())
        for repeat in range(repeats):
            for name, drives in found.items():
                drives.append(one(root, name, names, repeat))
                print(f"{name}: {sum(drives[-1].loads)} loads, {drives[-1].seconds:.1f} s")
    return report(found)


def report(found: dict[str, list[Drive]]) -> Report:
    ours, theirs = found["residency"], found["sticky"]
    pairs = list(zip(ours, theirs, strict=True))
    loaded = Spread.of([sum(own.loads) / sum(other.loads) for own, other in pairs])
    faster = Spread.of([other.seconds / own.seconds for own, other in pairs])
    num_lost = sum(drive.num_lost for drives in found.values() for drive in drives)
    lines = [
        Line("routing: requests lost", "0", str(num_lost), verdict(num_lost, at_most=0)),
        Line("routing by residency: bytes loaded, over sticky's", "", loaded.show("x"), verdict(0)),
        Line(
            "routing by residency: requests per second, over sticky's",
            "",
            faster.show("x"),
            verdict(0),
        ),
    ]
    rows = [
        [
            name,
            Spread.of([NUM_REQUESTS / each.seconds for each in drives]).show(),
            Spread.of([1e3 * each.p95 for each in drives]).show(),
            Spread.of([sum(each.loads) for each in drives]).show(),
            " / ".join(f"{np.median([each.loads[i] for each in drives]):.0f}" for i in (0, 1)),
        ]
        for name, drives in found.items()
    ]
    head = ["routing", "requests/s", "p95, ms", "loads", "of first / second worker"]
    return Report(
        question="routing",
        title="Where a sample goes when two workers could draw it",
        measured=MEASURED,
        tables=[table([head, *rows])],
        lines=lines,
        limits=[
            "All adapters have the same size, so bytes loaded are loads.",
            "Client, gateway and both workers share the cores.",
        ],
        data={
            name: [[each.seconds, each.p95, list(each.loads)] for each in drives]
            for name, drives in found.items()
        },
        versions={"service": versions(("torch", "transformers"))},
    )
