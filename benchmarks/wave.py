"""Very many adapters at once: what does it cost that an adapter is cold, and is anybody lost?

Through the OpenAI API against a real service: `python -m benchmarks wave`. Every adapter has bytes
of its own, and every answer must name its own adapter's digest.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.arms.protocol import versions
from benchmarks.house import Line, Report, Spread, number, table, verdict
from benchmarks.processes import BASES, Stage
from benchmarks.raw_http import Connection, Connections, Site
from openmint.catalog.catalog import Catalog
from openmint.cli.open_files import allow_open_files
from openmint.cluster.worker_client import STATS_SECONDS
from openmint.config import WorkerConfig
from openmint.engine.formats import AdapterArchive
from openmint.layers.adapters import AdapterLayout, AdapterWeights
from openmint.models.embedded import EMBEDDED_BASE, base_digest, embedded_base
from openmint.models.loader import load_model
from openmint.scheduler.work import SavedBlob
from openmint.store.folder_store import FolderStore
from openmint.types import LoraSpec, Tenant
from tests.servers import TestServer, running_server, workers_of

TENANT = Tenant("default")
SPEC = LoraSpec(1, train_unembed=False)
PROMPT_TOKENS, MAX_TOKENS = 16, 8
LADDER = (16, 32, 64, 128, 256, 512, 1024, 2048)
BURST, WAVE = 64, 1000
WAVE_SECONDS = 60.0
SLOTS_MIB, HOST_MIB, PAGES_MIB = 40, 2048, 96
"""Slots for 64 of these adapters, host memory for all, and pages that are all in use before memory
is measured."""
MOST_COLD, MOST_SLOPE, MOST_WARM = 1.5, 0.3, 2.0
LEAST_BYTES_SHARE = 0.9
MEASURED = (
    f"SmolLM2-135M-Instruct; rank-1 adapters of all layers, each with bytes of its own. Bursts of "
    f"completions, one per adapter, all at once: prompts of {PROMPT_TOKENS} tokens, {MAX_TOKENS} "
    f"drawn. Slots for about {BURST} adapters, host memory for all. Cold: in the store alone (its "
    "bytes in the system's page cache). Warm host: in host memory, slots taken by others. Warm "
    "slot: the burst before was the same."
)


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    seconds: float
    status: int
    is_own: bool
    """Whether the answer names the digest that was asked for; a refusal names none."""


@dataclass(frozen=True)
class Burst:
    """Requests that were sent at once."""

    answers: Sequence[Answer]
    seconds: float

    @property
    def num_answered(self) -> int:
        return sum(each.status == 200 and each.is_own for each in self.answers)

    @property
    def num_refused(self) -> int:
        return sum(each.status == 503 for each in self.answers)

    @property
    def p95(self) -> float:
        return float(np.percentile([each.seconds for each in self.answers], 95))


def fill(data: Path, count: int) -> list[str]:
    """Put so many adapters, each a policy's revision, into a data folder; their names as models."""
    data.mkdir()
    catalog = Catalog.open(f"sqlite:///{data / 'openmint.db'}")
    names = put_adapters(FolderStore(data), catalog, TENANT, count)
    catalog.close()
    return names


def put_adapters(store: FolderStore, catalog: Catalog, tenant: Tenant, count: int) -> list[str]:
    """So many policies of the tenant with a revision each; their names as models."""
    directory = embedded_base(BASES)
    digest = base_digest(directory, BASES)
    _, base = load_model(EMBEDDED_BASE, directory, digest, WorkerConfig())
    archive = AdapterArchive(store, base)
    layout = AdapterLayout(SPEC, base.targets_of(SPEC))
    generator = torch.Generator().manual_seed(0)
    names = []
    for index in range(count):
        flat_P = torch.empty(layout.num_params, dtype=torch.bfloat16)
        flat_P.normal_(0.0, 0.01, generator=generator)
        revision, size = archive.save_revision(AdapterWeights(layout, flat_P))
        blob = SavedBlob(revision, size, SPEC, num_optim_steps=0)
        catalog.import_revision(tenant, f"p{index}", base, blob, actor="benchmark")
        names.append(f"{tenant}/p{index}@{revision}")
    return names


