"""The worker's mind: takes commands in, decides each engine step, sends results out.

Single-threaded. Knows no torch: the engine is a protocol, adapter weights are opaque. Reading and
writing of the store happens in the background; its ends come back through `post` to this thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from openmint.config import WorkerConfig
from openmint.engine.plan import ChunkOutcome, MicroBatch, SampleBatch
from openmint.errors import (
    EngineFailed,
    InvalidRequest,
    NonFinite,
    OpenMintError,
    Overloaded,
    StoreFailed,
)
from openmint.residency.decisions import Recalled
from openmint.scheduler.batcher import Batcher
from openmint.scheduler.engine_time import Arrival, EngineTime
from openmint.scheduler.fairness import PhaseClock, TenantClock
from openmint.scheduler.lanes import Entry, Lanes
from openmint.scheduler.prompt_scores import prompt_scores
from openmint.scheduler.seams import (
    Archive,
    Background,
    Decisions,
    EngineProtocol,
    LoggedUpdate,
    Update,
    Updates,
    Weights,
)
from openmint.scheduler.sequences import DecodeText, Sequence
from openmint.scheduler.tiers import Tiers
from openmint.scheduler.work import (
    LAST_SEQ,
    Cancel,
    CreateRun,
    Delta,
    Done,
    DropRun,
    ExportRun,
    Failed,
    Forget,
    Hold,
    OptimResult,
    OptimWork,
    Prewarm,
    RestoreRun,
    Result,
    RunState,
    SampleDelta,
    SampleResult,
    SampleWork,
    SavedBlob,
    SaveRun,
    Scored,
    ScoreWork,
    Submit,
    ToGateway,
    TrainResult,
    TrainWork,
    WorkerStats,
)
from openmint.types import (
    Digest,
    LoraSpec,
    Priority,
    RunId,
    Tenant,
)

log = logging.getLogger(__name__)

OPTIMIZER = "adamw/2"
"""What a logged gradient was applied by, and in which order its values are; another one would make
another state of it."""
EXPIRY_SECONDS = 0.25
"""How often the waiting are looked through for those whose time is over."""


@dataclass(eq=False)
class Sampling:
    """A sample work in progress."""

    work_id: int
    work: SampleWork
    unfinished: list[Sequence]
    sequences: list[Sequence]
    arrival: Arrival
    deadline_at: float
    """When its revision must be in memory."""
    ran: set[Digest | None] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Prewarming:
    """A prewarm whose revision isn't in memory yet."""

    revision: Digest
    deadline_at: float


