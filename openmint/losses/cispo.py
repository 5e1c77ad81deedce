"""Clipped importance weights on the policy gradient, CISPO (arXiv:2506.13585)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def cispo(lp: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """`-stopgrad(clip(r, low, high)) * lp * A` per token, r = exp(lp - q)."""
    ratio = (lp.detach() - inputs["logprobs"]).exp()
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -clipped * lp * inputs["advantages"]
