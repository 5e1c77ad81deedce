"""Frozen linear layers with LoRA: the one place where adapters meet the base.

Shapes: T tokens, I in, O out, R adapter rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openmint.layers.adapters import AdapterBatch, LoraDelta
from openmint.types import TargetGroup, TargetModule

if TYPE_CHECKING:
    from openmint.layers.segmented import SegmentedDelta


class FrozenWeight:
    """A weight that is only ever multiplied with: `x @ W.T`, and `y @ W` on the way back.

    In bf16 on CPUs it is laid out once for each direction as oneDNN wants it (up to 1.9x faster at
    one row, 5 % at hundreds), and the plain tensor is not kept.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        self.num_out, self.num_in = weight_OI.shape
        self.dtype, self.device = weight_OI.dtype, weight_OI.device
        self._is_packed = (
            self.device.type == "cpu"
            and self.dtype == torch.bfloat16
            and bool(torch._C._has_mkldnn)
        )
        if self._is_packed:
            self._forth, self._back = _packed(weight_OI), _packed(weight_OI.t().contiguous())
        else:
            self._forth, self._back = weight_OI, weight_OI.t()

    def forward(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        return self._multiply(x_TI, self._forth, bias_O)

    def backward(self, grad_TO: Tensor) -> Tensor:
        return self._multiply(grad_TO, self._back, None)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._is_packed:
            return F.linear(x, weight, bias)
        # The op behind torch.compile's frozen bf16 linears.
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out


def _packed(weight_OI: Tensor) -> Tensor:
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
        self.weight = FrozenWeight(weights[0] if len(weights) == 1 else torch.cat(weights))
        biases = [bias for _, _, bias in parts if bias is not None]
        self.bias_O = torch.cat(biases) if biases else None
        self.parts: list[Part] = []
        start = 0
        for path, weight, _ in parts:
            self.parts.append(Part(path, start, start + weight.shape[0]))
            start += weight.shape[0]
        self._paths = tuple(part.path for part in self.parts)

    @property
    def targets(self) -> list[TargetModule]:
        num_in = self.weight.num_in
        return [TargetModule(p.path, self.group, num_in, p.stop - p.start) for p in self.parts]

    def __call__(self, x_TI: Tensor, adapters: AdapterBatch | None) -> Tensor:
        if x_TI.requires_grad:
            out: Tensor = _TrainedLinear.apply(x_TI, self, adapters)
            return out
        return self.forward(x_TI, self.delta(adapters))[0]

    def delta(self, adapters: AdapterBatch | None) -> LoraDelta | SegmentedDelta | None:
        return adapters.delta(self.group, self._paths) if adapters else None

    def forward(
        self, x_TI: Tensor, delta: LoraDelta | SegmentedDelta | None
    ) -> tuple[Tensor, Tensor | None]:
        """`y_TO`, and the adapters' `h_TR`, which the backward pass wants again."""
        y_TO = self.weight.forward(x_TI, self.bias_O)
        if delta is None:
            return y_TO, None
        if not isinstance(delta, LoraDelta):
            return y_TO, delta.add_(y_TO, x_TI)
        h_TR = delta.select(F.linear(x_TI, delta.stacked.a_RI))
        for i, (part, b_RO) in enumerate(zip(self.parts, delta.stacked.bs_RO, strict=True)):
            y_TO[:, part.start : part.stop].addmm_(h_TR[:, delta.stacked.rows(i)], b_RO)
        return y_TO, h_TR

    def backward(
        self,
        grad_y_TO: Tensor,
        x_TI: Tensor,
        h_TR: Tensor | None,
        delta: LoraDelta | SegmentedDelta | None,
        adapters: AdapterBatch | None,
    ) -> Tensor:
        """`dL/dx_TI`; adapter gradients go to the batch's sink, the frozen weight gets none."""
        grad_x_TI = self.weight.backward(grad_y_TO)
        if delta is None or h_TR is None:
            return grad_x_TI
        if not isinstance(delta, LoraDelta):
            delta.back_(grad_x_TI, grad_y_TO, x_TI, h_TR, adapters.sink if adapters else None)
            return grad_x_TI
        stacked = delta.stacked
        grads_TO = [grad_y_TO[:, part.start : part.stop] for part in self.parts]
        pairs = zip(grads_TO, stacked.bs_RO, strict=True)
        grad_h_TR = delta.select(torch.cat([F.linear(grad, b_RO) for grad, b_RO in pairs], dim=1))
        grad_x_TI.addmm_(grad_h_TR, stacked.a_RI)
        if adapters is not None and adapters.sink is not None:
            grad_a_RI = grad_h_TR.t() @ x_TI
            for i, (part, grad_TO) in enumerate(zip(self.parts, grads_TO, strict=True)):
                rows = stacked.rows(i)
                grad_b_RO = h_TR[:, rows].t() @ grad_TO
                adapters.sink.add(self.group, part.path, grad_a_RI[rows], grad_b_RO)
        return grad_x_TI


class _TrainedLinear(torch.autograd.Function):
    """LoraLinear under autograd: saves only x and the tiny h, never a product of the base."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, linear: LoraLinear, adapters: AdapterBatch | None
    ) -> Tensor:
        delta = linear.delta(adapters)
        y_TO, h_TR = linear.forward(x_TI, delta)
        ctx.save_for_backward(x_TI, h_TR)
        ctx.call = (linear, delta, adapters)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        linear, delta, adapters = ctx.call
        x_TI, h_TR = ctx.saved_tensors
        return linear.backward(grads[0], x_TI, h_TR, delta, adapters), None, None
