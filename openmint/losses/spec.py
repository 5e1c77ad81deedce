"""What each loss reads and which settings it takes. No torch: the gateway validates with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from openmint.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class LossDef:
    """The contract of one loss: inputs beside the tokens, and settings with their defaults."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)
    multi_target: bool = False
    """Whether `target_tokens` may be (N, K): several weighted targets at each position."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.required + self.optional


POLICY_INPUTS = ("target_tokens", "logprobs", "advantages")

LOSSES: Mapping[str, LossDef] = {
    loss.name: loss
    for loss in (
        LossDef("cross_entropy", ("target_tokens",), ("weights",), multi_target=True),
        LossDef("importance_sampling", POLICY_INPUTS),
        LossDef(
            "ppo", POLICY_INPUTS, config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
        ),
        LossDef(
            "cispo", POLICY_INPUTS, config={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}
        ),
        LossDef("dro", POLICY_INPUTS, config={"beta": 0.05}),
    )
}

REFUSED: Mapping[str, str] = {
    "gspo": "is not implemented",
    "stable_reinforce": "is not implemented",
    "custom": "does not run on the server; forward_backward_custom computes it in the client",
}


def loss_def(name: str) -> LossDef:
    """The contract of loss `name`. Raises InvalidRequest that lists the losses there are."""
    if found := LOSSES.get(name):
        return found
    known = ", ".join(sorted(LOSSES))
    if why := REFUSED.get(name):
        raise InvalidRequest(f"loss {name!r} {why}; available: {known}")
    raise InvalidRequest(f"unknown loss {name!r}; available: {known}")
