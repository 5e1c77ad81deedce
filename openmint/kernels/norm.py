"""Root-mean-square norm of rows. T rows, D columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openmint.kernels.jit import F32, as_array, kernel, load, piece, rounded
from openmint.types import FloatArray


def reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)`, summed in float32 and rounded, times `weight_D`."""
    normed = F.rms_norm(x_TD.float(), weight_D.shape, None, eps)
    return normed.to(x_TD.dtype) * weight_D


@kernel
def _forward(x_TD: Any, weight_D: Any, eps: Any, y_TD: Any, scale_T: Any) -> None:
    width = len(weight_D)
    for t in range(len(x_TD)):
        x_D, y_D = x_TD[t], y_TD[t]
        total = F32(0.0)
        for d in range(width):
            total += load(x_D[d]) * load(x_D[d])
        scale = F32(1.0) / np.sqrt(total / F32(width) + eps)
        scale_T[t] = scale
        for d in range(width):
            y_D[d] = rounded(load(rounded(load(x_D[d]) * scale, x_D)) * load(weight_D[d]), y_D)


@kernel
def _backward(grad_TD: Any, x_TD: Any, weight_D: Any, scale_T: Any, out_TD: Any) -> None:
    width = len(weight_D)
    for t in range(len(x_TD)):
        grad_D, x_D, out_D, scale = grad_TD[t], x_TD[t], out_TD[t], scale_T[t]
        along = F32(0.0)
        for d in range(width):
            along += load(grad_D[d]) * load(weight_D[d]) * load(x_D[d])
        along *= scale * scale / F32(width)
        for d in range(width):
            slope = load(grad_D[d]) * load(weight_D[d]) - along * load(x_D[d])
            out_D[d] = rounded(scale * slope, out_D)


@piece
def add_backward(grad_TD: Any, x_TD: Any, weight_D: Any, scale_T: Any, out_TD: Any) -> None:
    """`out += dL/dx`."""
    width = len(weight_D)
    slope_D = np.empty(width, np.float32)
    for t in range(len(x_TD)):
        grad_D, x_D, out_D, scale = grad_TD[t], x_TD[t], out_TD[t], scale_T[t]
        along = F32(0.0)
        for d in range(width):
            along += load(grad_D[d]) * load(weight_D[d]) * load(x_D[d])
        along *= scale * scale / F32(width)
        for d in range(width):
            slope_D[d] = scale * (load(grad_D[d]) * load(weight_D[d]) - along * load(x_D[d]))
        for d in range(width):
            out_D[d] = rounded(load(out_D[d]) + slope_D[d], out_D)


def forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, FloatArray]:
    """`reference` in one pass, on CPUs, and each row's scale."""
    rows_TD = x.contiguous().view(-1, x.shape[-1])
    y_TD, scale_T = torch.empty_like(rows_TD), np.empty(len(rows_TD), np.float32)
    _forward(as_array(rows_TD), as_array(weight_D), F32(eps), as_array(y_TD), scale_T)
    return y_TD.view(x.shape), scale_T


class FusedRMSNorm(torch.autograd.Function):
    """`forward`, differentiable in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, ctx.scale_T = forward(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight_D = ctx.saved_tensors
        grad_TD, x_TD = (t.contiguous().view(-1, x.shape[-1]) for t in (grads[0], x))
        out_TD = torch.empty_like(x_TD)
        rows = as_array(grad_TD), as_array(x_TD), as_array(weight_D)
        _backward(*rows, ctx.scale_T, as_array(out_TD))
        return out_TD.view(x.shape), None, None
