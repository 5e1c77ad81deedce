"""Policy gradient with an importance ratio to the sampler's distribution."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def importance_sampling(
    lp: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """`-exp(lp - q) * A` per token; q are the sampler's `logprobs`, A the `advantages`."""
    return -(lp - inputs["logprobs"]).exp() * inputs["advantages"]
