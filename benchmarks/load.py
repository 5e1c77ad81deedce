"""Does everybody get their own answer when very many ask at once?

512 samples through the unmodified Tinker SDK, and meanwhile 2,000 futures of which each has a long
poll open, against a real `openmint serve`: `python -m benchmarks load`. Every request has a prompt,
a seed and a number of tokens of its own, so an answer that belongs to another shows.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import tinker
from tinker import types

from benchmarks.arms.protocol import versions
from benchmarks.house import Line, Report, Spread, table, verdict
from benchmarks.processes import BASES, Stage
from benchmarks.raw_http import Connection, Connections, Site, TinkerSampler
from openmint.cli.open_files import allow_open_files
from tests.servers import TestServer, running_server

ANSWER_SECONDS = 240.0
"""Who has no answer by then is lost."""
SUBMIT_SECONDS = 30.0
WATCH_SECONDS = 0.25
SCORED_AT_ONCE = 64
MOST_APART = 0.3
"""Largest difference between two log-probabilities of one token in bfloat16, in steps of other
sizes. Answers that were swapped on purpose were off by 0.46 to 10, in the median by 4.5."""
MEASURED = (
    "SmolLM2-135M-Instruct. First the samples are handed to the SDK (8 to 16 tokens each, prompts "
    "of 8); once the service has all of them, the other futures are opened (2 to 5 tokens each), "
    "each from a connection of its own, which then polls until its future ends. Every request has "
    "a prompt, a seed and a number of tokens of its own. Lost: no answer within "
    f"{ANSWER_SECONDS:g} s. Wrong: not as many tokens as were asked for, or log-probabilities that "
    f"are more than {MOST_APART:g} from those that the service gives the same tokens after the "
    "request's own prompt, asked for every answer once the rush is over. Memory and files are of "
    "gateway and worker, looked at four times a second."
)
LIMITS = (
    "Client and service share the cores, and one machine's loopback is no network.",
    "The wall time is the engine's: about 20,000 tokens of prompts and 13,000 drawn.",
)
PACKAGES = ("torch", "tinker", "fastapi", "uvicorn")

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """How many ask at once."""

    num_samples: int = 512
    num_polls: int = 2000


@dataclass(frozen=True)
class Wish:
    """One request that no other resembles."""

    prompt: Tokens
    seed: int
    max_tokens: int

    @classmethod
    def number(cls, index: int, tokens: tuple[int, int]) -> Wish:
        random = np.random.default_rng(index)
        prompt = tuple(random.integers(100, 40_000, 8).tolist())
        return cls(prompt, index, int(random.integers(tokens[0], tokens[1] + 1)))


@dataclass(frozen=True)
class Answer:
    """What a request got: tokens, and the log-probability that came with each."""

    tokens: Tokens
    logprobs: tuple[float, ...]

    def is_for(self, wish: Wish, scored: Sequence[float]) -> bool:
        """Whether the wish explains it; `scored` is what its tokens get after the wish's prompt."""
        apart = [abs(own - other) for own, other in zip(self.logprobs, scored, strict=True)]
        return len(self.tokens) == wish.max_tokens and max(apart, default=0.0) <= MOST_APART


@dataclass(frozen=True)
class Outcome:
    """What became of one kind's requests in one repeat; answers in the order of the wishes."""

    answers: Sequence[Answer | None]
    """None for an error or a lost future."""
    errors: Sequence[str]
    num_lost: int


@dataclass(frozen=True)
class Counts:
    """Requests of one kind that did not end as they should."""

    errors: int
    lost: int
    wrong: int


@dataclass(frozen=True)
class Figures:
    """One repeat."""

    seconds: float
    samples: Counts
    polls: Counts
    most_open_polls: int
    peak_gib: float
    peak_files: int
    errors: Sequence[str]
    """The first few."""


# -- the two kinds of clients ---------------------------------------------------------------------


