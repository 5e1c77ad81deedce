"""JSON of what stands between training and traffic, under /catalog/v1 <-> our records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from pydantic import Field

from openmint.catalog.records import Gate, Observation, Schedule, Watch, WatchFinding
from openmint.types import Digest
from openmint.wire.catalog import Json, Name, Override, Reason, Reference, Version
from openmint.wire.requests import Body

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Confidence = Annotated[float, Field(ge=0.5, le=0.9999, allow_inf_nan=False)]


class AddGate(Body):
    """What a revision must show before the alias may name it: a score, or not to be much worse
    than what the alias names now."""

    task: Reference
    min_score: Share | None = None
    margin: Share | None = None
    confidence: Confidence = 0.95
    n: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None


class SetCanary(Body):
    """Give a share of an alias's traffic to a revision; without `revision`, to the one that has a
    share already."""

    revision: Reference | None = None
    share: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    reason: Reason = ""
    if_version: Version | None = None


class FinishCanary(Body):
    """Promote the canary."""

    reason: Reason = ""
    if_version: Version | None = None
    override_reason: Override | None = None


class AbortCanary(Body):
    """Give all traffic back to what the alias names."""

    reason: Reason = ""
    if_version: Version | None = None


Metric = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class AddWatch(Body):
    """What the mean of an online metric must be, or a revision loses the alias's traffic."""

    metric: Metric
    at_least: Share | None = None
    at_most: Share | None = None
    confidence: Confidence = 0.95
    min_observations: Annotated[int, Field(ge=1, lt=1 << 31)] = 20
    window_seconds: Annotated[int, Field(ge=60, le=86400)] = 3600


class Observed(Body):
    """What a client saw of one answer; `revision` is in every answer."""

    policy: Name
    revision: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    metric: Metric
    value: Share


class Observe(Body):
    """What a client saw of answers."""

    items: Annotated[list[Observed], Field(min_length=1, max_length=1000)]

    def observations(self) -> list[Observation]:
        return [
            Observation(item.policy, Digest(item.revision), item.metric, 1, item.value)
            for item in self.items
        ]


class AddSchedule(Body):
    """Evaluate what the alias names: each revision that is new to it, or every so many hours."""

    task: Reference
    n: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    every_hours: Annotated[float, Field(ge=0.01, le=8784, allow_inf_nan=False)] | None = None


def encode_schedule(schedule: Schedule) -> Json:
    shown = asdict(schedule)
    del shown["policy_id"]
    next_at = schedule.next_at and schedule.next_at.isoformat()
    return {**shown, "next_at": next_at, "created_at": schedule.created_at.isoformat()}


def encode_watch(watch: Watch, findings: Sequence[WatchFinding] = ()) -> Json:
    """A watch, with what it finds now of each of its alias's revisions."""
    shown = asdict(watch)
    del shown["policy_id"]
    found = [_encode_finding(each) for each in findings if each.watch == watch]
    return {**shown, "created_at": watch.created_at.isoformat(), "revisions": found}


def _encode_finding(finding: WatchFinding) -> Json:
    return {
        "revision": finding.digest,
        "canary": finding.is_canary,
        "num_observations": finding.num,
        "mean": finding.mean,
        "bounds": [finding.low, finding.high],
        "failed": finding.failed,
    }


def encode_gate(gate: Gate) -> Json:
    shown = asdict(gate)
    del shown["policy_id"]
    return {**shown, "created_at": gate.created_at.isoformat()}
