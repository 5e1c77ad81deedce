"""What the catalogue hands out: frozen rows with their names resolved. Times are aware UTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from openmint.errors import Forbidden, InvalidRequest
from openmint.types import Digest, LoraSpec, RunId, SessionId, Tenant

Role = Literal["admin", "train", "serve", "read"]
ROLES: tuple[Role, ...] = ("admin", "train", "serve", "read")
SessionStatus = Literal["open", "finished", "expired"]
RunStatus = Literal["live", "closed", "lost"]
RequestStatus = Literal["accepted", "done", "failed"]
Segment = Literal["weights", "sampler_weights", "external_weights"]
Origin = Literal["trained", "imported"]
AliasAction = Literal["set", "promote", "rollback", "canary_start", "canary_share", "canary_abort"]
EvaluationStatus = Literal["running", "finished", "failed"]


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated key: whose it is and what it may do."""

    tenant: Tenant
    role: Role
    key_id: str

    def require(self, *roles: Role) -> None:
        """Raises Forbidden unless the key has one of `roles`; an admin key may do everything."""
        if self.role != "admin" and self.role not in roles:
            wanted = " or ".join(("admin", *roles))
            raise Forbidden(f"this key has role {self.role!r}; this call needs {wanted}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it may be shown: never its secret, nor what the secret is checked against."""

    key_id: str
    tenant: Tenant
    role: Role
    note: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class Session:
    session_id: SessionId
    tenant: Tenant
    tags: tuple[str, ...]
    user_metadata: Mapping[str, str]
    display_name: str | None
    project_id: str | None
    sdk_version: str | None
    created_at: datetime
    last_seen_at: datetime
    finished_at: datetime | None
    status: SessionStatus
    finish_reason: str | None
    finish_detail: str | None


@dataclass(frozen=True, slots=True)
class Policy:
    policy_id: int
    tenant: Tenant
    name: str
    base_name: str
    base_digest: Digest
    user_metadata: Mapping[str, str]
    created_at: datetime
    owner: str
    """The session or the key that made it."""
    keep_revisions: int | None
    """How many of its newest revisions are kept; None: as many as the service's settings say."""


@dataclass(frozen=True, slots=True)
class Filters:
    """What a search wants; None asks for nothing."""

    prefix: str | None = None
    """How the policy's name begins."""
    tag: str | None = None
    owner: str | None = None
    base: str | None = None
    task: str | None = None
    """An evaluation task, by name, on which there is a score."""
    min_score: float | None = None

    def __post_init__(self) -> None:
        if self.min_score is not None and self.task is None:
            raise InvalidRequest("min_score is a score on a task; name the task")


@dataclass(frozen=True, slots=True)
class Keep:
    """What is kept of a policy that says nothing itself, and of all."""

    revisions: int
    """How many of the newest; 0: all."""
    rollbacks: int
    """How many rollbacks of each alias find their revision still there."""


@dataclass(frozen=True, slots=True)
class DoomedBlob:
    """Bytes that lost a record."""

    digest: Digest
    doomed_at: datetime | None
    """Since when they wait out their grace; None: they have none."""


@dataclass(frozen=True, slots=True)
class PolicyPage:
    """Some policies; `next_cursor` continues after them, None at the end."""

    items: tuple[Policy, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class RevisionPage:
    """The same of revisions."""

    items: tuple[Revision, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Run:
    run_id: RunId
    session_id: SessionId
    tenant: Tenant
    policy_id: int
    policy_name: str
    base_name: str
    base_digest: Digest
    model_seq_id: int
    spec: LoraSpec
    seed: int | None
    user_metadata: Mapping[str, str]
    optimizer_config: Mapping[str, Any] | None
    created_at: datetime
    last_request_at: datetime
    status: RunStatus
    num_optim_steps: int


@dataclass(frozen=True, slots=True)
class Revision:
    """Immutable weights of a policy. `number` counts from 1 within the policy."""

    policy_id: int
    policy_name: str
    tenant: Tenant
    number: int
    digest: Digest
    base_name: str
    base_digest: Digest
    spec: LoraSpec
    parent_digest: Digest | None
    run_id: RunId | None
    num_optim_steps: int
    size_bytes: int
    origin: Origin
    ephemeral: bool
    user_metadata: Mapping[str, str]
    created_at: datetime
    deleted_at: datetime | None
    drift: float | None
    """Largest distance of log-probabilities between trainer and sampler, in nats; None before its
    probe."""
    base_difference: float | None
    """The same between the revision and its base."""
    owner: str
    """The session or the key that made it."""


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """What a policy keeps, and what would be deleted of it now."""

    policy: Policy
    keep: Keep
    surplus: tuple[Revision, ...]

    @property
    def keep_revisions(self) -> int | None:
        """The policy's own number, or that of the settings; None: all."""
        return self.policy.keep_revisions or self.keep.revisions or None


@dataclass(frozen=True, slots=True)
class ImportOutcome:
    """What became of one adapter of an archive: a revision, or the error that refused it."""

    path: str
    policy: str
    digest: Digest | None = None
    number: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run's named save. `run_id`, `segment` and `name` make its `tinker://` path."""

    run_id: RunId
    segment: Segment
    name: str
    tenant: Tenant
    policy_id: int
    policy_name: str
    digest: Digest
    base_name: str
    base_digest: Digest
    size_bytes: int
    spec: LoraSpec
    num_optim_steps: int
    public: bool
    user_metadata: Mapping[str, str]
    optimizer_config: Mapping[str, Any] | None
    """The run's, as its client sent it."""
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Sampler:
    """A Tinker sampling session. `revision` None: the bare base."""

    sampler_id: str
    session_id: SessionId
    tenant: Tenant
    base_name: str
    base_digest: Digest
    revision: Digest | None
    model_path: str | None
    inflight_run: RunId | None
    """The run whose in-flight saves move this sampler, if any does."""
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Alias:
    """A movable name. `version` grows by one with every change."""

    policy_id: int
    policy_name: str
    name: str
    digest: Digest
    version: int
    updated_at: datetime
    canary_digest: Digest | None
    """A second revision, which answers a share of the requests."""
    canary_share: float | None
    canary_since: datetime | None


@dataclass(frozen=True, slots=True)
class AliasEvent:
    event_id: int
    policy_id: int
    alias: str
    action: AliasAction
    from_digest: Digest | None
    to_digest: Digest
    actor: str
    reason: str
    created_at: datetime
    share: float | None
    """The canary's, from then on."""
    override_reason: str | None
    """Why it was moved past gates that the revision did not pass."""


@dataclass(frozen=True, slots=True)
class Gate:
    """What a revision must have shown on a task before an alias may name it."""

    gate_id: int
    policy_id: int
    alias: str
    task_name: str
    task_digest: Digest | None
    """None: the task that was last kept under the name."""
    num_items: int | None
    """How many items must have been asked at least; None: all."""
    min_score: float | None
    """The score to reach; None where the revision is compared."""
    margin: float | None
    """How much worse than what the alias names it may be; None where `min_score` is set."""
    confidence: float
    """Of the comparison, one-sided."""
    created_at: datetime


@dataclass(frozen=True, slots=True)
class GateFailure:
    """A gate that a revision does not pass."""

    gate_id: int
    wanted: str
    found: str
    evaluation_id: int | None
    """Of the revision on the gate's task; None where there is none that counts."""
    score: float | None
    bound: float | None
    """Lower confidence bound of the difference to what the alias names."""
    run: tuple[str, ...]
    """Commands that bring what is missing."""


@dataclass(frozen=True, slots=True)
class Watch:
    """What the mean of an online metric must be, or a revision loses an alias's traffic."""

    watch_id: int
    policy_id: int
    alias: str
    metric: str
    at_least: float | None
    """The least mean; None where `at_most` is set."""
    at_most: float | None
    confidence: float
    """With which the mean must be on the wrong side."""
    min_observations: int
    window_seconds: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Pin:
    """An alias whose revisions are to stay in host memory."""

    tenant: Tenant
    policy_name: str
    alias: str
    created_at: datetime
    revisions: tuple[Revision, ...]
    """What the alias names now, and after that its canary, if one runs."""


@dataclass(frozen=True, slots=True)
class Observation:
    """Values of a metric, each from 0 to 1, for answers of a policy's revision."""

    policy: str
    digest: Digest
    metric: str
    num: int
    total: float
    """Their sum."""


@dataclass(frozen=True, slots=True)
class WatchFinding:
    """What a watch finds of one of its alias's revisions."""

    watch: Watch
    alias_version: int
    digest: Digest
    is_canary: bool
    num: int
    """Observations in the window, since the revision took its place."""
    mean: float | None
    low: float
    high: float
    """Confidence bounds of the mean."""
    failed: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """An evaluation that starts by itself on what an alias names."""

    schedule_id: int
    policy_id: int
    alias: str
    task: str
    """Name or digest."""
    num_items: int | None
    every_hours: float | None
    """None: whenever the alias names a revision that it did not name before."""
    last_digest: Digest | None
    next_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class DueEvaluation:
    """A revision that a schedule wants evaluated now."""

    tenant: Tenant
    policy: str
    digest: Digest
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class Resolved:
    """What an address meant at one moment; `alias` None when it named a digest."""

    revision: Revision
    alias: str | None


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """An evaluation task as it was uploaded. A changed body is another digest."""

    tenant: Tenant
    name: str
    digest: Digest
    body: Mapping[str, Any]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One scoring of a revision, or of a bare base when `digest` is None, on a task."""

    evaluation_id: int
    tenant: Tenant
    policy_name: str | None
    digest: Digest | None
    base_name: str
    task_name: str
    task_digest: Digest
    seed: int
    num_items: int
    num_correct: int
    score: float | None
    sampling: Mapping[str, Any]
    status: EvaluationStatus
    error: str | None
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class AuditEvent:
    event_id: int
    tenant: Tenant
    actor: str
    action: str
    subject: str
    details: Mapping[str, Any]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request of a training run."""

    run_id: RunId
    seq: int
    session_id: SessionId
    tenant: Tenant
    request_id: str
    kind: str
    fingerprint: bytes
    status: RequestStatus
    body: bytes | None
    needs: Digest | None
    """Stored bytes without which it can't be done again."""
    outcome: bytes | None


@dataclass(frozen=True, slots=True)
class Finished:
    """How a request ended."""

    run_id: RunId
    seq: int
    status: RequestStatus
    outcome: bytes
    keeps_body: bool
    """Whether its run can't be rebuilt without it."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """A run's state after its request `seq`."""

    digest: Digest
    seq: int


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tenant may use; None is without limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Trained, read and generated together."""
    resident_adapters: int | None = None
    """Live training runs, and revisions that are sampled from at one time."""
    stored_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class UsageHour:
    """What a tenant used of one base in one UTC hour."""

    tenant: Tenant
    base_name: str
    hour: datetime
    trained_tokens: int = 0
    prompt_tokens: int = 0
    """Without the cached ones."""
    cached_tokens: int = 0
    sampled_tokens: int = 0
    checkpoints: int = 0
    """Saves of any kind."""
    engine_seconds: float = 0.0
    """Its share of the steps that it was part of, by tokens."""
