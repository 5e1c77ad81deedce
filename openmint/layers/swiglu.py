"""The gated activation of dense feed-forward layers."""

from __future__ import annotations

from torch import Tensor

from openmint.kernels import swiglu
from openmint.kernels.choice import use_triton


def silu_gate(gate_up_TW: Tensor) -> Tensor:
    """`silu(gate) * up` of rows that hold the gate and then the up values."""
    if use_triton(gate_up_TW.device) and not gate_up_TW.requires_grad:
        from openmint.kernels import fused_decode

        return fused_decode.silu_gate(gate_up_TW)
    if gate_up_TW.device.type != "cpu":
        return swiglu.reference(gate_up_TW)
    if not gate_up_TW.requires_grad:
        return swiglu.forward(gate_up_TW)
    out: Tensor = swiglu.FusedSwiGLU.apply(gate_up_TW)
    return out
