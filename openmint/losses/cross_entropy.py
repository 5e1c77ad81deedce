"""Weighted negative log-likelihood."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def cross_entropy(lp: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """`-lp * weights` per target, in lp's shape (T,) or (T, K)."""
    return -lp * inputs["weights"]
