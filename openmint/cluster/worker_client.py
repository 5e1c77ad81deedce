"""The gateway's end of the link to the worker of one base, through restarts of the worker.

Lives on the gateway's event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from openmint.cluster.link import frame, read_frame
from openmint.errors import EngineFailed, WorkerLost
from openmint.scheduler.work import (
    Cancel,
    Command,
    Delta,
    Done,
    Drain,
    Failed,
    Forget,
    Hold,
    Prewarm,
    Ready,
    Result,
    SampleDelta,
    SampleResult,
    SampleWork,
    Submit,
    ToGateway,
    ToWorker,
    WorkerStats,
)
from openmint.types import BaseInfo, Digest, RunId, Tenant


class Observer(Protocol):
    """Hears how long each command took; `cli/gateway.py` joins the metrics to it."""

    def observe_command(self, base: str, kind: str, seconds: float, ok: bool) -> None: ...
    def observe_first_token(self, base: str, seconds: float) -> None: ...


class Meter(Protocol):
    """Hears what was used, for whom; `service/meter.py` adds it up."""

    def sampled(self, base: str, work: SampleWork, result: SampleResult) -> None: ...
    def spent(self, base: str, seconds: Mapping[Tenant, float]) -> None: ...


class Records(Protocol):
    """Hears what sampled tokens chose; `service/route_records.py` keeps it."""

    def sampled(self, base: Digest, work: SampleWork, result: SampleResult) -> None: ...


STATS_SECONDS = 1.0
"""How often a worker says what it holds."""
RETURN_SECONDS = 120.0
"""How long samples wait for a worker that died to be started again."""
STOPPED = "stopped while this was running"
HOLD_AGAIN_SECONDS = 30.0
"""After which a worker is told again what to hold, so that it tries again what failed."""
MOST_RUNS = 3
"""Workers that a sample may be sent to. If all of them died, it may be the cause."""


class Stream:
    """The deltas of one streamed sample, each of them once.

    A restarted worker draws the same tokens again. Those that the reader has are left out, after a
    comparison: two halves of different answers would be no answer.
    """

    def __init__(self) -> None:
        self.queue: asyncio.Queue[SampleDelta] = asyncio.Queue()
        self._tokens: dict[int, list[int]] = {}
        self._num_again: dict[int, int] = {}

    def begin_again(self) -> None:
        self._num_again = dict.fromkeys(self._tokens, 0)

    def put(self, delta: SampleDelta) -> None:
        """Raises EngineFailed for other tokens than those that were sent before."""
        sent = self._tokens.setdefault(delta.sample_index, [])
        at = self._num_again.pop(delta.sample_index, len(sent))
        again = sent[at : at + len(delta.tokens)]
        if not again:
            sent.extend(delta.tokens)
            self.queue.put_nowait(delta)
        elif tuple(again) == delta.tokens:
            self._num_again[delta.sample_index] = at + len(again)
        else:
            raise EngineFailed("the worker was restarted and went on differently; ask again")


@dataclass(eq=False, slots=True)
class Waiting:
    """A command whose result has not come."""

    command: Command
    future: asyncio.Future[Result]
    stream: Stream | None
    num_runs: int = 0


class WorkerClient:
    """Sends commands to one worker and hands each result to whoever waits for it.

    Samples outlive a worker: its successor draws them anew, with the same seeds. Commands of a
    training run end in WorkerLost with the worker that held the run; whoever sent them knows what
    has to come before them when they are sent again.

    Frames are `<u64 length><pickle>` on a socket pair that only these two processes hold, so no
    foreign byte is ever unpickled.
    """

    base: BaseInfo
    epoch: int
    """How many workers have had the base's journal, the present one included; 0 of a replica."""

    def __init__(self, replica: int = 0) -> None:
        self.replica = replica
        """0 is the worker that trains; the others of the base only draw samples."""
        self.stats = WorkerStats()
        self._resident: frozenset[Digest] = frozenset()
        self._asked_at: dict[Digest, float] = {}
        self.held: tuple[Digest, ...] = ()
        """What each worker behind this is told to keep in host memory."""
        self._hold_again_at = 0.0
        self.heard_at_seconds = 0.0
        """When the worker last said something; it does so about once a second, between steps."""
        self.observer: Observer | None = None
        self.meter: Meter | None = None
        self.records: Records | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._work_ids = itertools.count(1)
        self._waiting: dict[int, Waiting] = {}
        self._pump: asyncio.Task[None] | None = None
        self._giving_up: asyncio.TimerHandle | None = None
        self._is_over = False
        """Nobody is going to start another worker, as far as we know."""

    def expect(self, base: BaseInfo) -> None:
        """A worker with this base is on its way: what is asked of it waits."""
        self.base, self.epoch = base, 0

    def connect(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ready: Ready
    ) -> None:
        """Send everything to this worker from now on, first of all the samples that wait.

        What waits for another base's weights fails.
        """
        if self._giving_up:
            self._giving_up.cancel()
        if self._waiting and ready.base.digest != self.base.digest:
            self._fail_all("was restarted with other weights")
        if self.held and ready.base.digest != self.base.digest:
            self.held = ()  # revisions of the other base
        self.base, self.epoch = ready.base, ready.epoch
        self._writer, self._is_over = writer, False
        self._resident = frozenset()
        self._pump = asyncio.create_task(
            self._receive(reader), name=f"worker-link:{self.base.name}"
        )
        for work_id, waiting in self._waiting.items():
            if not waiting.future.done():
                self._start(work_id, waiting)
        if self.held:
            self._say_hold()

    @property
    def name(self) -> str:
        """The base's, and of a replica which one it is."""
        return f"{self.base.name}#{self.replica}" if self.replica else self.base.name

    @property
    def alive(self) -> bool:
        return self._writer is not None

    @property
    def num_waiting(self) -> int:
        """Commands whose results have not come."""
        return len(self._waiting)

    def has(self, revision: Digest) -> bool:
        """Whether the revision is in the worker's memory, or likely to be on its way there."""
        return revision in self._resident or revision in self._asked_at

    def is_resident(self, revision: Digest) -> bool:
        """Whether the worker that runs now has said that it is in its host memory."""
        return self.alive and revision in self._resident

    def sampled_revisions(self, tenant: Tenant) -> set[Digest]:
        """Those that samples of the tenant run on or wait for."""
        commands = (waiting.command for waiting in self._waiting.values())
        works = [each for each in commands if isinstance(each, SampleWork)]
        return {each.revision for each in works if each.tenant == tenant and each.revision}

    async def call(self, command: Command) -> Result:
        """The command's result. Raises what the worker raised, or WorkerLost if it died.

        Cancelling the awaiting task cancels a sample in the engine and frees its pages; commands of
        a training run are never cancelled, because they were accepted.
        """
        return await self._submit(command, None)

    async def stream(self, work: SampleWork) -> AsyncIterator[SampleDelta | SampleResult]:
        """Deltas as tokens appear, then the SampleResult. Closing the iterator cancels the work."""
        stream, started_at, is_first = Stream(), time.monotonic(), True
        task = asyncio.create_task(self._submit(work, stream))
        getter: asyncio.Task[SampleDelta] = asyncio.create_task(stream.queue.get())
        try:
            while True:
                await asyncio.wait({task, getter}, return_when=asyncio.FIRST_COMPLETED)
                if getter.done():
                    if is_first and self.observer:
                        elapsed = time.monotonic() - started_at
                        self.observer.observe_first_token(self.base.name, elapsed)
                    is_first = False
                    yield getter.result()
                    getter = asyncio.create_task(stream.queue.get())
                elif task.done():
                    break
            result = task.result()
            assert isinstance(result, SampleResult)
            yield result
        finally:
            getter.cancel()
            task.cancel()

    def forget(self, run_id: RunId, through_seq: int) -> None:
        """Tell the worker that the run's logged updates up to this request may go."""
        if self.alive:
            self._send(Forget(run_id, through_seq))

    def hold(self, revisions: tuple[Digest, ...]) -> None:
        """Have exactly these in the worker's host memory from now on, and in that of each one that
        comes after it. Cheap when nothing has changed."""
        is_soon = time.monotonic() < self._hold_again_at
        if revisions == self.held and (is_soon or not revisions):
            return
        self.held = revisions
        if self.alive:
            self._say_hold()

    async def drain(self) -> None:
        """Ask the worker to finish its queue and exit; returns when the link is closed."""
        self._is_over = True
        if self._pump and self.alive:
            self._send(Drain())
            await asyncio.wait({self._pump})
        self._fail_all(STOPPED)

    async def _submit(self, command: Command, stream: Stream | None) -> Result:
        if not isinstance(command, SampleWork) and not self.alive:
            raise WorkerLost(f"the worker of base {self.base.name!r} is not running; retry later")
        if self._is_over:
            raise EngineFailed(f"the worker of base {self.base.name!r} is not running; retry later")
        work_id = next(self._work_ids)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        waiting = self._waiting[work_id] = Waiting(command, future, stream)
        if isinstance(command, SampleWork | Prewarm) and command.revision is not None:
            self._asked_at[command.revision] = time.monotonic()
        started_at, ok = time.monotonic(), False
        try:
            if self.alive:
                self._start(work_id, waiting)
            result = await future
            ok = True
            if isinstance(command, SampleWork) and isinstance(result, SampleResult):
                if self.meter is not None:
                    self.meter.sampled(self.base.name, command, result)
                if self.records is not None:
                    self.records.sampled(self.base.digest, command, result)
            return result
        except asyncio.CancelledError:
            # Cancelling the awaiting task cancelled the future too, unless it was answered.
            if isinstance(command, SampleWork) and future.cancelled() and self.alive:
                self._send(Cancel(work_id))
            raise
        finally:
            self._waiting.pop(work_id, None)
            if self.observer:
                kind, elapsed = type(command).__name__, time.monotonic() - started_at
                self.observer.observe_command(self.base.name, kind, elapsed, ok)

    def _start(self, work_id: int, waiting: Waiting) -> None:
        if waiting.stream:
            waiting.stream.begin_again()
        waiting.num_runs += 1
        self._send(Submit(work_id, waiting.command))

    def _say_hold(self) -> None:
        self._hold_again_at = time.monotonic() + HOLD_AGAIN_SECONDS
        self._send(Hold(self.held))

    def _send(self, message: ToWorker) -> None:
        assert self._writer is not None
        self._writer.write(frame(message))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._deliver(await read_frame(reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the worker has gone
        finally:
            self._lose()

    def _lose(self) -> None:
        """The worker has gone: what its successor can't do fails."""
        if self._writer:
            self._writer.close()
            self._writer = None
        for waiting in self._waiting.values():
            if not isinstance(waiting.command, SampleWork):
                self._fail(waiting, STOPPED, WorkerLost)
            elif self._is_over:
                self._fail(waiting, STOPPED)
            elif waiting.num_runs >= MOST_RUNS:
                self._fail(waiting, f"died {MOST_RUNS} times while this was running")
        if not self._is_over:
            loop = asyncio.get_running_loop()
            self._giving_up = loop.call_later(RETURN_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._is_over = True
        self._fail_all(STOPPED)

    def _fail_all(self, what: str) -> None:
        for waiting in self._waiting.values():
            self._fail(waiting, what)

    def _fail(self, waiting: Waiting, what: str, kind: type[EngineFailed] = EngineFailed) -> None:
        if not waiting.future.done():
            message = f"the worker of base {self.base.name!r} {what}; retry later"
            waiting.future.set_exception(kind(message))

    def _deliver(self, message: ToGateway) -> None:
        self.heard_at_seconds = time.monotonic()
        match message:
            case Done(work_id, result):
                if (waiting := self._waiting.get(work_id)) and not waiting.future.done():
                    waiting.future.set_result(result)
            case Failed(work_id, error):
                if (waiting := self._waiting.get(work_id)) and not waiting.future.done():
                    waiting.future.set_exception(error)
            case Delta(work_id, delta):
                if (waiting := self._waiting.get(work_id)) and waiting.stream:
                    self._deliver_delta(work_id, waiting, waiting.stream, delta)
            case WorkerStats():
                self._take_in(message)
                if self.meter is not None:
                    self.meter.spent(self.base.name, message.tenant_seconds)
            case Ready():
                pass  # said once, before anything else, and heard by whoever started the worker

    def _take_in(self, stats: WorkerStats) -> None:
        self.stats, self._resident = stats, frozenset(stats.resident_revisions)
        # What was asked for since then, or is still waited for, may not be there yet.
        recent = time.monotonic() - STATS_SECONDS
        wanted = {getattr(each.command, "revision", None) for each in self._waiting.values()}
        self._asked_at = {
            revision: asked_at
            for revision, asked_at in self._asked_at.items()
            if asked_at > recent or revision in wanted
        }

    def _deliver_delta(
        self, work_id: int, waiting: Waiting, stream: Stream, delta: SampleDelta
    ) -> None:
        try:
            stream.put(delta)
        except EngineFailed as error:
            self._send(Cancel(work_id))
            if not waiting.future.done():
                waiting.future.set_exception(error)