def ask_sdk(client: tinker.SamplingClient, wishes: Sequence[Wish]) -> Outcome:
    """All wishes at once through the SDK; blocks until each has ended."""
    pending = [
        client.sample(
            types.ModelInput.from_ints(list(wish.prompt)),
            1,
            types.SamplingParams(max_tokens=wish.max_tokens, seed=wish.seed, stop=[]),
        )
        for wish in wishes
    ]
    deadline = time.monotonic() + ANSWER_SECONDS
    answers: list[Answer | None] = []
    errors: list[str] = []
    num_lost = 0
    for future in pending:
        answer = None
        try:
            result = future.result(timeout=max(0.0, deadline - time.monotonic()))
            drawn = result.sequences[0]
            answer = Answer(tuple(map(int, drawn.tokens)), tuple(map(float, drawn.logprobs or ())))
        except TimeoutError:
            num_lost += 1
        except Exception as error:  # whatever the SDK raises is this wish's outcome
            errors.append(f"{type(error).__name__}: {error}")
        answers.append(answer)
    return Outcome(answers, errors, num_lost)


class Polls:
    """Futures opened and polled, each from its own connection."""

    def __init__(self, sampler: TinkerSampler) -> None:
        self._sampler = sampler
        self._num_open = self.most_open = 0

    async def ask(self, connection: Connection, wish: Wish) -> Answer:
        request_id = await self._sampler.submit(
            connection, wish.prompt, max_tokens=wish.max_tokens, seed=wish.seed
        )
        self._num_open += 1
        self.most_open = max(self.most_open, self._num_open)
        try:
            reply = await self._sampler.retrieve(connection, request_id)
        finally:
            self._num_open -= 1
        drawn = reply.json["sequences"][0]
        return Answer(tuple(drawn["tokens"]), tuple(drawn["logprobs"]))

    async def ask_all(self, connections: Sequence[Connection], wishes: Sequence[Wish]) -> Outcome:
        async with asyncio.timeout(ANSWER_SECONDS + 1):
            pairs = zip(connections, wishes, strict=True)
            found = await asyncio.gather(
                *(asyncio.wait_for(self.ask(*pair), ANSWER_SECONDS) for pair in pairs),
                return_exceptions=True,
            )
        answers = [None if isinstance(each, BaseException) else each for each in found]
        failed = [each for each in found if isinstance(each, BaseException)]
        errors = [f"{type(e).__name__}: {e}" for e in failed if not isinstance(e, TimeoutError)]
        return Outcome(answers, errors, len(failed) - len(errors))


# -- one repeat -----------------------------------------------------------------------------------


@dataclass
class Peak:
    """The most that the service's processes held at once."""

    num_bytes: int = 0
    num_files: int = 0


@asynccontextmanager
async def watching(server: TestServer) -> AsyncIterator[Peak]:
    """Looks at the service's processes until the end of the block."""
    peak, gateway = Peak(), psutil.Process(server.process.pid)
    family = [gateway, *gateway.children(recursive=True)]

    async def watch() -> None:
        while True:
            peak.num_bytes = max(peak.num_bytes, sum(each.memory_info().rss for each in family))
            peak.num_files = max(peak.num_files, sum(each.num_fds() for each in family))
            await asyncio.sleep(WATCH_SECONDS)

    watcher = asyncio.create_task(watch())
    try:
        yield peak
    finally:
        watcher.cancel()


async def all_submitted(server: TestServer, sampling: asyncio.Task[Outcome], count: int) -> None:
    """Returns once so many results are pending, or the task has ended, or after a while."""
    deadline = time.monotonic() + SUBMIT_SECONDS
    async with httpx.AsyncClient(base_url=server.url) as http:
        while time.monotonic() < deadline and not sampling.done():
            lines = (await http.get("/metrics")).text.splitlines()
            pending = next(x for x in lines if x.startswith("openmint_futures_pending "))
            if float(pending.split()[1]) >= count:
                return
            await asyncio.sleep(0.05)


async def num_wrong(
    sampler: TinkerSampler,
    connections: Sequence[Connection],
    wishes: Sequence[Wish],
    outcome: Outcome,
) -> int:
    """How many answers don't belong to their wish; as many are asked at once as connections."""
    left = iter(zip(wishes, outcome.answers, strict=True))
    wrong = 0

    async def score(connection: Connection) -> None:
        nonlocal wrong
        for wish, answer in left:
            if answer is not None:
                found = await sampler.logprobs(connection, wish.prompt + answer.tokens)
                scored = [logprob or 0.0 for logprob in found[len(wish.prompt) :]]
                wrong += not answer.is_for(wish, scored)

    await asyncio.gather(*map(score, connections))
    return wrong


