"""SwiGLU, `silu(gate) * up`, of rows that hold gate and then up values. T rows, F columns."""

from __future__ import annotations

from typing import Any

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
    """`y_TF` takes the activations again."""
    width = grad_TF.shape[1]
    for t in range(len(grad_TF)):
        grad_F, gate_F, up_F = grad_TF[t], gate_up_TW[t, :width], gate_up_TW[t, width:]
        out_gate_F, out_up_F, y_F = out_TW[t, :width], out_TW[t, width:], y_TF[t]
        for f in range(width):
            gate, up, grad = load(gate_F[f]), load(up_F[f]), load(grad_F[f])
            sigmoid = F32(1.0) / (F32(1.0) + exp(-gate))
            silu = gate * sigmoid
            slope = sigmoid * (F32(1.0) + gate * (F32(1.0) - sigmoid))
            out_gate_F[f] = rounded(grad * up * slope, out_gate_F)
            out_up_F[f] = rounded(grad * silu, out_up_F)
            y_F[f] = rounded(load(rounded(silu, y_F)) * up, y_F)


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
        grad_TF, out_TW = grads[0].contiguous(), torch.empty_like(gate_up_TW)
        arrays = as_array(grad_TF), as_array(gate_up_TW), as_array(out_TW)
        _backward(*arrays, as_array(torch.empty_like(grad_TF)))
        return out_TW
