"""Clipped surrogate of PPO (arXiv:1707.06347), with absolute bounds on the ratio."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def ppo(lp: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """`-min(r * A, clip(r, low, high) * A)` per token, r = exp(lp - q)."""
    ratio = (lp - inputs["logprobs"]).exp()
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio * inputs["advantages"], clipped * inputs["advantages"])
