"""What the control plane asks of a worker, and what comes back: plain frozen values, no torch.

Each command goes to the worker of one base and ends in exactly one result or one error of
`openmint.errors`. Commands of one run take effect in the order in which they were sent.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from openmint.types import (
    AdamParams,
    BaseInfo,
    Datum,
    Digest,
    FloatArray,
    IntArray,
    LoraSpec,
    LossSpec,
    Priority,
    RunId,
    SampledSequence,
    SamplingParams,
    Tenant,
    TopLogprobs,
)

LAST_SEQ = 1 << 62
"""Above every request of a run."""

# -- training: one lane per run, in order ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CreateRun:
    """Start a training session with a fresh adapter (A uniform by `seed`, B zero). -> RunState."""

    run_id: RunId
    tenant: Tenant
    spec: LoraSpec
    seed: int


@dataclass(frozen=True, slots=True)
class RestoreRun:
    """Start a training session, or overwrite a live one, from stored bytes. -> RunState.

    `kind` is what `digest` holds: a training state, or a revision (weights only).
    Without `optimizer` the Adam moments and step count start anew.
    """

    run_id: RunId
    tenant: Tenant
    digest: Digest
    kind: Literal["training", "revision"]
    optimizer: bool


@dataclass(frozen=True, slots=True)
class DropRun:
    """Free a training session's memory, and forget its updates. -> None. Unknown runs are fine."""

    run_id: RunId
    tenant: Tenant
    keeps_log: bool = False
    """Leave its updates in the log, as evidence."""


@dataclass(frozen=True, slots=True)
class TrainWork:
    """`forward_backward`, or `forward` alone. -> TrainResult. All or nothing for the gradient."""

    run_id: RunId
    tenant: Tenant
    data: tuple[Datum, ...]
    loss: LossSpec
    forward_only: bool


@dataclass(frozen=True, slots=True)
class OptimWork:
    """One AdamW update from the accumulated gradient, which it clears. -> OptimResult.

    Its result means that the update is logged, as durably as the worker's settings say. One that is
    in the log already is made from the gradient that lies there.
    """

    run_id: RunId
    tenant: Tenant
    adam: AdamParams
    seq: int = 0
    """Its place among the run's requests, under which it is logged."""
    is_acknowledged: bool = False
    """Its result was given before: what the log should hold and doesn't is an error."""


@dataclass(frozen=True, slots=True)
class SaveRun:
    """Write weights, moments, step count and pending gradient to the store. -> SavedBlob."""

    run_id: RunId
    tenant: Tenant


@dataclass(frozen=True, slots=True)
class ExportRun:
    """Write the current weights as a revision to the store. -> SavedBlob.

    With `keep_resident` the revision is also copied into a serving slot, so that the next sample
    loads nothing.
    """

    run_id: RunId
    tenant: Tenant
    keep_resident: bool


RunCommand = CreateRun | RestoreRun | DropRun | TrainWork | OptimWork | SaveRun | ExportRun


@dataclass(frozen=True, slots=True)
class RunState:
    spec: LoraSpec
    num_params: int
    num_optim_steps: int


@dataclass(frozen=True, slots=True)
class TrainResult:
    logprobs: tuple[FloatArray, ...]
    """Per datum, in order, in the shape of its `target_tokens`."""
    metrics: dict[str, float]
    """Keys are `name:reduction`, as the Tinker SDK combines chunks by reduction."""


@dataclass(frozen=True, slots=True)
class OptimResult:
    metrics: dict[str, float]
    num_optim_steps: int


@dataclass(frozen=True, slots=True)
class SavedBlob:
    """Bytes that are durable in the store under `digest`."""

    digest: Digest
    size_bytes: int
    spec: LoraSpec
    num_optim_steps: int


# -- sampling -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SampleWork:
    """Draw `num_samples` continuations of one prompt from one revision. -> SampleResult.

    `revision` None means the base itself. The worker loads the revision from the store when it is
    not resident. Sample i draws with `params.seed + i`.
    """

    tenant: Tenant
    revision: Digest | None
    prompt_T: IntArray
    params: SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs_NK: IntArray | None = None
    """Candidate tokens whose log-probability is wanted at prompt positions 1..; -1 skips a cell."""
    prompt_alternatives: int = 0
    """Independent draws at the temperature of `params`, at prompt positions 1.."""
    routes: bool = False
    """Have the result say what the tokens chose on their way."""
    stream: bool = False
    """Send a SampleDelta after each step that produced tokens, then the SampleResult."""
    priority: Priority = Priority.INTERACTIVE
    load_seconds: float | None = None
    """How long it may wait for its revision to be in memory; None leaves it to the worker. If that
    is not likely to be enough, or was not, it ends in Overloaded."""