@dataclass(frozen=True)
class Rush:
    """Everybody asks at once."""

    server: TestServer
    sdk: tinker.SamplingClient
    sampler: TinkerSampler
    sample_wishes: Sequence[Wish]
    poll_wishes: Sequence[Wish]

    async def run(self) -> Figures:
        polls = Polls(self.sampler)
        async with (
            Connections(self.sampler.site, len(self.poll_wishes)) as connections,
            watching(self.server) as peak,
        ):
            started_at = time.monotonic()
            sdk_samples = asyncio.to_thread(ask_sdk, self.sdk, self.sample_wishes)
            sampling = asyncio.create_task(sdk_samples)
            await all_submitted(self.server, sampling, len(self.sample_wishes))
            polled = await polls.ask_all(connections, self.poll_wishes)
            sampled = await sampling
            seconds = time.monotonic() - started_at
        return Figures(
            seconds=seconds,
            samples=await self._count(self.sample_wishes, sampled),
            polls=await self._count(self.poll_wishes, polled),
            most_open_polls=polls.most_open,
            peak_gib=peak.num_bytes / 2**30,
            peak_files=peak.num_files,
            errors=[*sampled.errors, *polled.errors][:5],
        )

    async def _count(self, wishes: Sequence[Wish], outcome: Outcome) -> Counts:
        async with Connections(self.sampler.site, SCORED_AT_ONCE) as connections:
            wrong = await num_wrong(self.sampler, connections, wishes, outcome)
        return Counts(len(outcome.errors), outcome.num_lost, wrong)


async def find(
    server: TestServer, sdk: tinker.SamplingClient, size: Size, repeats: int
) -> list[Figures]:
    """Each repeat has wishes of its own."""
    sampler = await TinkerSampler.open(Site.of(server.url, server.admin_key), server.base)
    found = []
    for i in range(repeats):
        first = i * (size.num_samples + size.num_polls)
        samples = [Wish.number(first + j, (8, 16)) for j in range(size.num_samples)]
        first += size.num_samples
        polls = [Wish.number(first + j, (2, 5)) for j in range(size.num_polls)]
        found.append(await Rush(server, sdk, sampler, samples, polls).run())
        print(f"repeat {i + 1} of {repeats}: {found[-1].seconds:.0f} s", flush=True)
    return found


# -- the report -----------------------------------------------------------------------------------


def line(work: str, total: int, found: Sequence[Counts]) -> Line:
    errors, lost = sum(each.errors for each in found), sum(each.lost for each in found)
    wrong = sum(each.wrong for each in found)
    figure = f"{errors} errors, {lost} lost, {wrong} wrong of {total * len(found):,}"
    return Line(work, "no error, none lost", figure, verdict(errors + lost + wrong, at_most=0))


def report(found: Sequence[Figures], size: Size) -> Report:
    rows = [
        ["until all had their answers", Spread.of([each.seconds for each in found]).show(" s")],
        ["polls open at once, most", Spread.of([each.most_open_polls for each in found]).show()],
        ["peak memory of the service", Spread.of([each.peak_gib for each in found]).show(" GiB")],
        ["files it had open, most", Spread.of([each.peak_files for each in found]).show()],
    ]
    errors = [f"- {error}" for each in found for error in each.errors]
    return Report(
        question="load",
        title=f"{size.num_samples} samples and {size.num_polls:,} long polls at once",
        measured=MEASURED,
        tables=[
            table([["what", "median (range)"], *rows]),
            *(["\n".join(errors)] if errors else []),
        ],
        lines=[
            line(
                f"{size.num_samples} concurrent samples, Tinker SDK",
                size.num_samples,
                [each.samples for each in found],
            ),
            line(
                f"{size.num_polls:,} open long polls",
                size.num_polls,
                [each.polls for each in found],
            ),
        ],
        limits=LIMITS,
        data=[asdict(each) for each in found],
        versions={"service": versions(PACKAGES)},
    )


def answer(server: TestServer, repeats: int, size: Size) -> Report:
    """The report on a running service."""
    allow_open_files()
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        sdk = service.create_sampling_client(base_model=server.base).result()
        return report(asyncio.run(find(server, sdk, size, repeats)), size)


def ask(stage: Stage, repeats: int) -> Report:
    """`stage` is not needed: the service brings its own processes."""
    with (
        tempfile.TemporaryDirectory() as root,
        running_server(Path(root), bases_from=BASES) as server,
    ):
        return answer(server, repeats, Size())