class Scheduler:
    def __init__(
        self,
        engine: EngineProtocol,
        archive: Archive,
        updates: Updates,
        decisions: Decisions,
        config: WorkerConfig,
        decode: DecodeText,
        send: Callable[[ToGateway], None],
        background: Background,
    ) -> None:
        self._engine, self._archive, self._send = engine, archive, send
        self._updates = updates
        self._background = background
        self._micro_batch_tokens = config.micro_batch_tokens
        self._all_alone = config.deterministic
        self._load_seconds = config.load_deadline_seconds
        self._lanes = Lanes()
        self._batcher = Batcher(
            engine.num_pages,
            config.page_tokens,
            config.step_tokens,
            config.running_sequences,
            decode,
            engine.routes,
        )
        self._decisions = decisions
        self._tiers = Tiers(
            engine, archive, self._in_background, config, decisions, self._fail_revision
        )
        self._sampling: dict[int, Sampling] = {}
        self._prewarming: dict[int, Prewarming] = {}
        self._next_sequence_id = 0
        self._tenants, self._phases = TenantClock(), PhaseClock()
        self._engine_time = EngineTime()
        self._tenant_seconds: defaultdict[Tenant, float] = defaultdict(float)
        self._num_background = 0
        self._next_expiry = 0.0
        self._counters = dict.fromkeys(
            ("prompt", "cached", "generated", "trained", "optim", "missed"), 0
        )

    # -- commands in ------------------------------------------------------------------------------

    def submit(self, message: Submit) -> None:
        """Queue a command. Errors that are known at once are answered at once."""
        command = message.command
        self._tenants.arrive(command.tenant, self._busy_tenants())
        try:
            if isinstance(command, ScoreWork):
                self._score(message.work_id, command)
            elif isinstance(command, Prewarm):
                self._prewarm(message.work_id, command)
            elif isinstance(command, SampleWork):
                arrival = self._engine_time.arrival(message.received_at_seconds)
                self._submit_sample(message.work_id, command, arrival)
            else:
                self._lanes.add(Entry(message.work_id, command, is_alone=self._all_alone))
        except OpenMintError as error:
            self._send(Failed(message.work_id, error))

    def cancel(self, message: Cancel) -> None:
        """Stop a sample work and free its pages. Unknown or finished ones are fine."""
        if (sampling := self._sampling.get(message.work_id)) is not None:
            self._end_sampling(sampling)

    @property
    def is_idle(self) -> bool:
        """Nothing queued, running or in the background."""
        return (
            not self._sampling
            and not self._prewarming
            and not any(True for _ in self._lanes)
            and not self._num_background
        )

    def _busy_tenants(self) -> list[Tenant]:
        training = [entry.tenant for entry in self._lanes]
        return training + [sampling.work.tenant for sampling in self._sampling.values()]

    def _submit_sample(self, work_id: int, work: SampleWork, arrival: Arrival) -> None:
        num_tokens = len(work.prompt_T) + work.params.max_tokens
        limit = min(self._engine.base.context_length, self._batcher.capacity_tokens)
        if num_tokens > limit:
            raise InvalidRequest(
                f"prompt of {len(work.prompt_T)} and max_tokens {work.params.max_tokens} make "
                f"{num_tokens} tokens; this worker holds {limit}. Shorten one of them"
            )
        deadline_at = arrival.at_seconds + self._load_seconds_of(work)
        if work.revision is not None:
            self._tiers.want(work.revision, work.priority, deadline_at)
        sampling = Sampling(work_id, work, [], [], arrival, deadline_at)
        for index in range(work.num_samples):
            self._next_sequence_id += 1
            tokens = [int(token) for token in work.prompt_T]
            sequence = Sequence(self._next_sequence_id, work_id, index, work, tokens, len(tokens))
            sampling.sequences.append(sequence)
            sampling.unfinished.append(sequence)
            self._batcher.add(sequence)
        self._sampling[work_id] = sampling
        self._counters["prompt"] += len(work.prompt_T)

    # -- steps ------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do the next piece of work. False when there is none until a message or a load arrives."""
        self._expire()
        self._tiers.take_in()
        self._end_prewarms()
        if (entry := self._lanes.next_control()) is not None:
            self._control(entry)
            return True
        trainable = bool(self._lanes.trainable())
        if trainable and (self._phases.prefers_training() or not self._sampling):
            self._train()
            return True
        if (plan := self._plan_sampling()) is not None:
            self._sample(plan, trainable)
            return True
        if trainable:
            self._train()
        return trainable

    def _plan_sampling(self) -> SampleBatch | None:
        """The next sampling step, its revisions in slots. None when nothing can run."""
        host, slots = self._tiers.host, self._tiers.slots
        for _ in range(2):  # whoever has a slot may have had to give up its pages
            self._tiers.fill_slots(self._batcher.ready(host.__contains__, self._tenants))
            plan = self._batcher.plan(slots.__contains__, self._tenants)
            if plan is not None or not self._batcher.running:
                return plan
        return None

    def _train(self) -> None:
        started = time.monotonic()
        plan, entries = self._lanes.plan(self._micro_batch_tokens, self._tenants)
        entries = [entry for entry in entries if self._open(entry)]
        by_id = {entry.work_id: entry for entry in entries}
        items = tuple(item for item in plan.items if item.work_id in by_id)
        if not items:
            return
        try:
            self._engine.train(MicroBatch(items, plan.num_tokens))
        except Exception as error:  # a step's edge: everyone in it must hear
            for entry in entries:
                self._engine.abandon_train(entry.work_id)
                if len(entries) > 1:
                    entry.start_over_alone()  # a neighbour may be the cause
                else:
                    self._finish_entry(entry, _as_known(error))
            return
        finally:
            seconds = self._engine_time.add_step(started, time.monotonic())
            self._phases.charge_training(seconds, bool(self._sampling))
        tokens = Counter[Tenant]()
        for item in items:
            entry = by_id[item.work_id]
            num_tokens = entry.tokens_of(item.datum_index)
            entry.num_unfinished -= 1
            self._tenants.charge(entry.tenant, num_tokens)
            self._counters["trained"] += num_tokens
            tokens[entry.tenant] += num_tokens
        self._share_seconds(seconds, tokens)
        for entry in entries:
            if not entry.num_unfinished:
                self._close(entry)

    def _open(self, entry: Entry) -> bool:
        """Begin a train work. False when it was refused, which its own client alone hears."""
        command = entry.command
        if entry.is_open or not isinstance(command, TrainWork):
            return True
        run = (command.run_id, command.data, command.loss, command.forward_only)
        try:
            self._engine.open_train(entry.work_id, *run)
        except Exception as error:  # a task's edge
            self._finish_entry(entry, _as_known(error))
            return False
        entry.is_open = True
        return True

    def _close(self, entry: Entry) -> None:
        try:
            logprobs, metrics = self._engine.close_train(entry.work_id)
        except NonFinite as error:
            if entry.had_company:
                entry.start_over_alone()
            else:
                self._finish_entry(entry, error)
        else:
            self._finish_entry(entry, TrainResult(logprobs, metrics))

    def _sample(self, plan: SampleBatch, training_waits: bool) -> None:
        started = time.monotonic()
        try:
            outcomes = self._engine.sample(plan)
        except Exception as error:  # a step's edge: everyone in it must hear
            ran = {chunk.sequence_id for chunk in plan.chunks}
            failed = {s.work_id for s in self._batcher.running if s.sequence_id in ran}
            for work_id in failed:
                self._fail_sampling(self._sampling[work_id], _as_known(error))
            return
        finally:
            seconds = self._engine_time.add_step(started, time.monotonic())
            self._phases.charge_serving(seconds, training_waits)
        self._tiers.ran(plan.revisions)
        results = self._batcher.finish(outcomes)
        tokens = Counter[Tenant]()
        for chunk, (sequence, outcome) in zip(plan.chunks, results, strict=True):
            self._tenants.charge(sequence.tenant, len(chunk.tokens_N))
            tokens[sequence.tenant] += len(chunk.tokens_N)
            self._advance(sequence, outcome)
        self._share_seconds(seconds, tokens)

    def _advance(self, sequence: Sequence, outcome: ChunkOutcome) -> None:
        sampling = self._sampling.get(sequence.work_id)
        if sampling is None:
            return  # it failed earlier in this very step
        sampling.ran.add(outcome.revision)
        if outcome.revision != sampling.work.revision:
            wrong = f"slot held {outcome.revision}, the request was for {sampling.work.revision}"
            self._fail_sampling(sampling, EngineFailed(f"wrong adapter: {wrong}; nothing returned"))
            return
        if outcome.token is None:
            return
        if not math.isfinite(outcome.logprob):
            of = f"revision {outcome.revision}" if outcome.revision else "the base"
            self._fail_sampling(sampling, NonFinite(f"{of} computes NaN or infinite values here"))
            return
        self._counters["generated"] += 1
        if sampling.work.stream:
            index, token = sequence.sample_index, (outcome.token,)
            delta = SampleDelta(index, token, (outcome.logprob,), outcome.top)
            self._send(Delta(sampling.work_id, delta))
        if sequence.stop_reason is not None:
            sampling.unfinished.remove(sequence)
            if not sampling.unfinished:
                self._counters["cached"] += sampling.sequences[0].num_cached
                self._send(Done(sampling.work_id, self._sample_result(sampling)))
                self._end_sampling(sampling)

    def _sample_result(self, sampling: Sampling) -> SampleResult:
        (revision,) = sampling.ran
        return SampleResult(
            sequences=tuple(sequence.result() for sequence in sampling.sequences),
            revision=revision,
            base=self._engine.base.digest,
            epoch=self._updates.epoch,
            num_cached_tokens=sampling.sequences[0].num_cached,
            spent=self._engine_time.since(sampling.arrival, time.monotonic()),
            **prompt_scores(sampling.work, sampling.sequences[0].scored),
        )

    def _end_sampling(self, sampling: Sampling) -> None:
        """Forget a work: its sequences, their pages, its pin."""
        del self._sampling[sampling.work_id]
        for sequence in sampling.unfinished:
            if sequence.stop_reason is None:
                self._batcher.remove(sequence)
        if sampling.work.revision is not None:
            self._tiers.release(sampling.work.revision)

    def _fail_sampling(self, sampling: Sampling, error: OpenMintError) -> None:
        self._end_sampling(sampling)
        self._send(Failed(sampling.work_id, error))

    # -- commands of a run other than training -----------------------------------------------------

    def _control(self, entry: Entry) -> None:
        try:
            self._run_control(entry)
        except Exception as error:  # a task's edge: the lane and its worker go on
            self._finish_entry(entry, _as_known(error))

    def _run_control(self, entry: Entry) -> None:
        engine, archive = self._engine, self._archive
        match entry.command:
            case CreateRun(run_id, _, spec, seed):
                num_params = engine.create_run(run_id, spec, seed)
                self._finish_entry(entry, RunState(spec, num_params, 0))
            case DropRun(run_id, _, keeps_log):
                engine.drop_run(run_id)
                if not keeps_log:
                    self._updates.forget(run_id, LAST_SEQ)
                self._finish_entry(entry, None)
            case OptimWork():
                self._update(entry, entry.command)
            case SaveRun(run_id):
                snapshot = engine.snapshot_run(run_id)
                steps = snapshot.num_optim_steps
                self._save(entry, lambda: archive.save_training(snapshot), snapshot.spec, steps)
            case ExportRun(run_id, _, keep_resident):
                weights, steps = engine.export_run(run_id)
                keep = weights if keep_resident else None
                self._save(entry, lambda: archive.save_revision(weights), weights.spec, steps, keep)
            case RestoreRun():
                self._restore(entry, entry.command)

    def _update(self, entry: Entry, command: OptimWork) -> None:
        """Make an update, log it in the background, then have it take effect.

        The lane waits meanwhile. An update that the log holds takes effect at once.
        """
        run_id, seq = command.run_id, command.seq
        logged = self._updates.find(run_id, seq, must_be=command.is_acknowledged)
        if logged is not None:
            self._read_gradient(run_id, logged)
        update = self._engine.prepare_update(run_id, command.adam)
        head = {
            "optimizer": OPTIMIZER,
            "adam": asdict(command.adam),
            "num_optim_steps": update.num_optim_steps,
        }
        if logged is None:
            entry.is_open = True
            end = partial(self._end_update, entry, run_id, update)
            self._updates.append(run_id, seq, head, update.gradient, end)
        else:
            self._end_update(entry, run_id, update, _unlike(logged.head, head))

    def _read_gradient(self, run_id: RunId, logged: LoggedUpdate) -> None:
        try:
            self._engine.read_gradient(run_id, logged.read_into)
        except StoreFailed:
            self._engine.drop_run(run_id)  # what follows would be built on another state
            raise

    def _end_update(
        self, entry: Entry, run_id: RunId, update: Update, error: Exception | None
    ) -> None:
        if error is not None:
            self._engine.discard_update(run_id, update)
            self._finish_entry(entry, _as_known(error))
            return
        self._engine.publish_update(run_id, update)
        self._counters["optim"] += 1
        metrics = {"grad_norm:max": update.grad_norm}
        self._finish_entry(entry, OptimResult(metrics, update.num_optim_steps))

    def forget_updates(self, message: Forget) -> None:
        self._updates.forget(message.run_id, message.through_seq)

    def _save(
        self,
        entry: Entry,
        job: Callable[[], tuple[Digest, int]],
        spec: LoraSpec,
        num_optim_steps: int,
        keep: Weights | None = None,
    ) -> None:
        """Write in the background what was captured here; the lane goes on meanwhile."""
        self._lanes.remove(entry)

        def saved(value: Any, error: Exception | None) -> None:
            if error is not None:
                self._answer(entry.work_id, _as_known(error))
                return
            digest, size_bytes = value
            if keep is not None:
                self._tiers.keep(digest, keep.on_host())
            self._answer(entry.work_id, SavedBlob(digest, size_bytes, spec, num_optim_steps))

        self._in_background(job, saved)

    def _restore(self, entry: Entry, command: RestoreRun) -> None:
        """Read in the background; the lane waits, as its next commands mean the restored state."""
        entry.is_open = True
        digest, archive = command.digest, self._archive
        load = archive.load_training if command.kind == "training" else archive.load_as_training

        def loaded(snapshot: Any, error: Exception | None) -> None:
            try:
                if error is not None:
                    raise error
                if not command.optimizer:
                    snapshot = snapshot.weights_only()
                num_params = self._engine.restore_run(command.run_id, snapshot)
            except Exception as failure:  # a task's edge
                self._finish_entry(entry, _as_known(failure))
            else:
                steps = snapshot.num_optim_steps
                self._finish_entry(entry, RunState(snapshot.spec, num_params, steps))

        self._in_background(lambda: load(digest), loaded)

    def _finish_entry(self, entry: Entry, result: Result | OpenMintError) -> None:
        self._lanes.remove(entry)
        self._answer(entry.work_id, result)

    def _answer(self, work_id: int, result: Result | OpenMintError) -> None:
        failed = isinstance(result, OpenMintError)
        self._send(Failed(work_id, result) if failed else Done(work_id, result))  # type: ignore[arg-type]

    # -- residency --------------------------------------------------------------------------------

    def recall(self, past: Recalled) -> None:
        """Go on from what an earlier worker was asked for; call it before the first step."""
        self._tiers.recall(past)

    def stop_guessing(self) -> None:
        """Begin no load that nobody asked for: the worker is about to end."""
        self._tiers.stop_guessing()

    def hold(self, message: Hold) -> None:
        try:
            self._tiers.hold(message.revisions)
        except Overloaded as error:  # the message comes again
            log.warning("not all pinned revisions are loaded now: %s", error.message)

    def _prewarm(self, work_id: int, work: Prewarm) -> None:
        deadline_at = time.monotonic() + self._load_seconds_of(work)
        self._tiers.want(work.revision, Priority.PREFETCH, deadline_at)
        self._prewarming[work_id] = Prewarming(work.revision, deadline_at)

    def _end_prewarms(self) -> None:
        for work_id, prewarming in list(self._prewarming.items()):
            if prewarming.revision in self._tiers.host:
                self._end_prewarm(work_id, None)

    def _end_prewarm(self, work_id: int, result: OpenMintError | None) -> None:
        self._tiers.release(self._prewarming.pop(work_id).revision)
        self._answer(work_id, result)

    def _load_seconds_of(self, work: SampleWork | Prewarm) -> float:
        return self._load_seconds if work.load_seconds is None else work.load_seconds

    def _fail_revision(self, revision: Digest, error: Exception) -> None:
        """Its load failed: all who wait for it hear why."""
        if self._tiers.is_held(revision):
            log.warning("pinned revision %s was not loaded: %s", revision, error)
        for work_id, prewarming in list(self._prewarming.items()):
            if prewarming.revision == revision:
                self._end_prewarm(work_id, _as_known(error))
        for sampling in [s for s in self._sampling.values() if s.work.revision == revision]:
            self._fail_sampling(sampling, _as_known(error))

    def _expire(self) -> None:
        """Refuse those whose revision isn't in memory when their time is over."""
        if (now := time.monotonic()) < self._next_expiry:
            return
        self._next_expiry = now + EXPIRY_SECONDS
        retry_after = max(1.0, self._tiers.times.mean_seconds)
        for work_id, prewarming in list(self._prewarming.items()):
            if now > prewarming.deadline_at:
                text = f"revision {prewarming.revision} found no time or place in memory"
                self._end_prewarm(work_id, Overloaded(text, retry_after))
        for sampling in list(self._sampling.values()):
            revision = sampling.work.revision
            waits = revision is not None and revision not in self._tiers.host
            if waits and now > sampling.deadline_at:
                self._counters["missed"] += 1
                waited = now - sampling.arrival.at_seconds
                text = f"revision {revision} was not in memory after {waited:.1f} s; ask again"
                self._fail_sampling(sampling, Overloaded(text, retry_after))

    def _in_background(
        self, job: Callable[[], Any], then: Callable[[Any, Exception | None], None]
    ) -> None:
        self._num_background += 1

        def ended(value: Any, error: Exception | None) -> None:
            self._num_background -= 1
            then(value, error)

        self._background(job, ended)

    # -- probes -----------------------------------------------------------------------------------

    def _score(self, work_id: int, work: ScoreWork) -> None:
        """Read the revision in the background, then run the text between two steps."""

        def loaded(weights: Any, error: Exception | None) -> None:
            try:
                if error is not None:
                    raise error
                scored = Scored(*self._engine.score(weights, work.tokens_T))
            except Exception as failure:  # a task's edge
                self._answer(work_id, _as_known(failure))
            else:
                self._answer(work_id, scored)

        self._in_background(lambda: self._archive.load_revision(work.revision), loaded)

    # -- gauges -----------------------------------------------------------------------------------

    def stats(self) -> WorkerStats:
        self._decisions.flush()
        counters, pool, tiers = self._counters, self._batcher.pool, self._tiers
        return WorkerStats(
            num_running_sequences=len(self._batcher.running),
            num_waiting_sequences=len(self._batcher.waiting),
            num_waiting_train=sum(isinstance(e.command, TrainWork) for e in self._lanes),
            num_training_runs=self._engine.num_runs,
            num_resident_revisions=len(tiers.host),
            num_slots=len(tiers.slots),
            num_waiting_loads=tiers.loads.num_waiting,
            kv_pages_total=pool.num_pages,
            kv_pages_used=pool.num_used,
            training_bytes=self._engine.training_bytes,
            host_bytes=tiers.host.used_bytes,
            pinned_bytes=tiers.held_bytes(),
            serving_bytes=tiers.slots.used_bytes,
            prompt_tokens=counters["prompt"],
            cached_prompt_tokens=counters["cached"],
            generated_tokens=counters["generated"],
            trained_tokens=counters["trained"],
            optim_steps=counters["optim"],
            revision_loads=tiers.counters["loads"],
            revision_prefetches=tiers.counters["prefetches"],
            revision_evictions=tiers.counters["evictions"],
            slot_evictions=tiers.counters["slot_evictions"],
            deadlines_missed=counters["missed"],
            preemptions=self._batcher.num_preemptions,
            journal_bytes=self._updates.num_bytes,
            journal_is_sound=self._updates.is_sound,
            train_seconds=self._phases.train_seconds,
            serve_seconds=self._phases.serve_seconds,
            resident_revisions=tiers.host.resident,
            slot_revisions=tiers.slots.resident,
            tenant_seconds=self._take_tenant_seconds(),
        )

    def _take_tenant_seconds(self) -> dict[Tenant, float]:
        taken, self._tenant_seconds = self._tenant_seconds, defaultdict(float)
        return dict(taken)

    def _share_seconds(self, seconds: float, tokens: Counter[Tenant]) -> None:
        for tenant, num_tokens in tokens.items():
            self._tenant_seconds[tenant] += seconds * num_tokens / tokens.total()


def _as_known(error: Exception) -> OpenMintError:
    """Our own errors as they are; anything else is logged whole and told in one line."""
    if isinstance(error, OpenMintError):
        return error
    log.error("step_failed", exc_info=error)
    return EngineFailed(f"the engine failed: {type(error).__name__}: {error}")


def _unlike(logged: Mapping[str, Any], head: Mapping[str, Any]) -> StoreFailed | None:
    """What is wrong with making this update from that frame of the log."""
    for name, value in head.items():
        if logged.get(name) != value:
            return StoreFailed(f"an update was logged with {name} {logged.get(name)}, not {value}")
    return None
