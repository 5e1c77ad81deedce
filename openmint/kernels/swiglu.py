"""SwiGLU, `silu(gate) * up`, of rows that hold gate and then up values. T rows, F columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openmint.kernels.jit import F32, as_array, exp, kernel, load, rounded


def reference(gate_up_TW: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_TW.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


@kernel
def _forward(gate_up_TW: Any, y_TF: Any) -> None:
    width = y_TF.shape[1]
    for t in range(len(y_TF)):
        gate_F, up_F, y_F = gate_up_TW[t, :width], gate_up_TW[t, width:], y_TF[t]
        for f in range(width):
            gate = load(gate_F[f])
            silu = load(rounded(gate / (F32(1.0) + exp(-gate)), y_F))
            y_F[f] = rounded(silu * load(up_F[f]), y_F)


@kernel
def _backward(grad_TF: Any, gate_up_TW: Any, out_TW: Any, y_TF: Any) -> None:
    """`y_TF` takes the activations again, if it has rows."""
    width = grad_TF.shape[1]
    sigmoid_F = np.empty(width, np.float32)
    for t in range(len(grad_TF)):
        grad_F, gate_F, up_F = grad_TF[t], gate_up_TW[t, :width], gate_up_TW[t, width:]
        out_gate_F, out_up_F = out_TW[t, :width], out_TW[t, width:]
        for f in range(width):
            sigmoid_F[f] = F32(1.0) / (F32(1.0) + exp(-load(gate_F[f])))
        for f in range(width):
            silu = load(gate_F[f]) * sigmoid_F[f]
            out_up_F[f] = rounded(load(grad_F[f]) * silu, out_up_F)
        for f in range(width):
            slope = sigmoid_F[f] * (F32(1.0) + load(gate_F[f]) * (F32(1.0) - sigmoid_F[f]))
            out_gate_F[f] = rounded(load(grad_F[f]) * load(up_F[f]) * slope, out_gate_F)
        if len(y_TF):
            y_F = y_TF[t]
            for f in range(width):
                silu = load(rounded(load(gate_F[f]) * sigmoid_F[f], y_F))
                y_F[f] = rounded(silu * load(up_F[f]), y_F)


def forward(gate_up_TW: Tensor) -> Tensor:
    """`reference` in one pass, on CPUs."""
    num_rows, width = gate_up_TW.shape
    y_TF = gate_up_TW.new_empty(num_rows, width // 2)
    _forward(as_array(gate_up_TW), as_array(y_TF))
    return y_TF


class FusedSwiGLU(torch.autograd.Function):
    """`forward`, differentiable."""

    @staticmethod
    def forward(ctx: Any, gate_up_TW: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_TW)
        return forward(gate_up_TW)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up_TW,) = ctx.saved_tensors
        out_TW = torch.empty_like(gate_up_TW)
        nothing_TF = as_array(gate_up_TW)[:0]
        _backward(
            as_array(grads[0].contiguous()), as_array(gate_up_TW), as_array(out_TW), nothing_TF
        )
        return out_TW
