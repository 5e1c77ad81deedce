"""Root-mean-square normalisation, summed in fp32 as the published models were trained."""

from __future__ import annotations

from torch import Tensor

from openmint.kernels import norm
from openmint.kernels.choice import use_triton


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in x's dtype."""
    if use_triton(x.device) and not x.requires_grad:
        from openmint.kernels import fused_decode

        return fused_decode.rms_norm(x, weight_D, eps)
    if x.device.type != "cpu":
        return norm.reference(x, weight_D, eps)
    if not x.requires_grad:
        return norm.forward(x, weight_D, eps)[0]
    normed: Tensor = norm.FusedRMSNorm.apply(x, weight_D, eps)
    return normed
