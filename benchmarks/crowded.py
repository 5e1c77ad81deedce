"""Is a warm request slower beside a full catalogue? Real services, asked in turns.

Part of what `catalog.py` asks, which fills the catalogues.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.processes import BASES
from benchmarks.raw_http import Connections, Site
from benchmarks.wave import put_adapters
from openmint.catalog.catalog import Catalog
from openmint.store.folder_store import FolderStore
from openmint.types import Tenant
from tests.servers import TestServer, gateway_of, running_server

NUM_STARTS, NUM_ADAPTERS, NUM_REQUESTS, PROMPT_TOKENS = 3, 4, 300, 16
LAP = 50
"""Requests to one service before the next has its turn."""


@dataclass
class Crowd:
    """A service on a full catalogue, and what it was measured to be."""

    url: str
    """Of its database."""
    root: Path
    """Its data folder is in there."""
    ready_seconds: list[float] = field(default_factory=list)
    """Of each start, from `serve` until it is ready."""
    gateway_mib: float = 0.0
    p50_ms: list[float] = field(default_factory=list)
    p95_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Client:
    """Who asks a service for its adapters, which are warm after the first round."""

    site: Site
    models: Sequence[str]

    async def seconds(self, seed: int, count: int) -> list[float]:
        """Of each of so many completions of one token, one after another, by name and alias."""
        prompts = np.random.default_rng(seed).integers(100, 40_000, (count, PROMPT_TOKENS))
        found = []
        async with Connections(self.site, 1) as (connection,):
            for nth, prompt in enumerate(prompts.tolist()):
                model = self.models[nth % len(self.models)]
                request = self.site.request(
                    "/v1/completions", model=model, prompt=prompt, max_tokens=1, temperature=0
                )
                started_at = time.perf_counter()
                reply = await connection.post(request)
                found.append(time.perf_counter() - started_at)
                assert reply.status == 200, reply.body
        return found


def ask_in_turns(crowds: Sequence[Crowd], tenant: Tenant, repeats: int) -> None:
    """Start a service on each and ask all of them, in each repeat in turns; what is found is put
    into them. The adapters that are asked for are the tenant's, among all others it has."""
    with ExitStack() as services:
        clients = []
        for crowd in crowds:
            models, key = admit_client(crowd, tenant)
            for _ in range(NUM_STARTS - 1):
                with started(crowd):
                    pass
            server = services.enter_context(started(crowd))
            clients.append((crowd, server, Client(Site.of(server.url, key), models)))
        for _, _, client in clients:
            asyncio.run(client.seconds(0, LAP))
        for repeat in range(repeats):
            seconds: list[list[float]] = [[] for _ in clients]
            for lap in range(NUM_REQUESTS // LAP):
                for found, (_, _, client) in zip(seconds, clients, strict=True):
                    found += asyncio.run(client.seconds(1 + lap + repeat * NUM_REQUESTS, LAP))
            for found, (crowd, _, _) in zip(seconds, clients, strict=True):
                crowd.p50_ms.append(1e3 * float(np.percentile(found, 50)))
                crowd.p95_ms.append(1e3 * float(np.percentile(found, 95)))
        for crowd, server, _ in clients:
            crowd.gateway_mib = gateway_of(server).memory_info().rss / 2**20


def admit_client(crowd: Crowd, tenant: Tenant) -> tuple[list[str], str]:
    """Addresses of adapters that the service's base can serve, and a key of their tenant."""
    catalog = Catalog.open(crowd.url)
    names = put_adapters(FolderStore(crowd.root / "data"), catalog, tenant, NUM_ADAPTERS)
    key, _ = catalog.create_key(tenant, "serve")
    catalog.close()
    return [name.partition("@")[0] for name in names], key


@contextmanager
def started(crowd: Crowd) -> Iterator[TestServer]:
    """A service, until the block ends; how long it took to be ready is noted."""
    started_at = time.monotonic()
    bases = None if (crowd.root / "data" / "bases").exists() else BASES
    environ = {"OPENMINT_DATABASE_URL": crowd.url}
    with running_server(crowd.root, bases_from=bases, environ=environ) as server:
        crowd.ready_seconds.append(time.monotonic() - started_at)
        yield server
