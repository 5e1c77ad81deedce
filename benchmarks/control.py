"""What does the service itself add to a request, beyond the engine's work?

A client that costs next to nothing asks a real `openmint serve` over the embedded base. Each answer
says how long the engine computed while the request was with the worker (`Server-Timing`); the rest
of what the client saw is counted as control plane: gateway, link, scheduler, and the kernel and the
client besides. `python -m benchmarks control`.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.arms.protocol import versions
from benchmarks.house import Line, Report, Spread, table, verdict
from benchmarks.processes import BASES, Stage
from benchmarks.raw_http import Connection, Connections, Reply, Site, TinkerSampler
from tests.servers import TestServer, running_server

NUM_IN_FLIGHT = 64
MOST_MS = {"p50": 5.0, "p99": 20.0}
"""What issue 4 asks for at 64 in flight."""
PROMPT_TOKENS = 8
OTHERS_TOKENS = (40, 200)
"""How many tokens a request decodes that is in flight beside the measured ones."""
SETTLE_SECONDS = 0.5
MEASURED = (
    "SmolLM2-135M-Instruct, prompts of 8 new tokens, one token drawn. OpenAI: `/v1/completions`, "
    "not streamed. Tinker: `asample`, then `retrieve_future`, as one request. A request's time "
    "runs from the client's send to its receipt of the last byte. Counted as control plane is all "
    "of it but the engine's steps between the arrival at the worker and the end, whoever's tokens "
    "they computed: while the engine is busy with others a request waits for it, not for the "
    "service. That is an upper bound, as kernel and client are in it. Quantiles are of one "
    "repeat's requests; the table shows their median and range over the repeats."
)
LIMITS = (
    "Client, gateway and the engine's two threads share two cores, so whatever the service does at "
    "the end of a step competes with the next step.",
    "64 requests that end with one step are answered one after another by one event loop: the "
    "median of 64 such requests can't be below 32 times what one costs the gateway.",
)
PACKAGES = ("torch", "fastapi", "uvicorn", "sqlalchemy")

Ask = Callable[[Connection, int], Awaitable[Reply]]
"""Sends one request for so many tokens and returns its last answer."""


@dataclass(frozen=True)
class Situation:
    """What else is in flight while requests of one token are measured."""

    name: str
    num_measured: int
    """Requests of one token in flight; a client sends its next as soon as it has an answer."""
    num_others: int
    seconds: float
    is_asked: bool
    """Whether the target is meant for it."""


SITUATIONS = (
    Situation("alone", 1, 0, 3.0, False),
    Situation("4 beside 60 that decode", 4, NUM_IN_FLIGHT - 4, 10.0, True),
    Situation("64 that end at once", NUM_IN_FLIGHT, 0, 5.0, True),
)


@dataclass(frozen=True)
class Timing:
    """Where the time of one request went."""

    seconds: float
    engine_seconds: float
    scheduler_seconds: float

    @property
    def control_seconds(self) -> float:
        return self.seconds - self.engine_seconds


@dataclass(frozen=True)
class Figures:
    """One repeat of one situation. Times in milliseconds."""

    rate: float
    """Measured requests per second."""
    control_p50: float
    control_p99: float
    scheduler_p50: float
    whole_p50: float
    gateway_cpu: float
    """Per request, all requests counted."""
    client_cpu: float

    @classmethod
    def of(cls, timings: Sequence[Timing], seconds: float, cpu_ms: Sequence[float]) -> Figures:
        control_ms = [1000 * each.control_seconds for each in timings]
        p50, p99 = np.percentile(control_ms, [50, 99])
        return cls(
            rate=len(timings) / seconds,
            control_p50=float(p50),
            control_p99=float(p99),
            scheduler_p50=1000 * float(np.median([each.scheduler_seconds for each in timings])),
            whole_p50=1000 * float(np.median([each.seconds for each in timings])),
            gateway_cpu=cpu_ms[0],
            client_cpu=cpu_ms[1],
        )


def prompts() -> Iterator[list[int]]:
    """Prompts that no earlier one of this process began alike."""
    random = np.random.default_rng(0)
    while True:
        yield random.integers(100, 40_000, PROMPT_TOKENS).tolist()


def ask_openai(site: Site, base: str, prompt: Iterator[list[int]]) -> Ask:
    async def ask(connection: Connection, num_tokens: int) -> Reply:
        body = {"model": base, "prompt": next(prompt), "max_tokens": num_tokens}
        reply = await connection.post(site.request("/v1/completions", **body))
        assert reply.json["choices"]
        return reply

    return ask


def ask_tinker(sampler: TinkerSampler, prompt: Iterator[list[int]]) -> Ask:
    async def ask(connection: Connection, num_tokens: int) -> Reply:
        request_id = await sampler.submit(connection, next(prompt), max_tokens=num_tokens)
        return await sampler.retrieve(connection, request_id)

    return ask


class Traffic:
    """The requests of one repeat of a situation."""

    def __init__(self, ask: Ask, ask_others: Ask) -> None:
        self.timings: list[Timing] = []
        self.num_asked = 0
        self._ask, self._ask_others = ask, ask_others
        self._lengths = np.random.default_rng(1)

    async def measured(self, connection: Connection, seconds: float) -> None:
        """One request after another. The first isn't counted: all clients begin at once."""
        await self._ask(connection, 1)
        self.num_asked += 1
        end_at = time.monotonic() + seconds
        while (started_at := time.monotonic()) < end_at:
            reply = await self._ask(connection, 1)
            seconds, parts = time.monotonic() - started_at, reply.timing_seconds
            self.timings.append(Timing(seconds, parts["engine"], parts["scheduler"]))
            self.num_asked += 1

    async def other(self, connection: Connection) -> None:
        while True:
            await self._ask_others(connection, int(self._lengths.integers(*OTHERS_TOKENS)))
            self.num_asked += 1


