"""Frozen linear layers with LoRA: the one place where adapters meet the base.

Shapes: T tokens, I in, O out, R adapter rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openmint.layers.adapters import AdapterBatch, LoraDelta
from openmint.types import TargetGroup, TargetModule

PACKED_ROWS = 128
"""Up to so many rows a pre-packed weight is faster (1.3x at 32, 2x at 1 on AVX512-BF16); beyond,
packing is a small share of the work anyway."""


def _pack(weight_OI: Tensor) -> Tensor | None:
    """The weight in oneDNN's own layout, on CPUs in bf16; None elsewhere."""
    if weight_OI.device.type != "cpu" or weight_OI.dtype != torch.bfloat16:
        return None
    if not torch._C._has_mkldnn:
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 1)
    return packed


@dataclass(frozen=True, slots=True)
class Part:
    """Columns `start:stop` of a fused layer, which are one target module of the checkpoint."""

    path: str
    start: int
    stop: int


class LoraLinear:
    """One frozen GEMM, perhaps several fused targets (q, k, v), plus the batch's adapters."""

    def __init__(self, group: TargetGroup, parts: list[tuple[str, Tensor, Tensor | None]]) -> None:
        """`parts` are `(path, weight_OI, bias_O)` in output order."""
        self.group = group
        weights = [weight for _, weight, _ in parts]
        self.weight_OI = weights[0] if len(weights) == 1 else torch.cat(weights)
        biases = [bias for _, _, bias in parts if bias is not None]
        self.bias_O = torch.cat(biases) if biases else None
        self._packed = _pack(self.weight_OI)
        self.parts: list[Part] = []
        start = 0
        for path, weight, _ in parts:
            self.parts.append(Part(path, start, start + weight.shape[0]))
            start += weight.shape[0]

    def base(self, x_TI: Tensor) -> Tensor:
        """The frozen layer alone, without a graph."""
        if self._packed is None or x_TI.shape[0] > PACKED_ROWS:
            return F.linear(x_TI, self.weight_OI, self.bias_O)
        # The op behind torch.compile's frozen bf16 linears: the weight is laid out once for oneDNN.
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_TI, self._packed, self.bias_O, "none", [], ""
        )
        return out

    @property
    def targets(self) -> list[TargetModule]:
        num_in = self.weight_OI.shape[1]
        return [TargetModule(p.path, self.group, num_in, p.stop - p.start) for p in self.parts]

    def __call__(self, x_TI: Tensor, adapters: AdapterBatch | None) -> Tensor:
        if adapters is None:
            if x_TI.requires_grad:
                return F.linear(x_TI, self.weight_OI, self.bias_O)
            return self.base(x_TI)
        if x_TI.requires_grad:
            out: Tensor = _TrainedLinear.apply(x_TI, self, adapters)  # type: ignore[no-untyped-call]
            return out
        return self.forward(x_TI, self.deltas(adapters))[0]

    def deltas(self, adapters: AdapterBatch) -> list[tuple[Part, LoraDelta]]:
        pairs = [(part, adapters.delta(self.group, part.path)) for part in self.parts]
        return [(part, delta) for part, delta in pairs if delta is not None]

    def forward(
        self, x_TI: Tensor, deltas: list[tuple[Part, LoraDelta]]
    ) -> tuple[Tensor, list[Tensor]]:
        """`y_TO` and each part's `h_TR`, which the backward pass wants again."""
        y_TO = self.base(x_TI)
        hidden = []
        for part, delta in deltas:
            h_TR = delta.select(F.linear(x_TI, delta.a_RI))
            y_TO[:, part.start : part.stop].addmm_(h_TR, delta.b_RO)
            hidden.append(h_TR)
        return y_TO, hidden

    def backward(
        self,
        grad_y_TO: Tensor,
        x_TI: Tensor,
        hidden: list[Tensor],
        deltas: list[tuple[Part, LoraDelta]],
        adapters: AdapterBatch,
    ) -> Tensor:
        """`dL/dx_TI`; adapter gradients go to the batch's sink, the frozen weight gets none."""
        grad_x_TI = grad_y_TO @ self.weight_OI
        for (part, delta), h_TR in zip(deltas, hidden, strict=True):
            grad_part_TO = grad_y_TO[:, part.start : part.stop]
            grad_h_TR = delta.select(F.linear(grad_part_TO, delta.b_RO))
            grad_x_TI.addmm_(grad_h_TR, delta.a_RI)
            if adapters.sink is not None:
                grad_a_RI, grad_b_RO = grad_h_TR.t() @ x_TI, h_TR.t() @ grad_part_TO
                adapters.sink.add(self.group, delta.path, grad_a_RI, grad_b_RO)
        return grad_x_TI


class _TrainedLinear(torch.autograd.Function):
    """LoraLinear under autograd: saves only x and the tiny h, never a product of the base."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, linear: LoraLinear, adapters: AdapterBatch) -> Tensor:
        deltas = linear.deltas(adapters)
        y_TO, hidden = linear.forward(x_TI, deltas)
        ctx.save_for_backward(x_TI, *hidden)
        ctx.call = (linear, deltas, adapters)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        linear, deltas, adapters = ctx.call
        x_TI, *hidden = ctx.saved_tensors
        return linear.backward(grads[0], x_TI, hidden, deltas, adapters), None, None
