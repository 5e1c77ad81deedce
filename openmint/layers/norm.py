"""Root-mean-square normalisation, summed in fp32 as the published models were trained."""

from __future__ import annotations

from torch import Tensor

from openmint.kernels import norm


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in x's dtype."""
    if x.device.type != "cpu":
        return norm.reference(x, weight_D, eps)
    if not x.requires_grad:
        return norm.forward(x, weight_D, eps)[0]
    normed: Tensor = norm.FusedRMSNorm.apply(x, weight_D, eps)
    return normed