async def measure(
    situation: Situation, site: Site, ask: Ask, ask_others: Ask, gateway: psutil.Process
) -> Figures:
    """One repeat of a situation."""
    traffic, num_measured = Traffic(ask, ask_others), situation.num_measured
    async with Connections(site, num_measured + situation.num_others) as connections:
        others = [asyncio.create_task(traffic.other(each)) for each in connections[num_measured:]]
        await asyncio.sleep(SETTLE_SECONDS)
        before, started_at = cpu_seconds(gateway), time.monotonic()
        counted = connections[:num_measured]
        await asyncio.gather(*(traffic.measured(each, situation.seconds) for each in counted))
        seconds, after = time.monotonic() - started_at, cpu_seconds(gateway)
        await stop(others)
    await asyncio.sleep(SETTLE_SECONDS)
    used = [later - earlier for earlier, later in zip(before, after, strict=True)]
    cpu_ms = [1000 * cpu / traffic.num_asked for cpu in used]
    return Figures.of(traffic.timings, seconds, cpu_ms)


async def stop(endless: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks; raises what one of them has failed with."""
    for task in endless:
        if task.done():
            task.result()
        task.cancel()
    await asyncio.gather(*endless, return_exceptions=True)


def cpu_seconds(gateway: psutil.Process) -> tuple[float, float]:
    """CPU time of the gateway and of this process, the client."""
    used = gateway.cpu_times()
    return used.user + used.system, time.process_time()


# -- the client apart -----------------------------------------------------------------------------


@contextmanager
def canned_site() -> Iterator[Site]:
    """A process that answers every request at once."""
    command = [sys.executable, "-m", "benchmarks.raw_http"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Site("127.0.0.1", int(process.stdout.readline()), "none")
        process.kill()


async def client_ms(site: Site, num_requests: int = 2000) -> float:
    """Median round trip to a server that does nothing: what client and kernel cost."""
    found = []
    async with Connections(site, 1) as (connection,):
        request = site.request("/v1/completions", prompt=next(prompts()), max_tokens=1)
        for _ in range(num_requests):
            started_at = time.monotonic()
            await connection.post(request)
            found.append(time.monotonic() - started_at)
    return 1000 * float(np.median(found))


# -- the report -----------------------------------------------------------------------------------

Found = Mapping[tuple[str, str], Sequence[Figures]]
"""(API, situation) -> one entry per repeat."""


async def find(
    server: TestServer, repeats: int, situations: Sequence[Situation]
) -> dict[tuple[str, str], list[Figures]]:
    site = Site.of(server.url, server.admin_key)
    gateway, prompt = psutil.Process(server.process.pid), prompts()
    openai = ask_openai(site, server.base, prompt)
    sampler = await TinkerSampler.open(site, server.base)
    asks = {"OpenAI": openai, "Tinker": ask_tinker(sampler, prompt)}
    found: dict[tuple[str, str], list[Figures]] = {}
    for i in range(repeats):
        for situation in situations:
            for api, ask in asks.items():
                figures = await measure(situation, site, ask, openai, gateway)
                found.setdefault((api, situation.name), []).append(figures)
        print(f"repeat {i + 1} of {repeats}", flush=True)
    return found


def lines_of(found: Found, situations: Sequence[Situation]) -> list[Line]:
    lines = []
    for (api, name), repeats in found.items():
        asked = next(each.is_asked for each in situations if each.name == name)
        for quantile, most_ms in MOST_MS.items():
            spread = Spread.of([getattr(each, f"control_{quantile}") for each in repeats])
            said = verdict(spread.median, at_most=most_ms if asked else None)
            work = f"control plane, {api}, {name}: {quantile}"
            lines.append(Line(work, f"≤ {most_ms:g} ms" if asked else "", spread.show(" ms"), said))
    return lines


def details(found: Found) -> str:
    heads = ["requests", "per s", "whole p50, ms", "of it scheduler p50, ms"]
    rows = [[*heads, "gateway CPU, ms", "client CPU, ms"]]
    for (api, name), repeats in found.items():
        columns = ("rate", "whole_p50", "scheduler_p50", "gateway_cpu", "client_cpu")
        spreads = [Spread.of([getattr(each, column) for each in repeats]) for column in columns]
        rows.append([f"{api}, {name}", *(spread.show() for spread in spreads)])
    return table(rows)


def report(found: Found, situations: Sequence[Situation], round_trip_ms: float) -> Report:
    apart = (
        f"The client apart: a round trip to a process that answers at once takes "
        f"{round_trip_ms:.2f} ms (median); what it uses of the cores for each request is in the "
        "table. Other requests in flight count in the CPU columns, not in the rates."
    )
    data = [
        {"api": api, "situation": name, "repeats": [asdict(each) for each in repeats]}
        for (api, name), repeats in found.items()
    ]
    return Report(
        question="control",
        title="What the service adds to a request beyond the engine's work",
        measured=MEASURED,
        tables=[details(found), apart],
        lines=lines_of(found, situations),
        limits=LIMITS,
        data={"figures": data, "client_round_trip_ms": round_trip_ms},
        versions={"service": versions(PACKAGES)},
    )


def answer(server: TestServer, repeats: int, situations: Sequence[Situation]) -> Report:
    """The report on a running service."""
    found = asyncio.run(find(server, repeats, situations))
    with canned_site() as site:
        return report(found, situations, asyncio.run(client_ms(site)))


def ask(stage: Stage, repeats: int) -> Report:
    """`stage` is not needed: the service brings its own processes."""
    with (
        tempfile.TemporaryDirectory() as root,
        running_server(Path(root), bases_from=BASES) as server,
    ):
        return answer(server, repeats, SITUATIONS)
