"""Direct reward optimisation (arXiv:2405.19107): policy gradient with a quadratic pull to q."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def dro(lp: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """`-(lp * A - beta / 2 * (lp - q)^2)` per token."""
    distance = lp - inputs["logprobs"]
    return -(lp * inputs["advantages"] - 0.5 * config["beta"] * distance * distance)
