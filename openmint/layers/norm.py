"""Root-mean-square normalisation, summed in fp32 as the published models were trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in x's dtype."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    normed = F.rms_norm(x.float(), weight_D.shape, None, eps)
    return normed.to(x.dtype) * weight_D