async def burst(site: Site, models: Sequence[str], seed: int) -> Burst:
    """One completion of each model, all at once."""
    prompts = np.random.default_rng(seed).integers(100, 40_000, (len(models), PROMPT_TOKENS))
    async with Connections(site, len(models)) as connections:
        started_at = time.monotonic()
        pairs = zip(connections, models, prompts.tolist(), strict=True)
        answers = await asyncio.gather(*(complete(site, *each) for each in pairs))
        return Burst(answers, time.monotonic() - started_at)


async def complete(site: Site, connection: Connection, model: str, prompt: list[int]) -> Answer:
    request = site.request(
        "/v1/completions", model=model, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0
    )
    started_at = time.monotonic()
    reply = await connection.post(request)
    seconds = time.monotonic() - started_at
    revision = reply.headers.get(b"x-openmint-revision", b"").decode()
    return Answer(seconds, reply.status, model.endswith(f"@{revision}"))


@dataclass(frozen=True)
class Tiers:
    """p95 of a burst by where its adapters were."""

    cold: float
    host: float
    slot: float


async def tiers(site: Site, first: Sequence[str], others: Sequence[str], seed: int) -> Tiers:
    """Of adapters that nobody has asked for yet; `others` take their slots in between."""
    cold = await burst(site, first, seed)
    slot = await burst(site, first, seed + 1)
    await burst(site, others, seed + 2)
    host = await burst(site, first, seed + 3)
    for each in (cold, slot, host):
        assert each.num_answered == len(first), "a request got no answer of its own"
    return Tiers(cold.p95, host.p95, slot.p95)


async def solo_seconds(site: Site, models: Sequence[str], seed: int) -> tuple[float, float]:
    """Median time of one request alone whose adapter is cold, and of the next to the same."""
    cold, warm = [], []
    for index, model in enumerate(models):
        cold.append((await burst(site, [model], seed + 2 * index)).seconds)
        warm.append((await burst(site, [model], seed + 2 * index + 1)).seconds)
    return float(np.median(cold)), float(np.median(warm))


class Names:
    """Adapters that nobody has asked for yet, in order."""

    def __init__(self, models: Sequence[str]) -> None:
        self._left = list(models)

    def take(self, count: int) -> list[str]:
        taken, self._left = self._left[:count], self._left[count:]
        assert len(taken) == count
        return taken


@dataclass(frozen=True)
class Figures:
    by_tier: Sequence[Tiers]
    solo: tuple[float, float]
    ladder: dict[int, Burst]
    wave: Burst
    bytes_share: float
    """Of the memory that the worker took for the wave's adapters: their bytes."""


async def measure(server: TestServer, models: Sequence[str], repeats: int) -> Figures:
    site, names = Site.of(server.url, server.admin_key), Names(models)
    await burst(site, names.take(BURST), seed=0)  # warms the process up
    by_tier = []
    for repeat in range(repeats):
        first, others = names.take(BURST), names.take(BURST)
        by_tier.append(await tiers(site, first, others, seed=10 * repeat + 1))
        print(f"repeat {repeat + 1}: {by_tier[-1]}", flush=True)
    solo = await solo_seconds(site, names.take(9), seed=1000)
    before = _memory(server)
    wave = await burst(site, names.take(WAVE), seed=2000)
    after = _memory(server)
    print(f"wave: {wave.num_answered} of {WAVE} in {wave.seconds:.1f} s", flush=True)
    ladder = {}
    for rung in LADDER:
        ladder[rung] = await burst(site, models[:rung], seed=3000 + rung)
        print(f"{rung} distinct: p95 {ladder[rung].p95:.2f} s", flush=True)
    share = (after[0] - before[0]) / max(1, after[1] - before[1])
    return Figures(by_tier, solo, ladder, wave, share)


def _memory(server: TestServer) -> tuple[int, int]:
    """Adapter bytes in the worker's host memory, and all that it has resident."""
    time.sleep(2 * STATS_SECONDS)
    (base,) = server.worker_stats()
    (worker,) = workers_of(server)
    return base["host_bytes"], worker.memory_info().rss


