"""What the requests of a run ask for, and what comes of them: plain values that the journal keeps.

An order is a worker's command where that says it all (`TrainWork`, `OptimWork`), else one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from openmint import errors
from openmint.catalog.records import Segment
from openmint.errors import OpenMintError, Overloaded
from openmint.journal.codec import Codec
from openmint.scheduler.work import (
    CreateRun,
    OptimResult,
    OptimWork,
    RestoreRun,
    TrainResult,
    TrainWork,
)
from openmint.types import (
    AdamParams,
    BaseInfo,
    Datum,
    Digest,
    LoraSpec,
    LossSpec,
    RecordedRoutes,
    SessionId,
    TargetModule,
    TargetStack,
)

START_SEQ = 0
"""The request that starts a run; those of clients begin at 1."""


@dataclass(frozen=True, slots=True)
class StartOrder:
    """Start a run by `command`."""

    kind: str
    session_id: SessionId
    model_seq_id: int
    base: Digest
    spec: LoraSpec
    user_metadata: Mapping[str, str]
    command: CreateRun | RestoreRun


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Overwrite the run's state with a checkpoint's, which `command` names by its bytes."""

    path: str
    command: RestoreRun


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Save the run's state under a name."""

    segment: Segment
    name: str
    ttl_seconds: int | None
    overwrite: bool
    user_metadata: Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class SamplerOrder:
    """Open a sampler on the run's weights as they are."""

    sampling_seq: int
    inflight: bool


Order = StartOrder | LoadOrder | SaveOrder | SamplerOrder | TrainWork | OptimWork


@dataclass(frozen=True, slots=True)
class Failure:
    """An error, as the journal keeps it."""

    code: str
    message: str
    retry_after_seconds: float = 0.0

    @staticmethod
    def of(error: OpenMintError) -> Failure:
        after = error.retry_after_seconds if isinstance(error, Overloaded) else 0.0
        return Failure(error.code, error.message, after)

    def error(self) -> OpenMintError:
        kind = ERRORS[self.code]
        if issubclass(kind, Overloaded):
            return kind(self.message, self.retry_after_seconds)
        return kind(self.message)


ERRORS = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, OpenMintError)
}
CODEC = Codec(
    (
        *(StartOrder, LoadOrder, SaveOrder, SamplerOrder, TrainWork, OptimWork),
        *(CreateRun, RestoreRun, LoraSpec, AdamParams, Datum, RecordedRoutes, LossSpec),
        *(TrainResult, OptimResult, Failure),
        *(BaseInfo, TargetStack, TargetModule),
    )
)


def makes_state(order: Order) -> bool:
    """Whether a run can't be rebuilt without doing this again."""
    if isinstance(order, TrainWork):
        return not order.forward_only
    return isinstance(order, StartOrder | LoadOrder | OptimWork)


def needs_of(order: Order) -> Digest | None:
    """Stored bytes without which the order can't be followed again."""
    match order:
        case StartOrder(command=RestoreRun() as command) | LoadOrder(command=command):
            return command.digest
    return None
