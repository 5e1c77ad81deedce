"""JSON of what stands between training and traffic, under /catalog/v1 <-> our records."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from pydantic import Field

from openmint.catalog.records import Gate
from openmint.wire.catalog import Json, Reference
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


def encode_gate(gate: Gate) -> Json:
    shown = asdict(gate)
    del shown["policy_id"]
    return {**shown, "created_at": gate.created_at.isoformat()}