def ask(stage: Stage, repeats: int) -> Report:
    """`stage` is not needed: the service brings its own processes."""
    allow_open_files()
    count = max(BURST * (2 * repeats + 1) + 9 + WAVE, LADDER[-1])
    environ = {
        "OPENMINT_WORKER_SERVING_BYTES": str(SLOTS_MIB << 20),
        "OPENMINT_WORKER_HOST_BYTES": str(HOST_MIB << 20),
        "OPENMINT_WORKER_KV_CACHE_BYTES": str(PAGES_MIB << 20),
        "OPENMINT_LOG_LEVEL": "warning",
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = fill(root / "data", count)
        with running_server(root, bases_from=BASES, environ=environ) as server:
            return report(asyncio.run(measure(server, models, repeats)))


def report(found: Figures) -> Report:
    cold = Spread.of([each.cold / each.slot for each in found.by_tier])
    host = Spread.of([each.host / each.slot for each in found.by_tier])
    load = max(1e-9, found.solo[0] - found.solo[1])
    slope = Spread.of([(each.cold - each.slot) / BURST / load for each in found.by_tier])
    wave, bursts = found.wave, [found.wave, *found.ladder.values()]
    top = found.ladder[LADDER[-1]]
    num_lost = sum(len(each.answers) - each.num_answered - each.num_refused for each in bursts)
    lines = [
        Line(
            f"wave: cold p95 over warm p95, {BURST} distinct",
            f"≤ {MOST_COLD}",
            cold.show(),
            verdict(cold.median, at_most=MOST_COLD),
        ),
        Line(
            "wave: what one more cold adapter adds, over a load alone",
            f"≤ {MOST_SLOPE}",
            slope.show(),
            verdict(slope.median, at_most=MOST_SLOPE),
        ),
        Line(
            "wave: p95 from host memory over p95 from slots",
            f"< {MOST_WARM}",
            host.show(),
            verdict(host.median, at_most=MOST_WARM),
        ),
        Line(
            f"wave of {WAVE} distinct cold adapters: answered or refused",
            f"all in {WAVE_SECONDS:g} s",
            f"{wave.num_answered} answered, {wave.num_refused} refused, {wave.seconds:.1f} s",
            verdict(wave.seconds, at_most=WAVE_SECONDS),
        ),
        Line(
            f"ladder's top, {LADDER[-1]} distinct: answered or refused",
            f"all in {WAVE_SECONDS:g} s",
            f"{top.num_answered} answered, {top.num_refused} refused, {top.seconds:.1f} s",
            verdict(top.seconds, at_most=WAVE_SECONDS),
        ),
        Line(
            "wave: lost, or answered by another adapter",
            "0",
            str(num_lost),
            verdict(num_lost, at_most=0),
        ),
        Line(
            "wave: adapter bytes among the memory taken for them",
            f"≥ {LEAST_BYTES_SHARE}",
            number(found.bytes_share),
            verdict(found.bytes_share, at_least=LEAST_BYTES_SHARE),
        ),
    ]
    by_tier = [
        ["cold", Spread.of([each.cold for each in found.by_tier]).show(" s")],
        ["warm host", Spread.of([each.host for each in found.by_tier]).show(" s")],
        ["warm slot", Spread.of([each.slot for each in found.by_tier]).show(" s")],
        ["one alone, cold", f"{number(1000 * found.solo[0])} ms"],
        ["one alone, warm", f"{number(1000 * found.solo[1])} ms"],
    ]
    rungs = [
        [
            str(rung),
            number(each.p95),
            number(each.seconds),
            str(each.num_answered),
            str(each.num_refused),
        ]
        for rung, each in found.ladder.items()
    ]
    return Report(
        question="wave",
        title="Many distinct adapters at once",
        measured=MEASURED,
        tables=[
            table([[f"p95 of a burst of {BURST}", "median (range)"], *by_tier]),
            table([["distinct", "p95, s", "all, s", "answered", "refused"], *rungs]),
        ],
        lines=lines,
        limits=[
            "Client and service share the cores.",
            "The ladder's adapters were asked for before, as far as it went.",
        ],
        data={
            "by_tier": [[each.cold, each.host, each.slot] for each in found.by_tier],
            "solo": list(found.solo),
            "wave": [each.seconds for each in wave.answers],
            "bytes_share": found.bytes_share,
        },
        versions={"service": versions(("torch", "transformers"))},
    )