@dataclass(frozen=True, slots=True)
class SampleDelta:
    """New tokens of one sample of a streaming SampleWork."""

    sample_index: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: TopLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Spent:
    """Where a work's time between its arrival at the worker and its end went."""

    engine_seconds: float = 0.0
    """The engine computed, for whomever."""
    scheduler_seconds: float = 0.0
    """It did not."""

    @property
    def seconds(self) -> float:
        return self.engine_seconds + self.scheduler_seconds


@dataclass(frozen=True, slots=True)
class SampleResult:
    sequences: tuple[SampledSequence, ...]
    revision: Digest | None
    """Read in the engine from the slot that ran; None when the base answered."""
    base: Digest
    epoch: int = 0
    """Which worker of the base answered, counted since its data folder was made."""
    prompt_logprobs_T: FloatArray | None = None
    """Index 0 is NaN: nothing predicts the first token."""
    topk_prompt_logprobs: TopLogprobs | None = None
    target_prompt_logprobs_NK: FloatArray | None = None
    prompt_alternatives: TopLogprobs | None = None
    """The draws that were asked for: row i holds alternatives to prompt token i + 1."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    spent: Spent = Spent()


@dataclass(frozen=True, slots=True)
class ScoreWork:
    """Read a revision's bytes from the store and run a text as the trainer does. -> Scored."""

    tenant: Tenant
    revision: Digest
    tokens_T: IntArray


@dataclass(frozen=True, slots=True)
class Scored:
    logprobs_T: FloatArray
    """Of the tokens after the first."""
    is_zero: bool
    """Every B of the adapter is zero, so that it changes nothing."""


@dataclass(frozen=True, slots=True)
class Prewarm:
    """Read a revision into host memory, after those that samples wait for. -> None, once it is
    there. It may leave again like any other."""

    tenant: Tenant
    revision: Digest
    load_seconds: float | None = None
    """As in SampleWork."""


Command = RunCommand | SampleWork | ScoreWork | Prewarm
Result = RunState | TrainResult | OptimResult | SavedBlob | SampleResult | Scored | None


# -- the link between gateway and worker ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    work_id: int
    command: Command
    received_at_seconds: float = field(default_factory=time.monotonic)
    """On the worker's clock; its link notes it anew."""


@dataclass(frozen=True, slots=True)
class Cancel:
    work_id: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish what is queued, then exit."""


@dataclass(frozen=True, slots=True)
class Forget:
    """The run's logged updates up to this request are not needed any more."""

    run_id: RunId
    through_seq: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep exactly these revisions in host memory from now on: what is new is loaded after all that
    somebody waits for, what was held before and isn't named may leave. Said again, what could not
    be loaded is tried again. Has no result; `WorkerStats` says what is in memory."""

    revisions: tuple[Digest, ...]


ToWorker = Submit | Cancel | Forget | Hold | Drain


@dataclass(frozen=True, slots=True)
class Ready:
    """The base is resident and answers."""

    base: BaseInfo
    epoch: int
    """How many workers have had this base's log, this one included."""
    logged: Mapping[RunId, tuple[int, ...]]
    """The requests whose updates are in the log."""


@dataclass(frozen=True, slots=True)
class Done:
    work_id: int
    result: Result


@dataclass(frozen=True, slots=True)
class Failed:
    work_id: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Delta:
    work_id: int
    delta: SampleDelta


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A worker's gauges and counters since it started; sent about once a second."""

    num_running_sequences: int = 0
    num_waiting_sequences: int = 0
    num_waiting_train: int = 0
    num_training_runs: int = 0
    num_resident_revisions: int = 0
    """In host memory; some of them in slots too."""
    num_slots: int = 0
    num_waiting_loads: int = 0
    kv_pages_total: int = 0
    kv_pages_used: int = 0
    training_bytes: int = 0
    host_bytes: int = 0
    pinned_bytes: int = 0
    """Of those, what pins hold."""
    serving_bytes: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    trained_tokens: int = 0
    optim_steps: int = 0
    revision_loads: int = 0
    revision_prefetches: int = 0
    """Loads that were begun because somebody is likely to ask."""
    revision_evictions: int = 0
    slot_evictions: int = 0
    deadlines_missed: int = 0
    preemptions: int = 0
    journal_bytes: int = 0
    journal_is_sound: bool = True
    """False once a sync failed: no update is acknowledged until the worker is started again."""
    train_seconds: float = 0.0
    serve_seconds: float = 0.0
    resident_revisions: tuple[Digest, ...] = ()
    """Those in host memory."""
    slot_revisions: tuple[Digest, ...] = ()
    tenant_seconds: Mapping[Tenant, float] = field(default_factory=dict)
    """Engine time since the message before, shared by tokens among those in each step."""


ToGateway = Ready | Done | Failed | Delta | WorkerStats
