"""Frozen linear layers with LoRA: the one place where adapters meet the base.

Shapes: T tokens, I in, O out, R adapter rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openmint.errors import InvalidRequest
from openmint.kernels import linear as tiled
from openmint.kernels.adapter_tiles import Direction, padded
from openmint.kernels.jit import as_array
from openmint.kernels.team import Together, alone
from openmint.kernels.tile import IS_AVAILABLE, STRIP
from openmint.layers.adapters import AdapterBatch, GradientSink, LoraDelta
from openmint.layers.ranks import WHOLE, Split
from openmint.layers.shards import Piece
from openmint.types import AnyArray, TargetGroup, TargetModule

_InMemory = tuple[tiled.Weights, Tensor]
"""A weight as kernels see it, and the memory that it points to."""
PartWeights = tuple[str, Tensor, Tensor | None]
"""`(path, weight_OI, bias_O)` of one target module of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Part:
    """Columns `start:stop` of a fused layer, which are one target module of the checkpoint."""

    path: str
    start: int
    stop: int


class LoraLinear:
    """One frozen weight, perhaps of several fused targets (q, k, v), plus the batch's adapters.

    `TorchLinear` is the reference and runs anywhere; `TiledLinear` is it on AVX512-BF16.
    """

    def __init__(
        self, group: TargetGroup, parts: Sequence[PartWeights], split: Split = WHOLE
    ) -> None:
        """`parts` in output order, each this rank's part of a weight."""
        self.group, self.split = group, split
        self.dtype, self.device = parts[0][1].dtype, parts[0][1].device
        self.num_in, self.num_out = parts[0][1].shape[1], 0
        self.parts: list[Part] = []
        for path, weight_OI, _ in parts:
            stop = self.num_out + len(weight_OI)
            self.parts.append(Part(path, self.num_out, stop))
            self.num_out = stop
        self.paths = tuple(part.path for part in self.parts)

    @property
    def targets(self) -> list[TargetModule]:
        return [TargetModule(p.path, self.group, self.num_in, p.stop - p.start) for p in self.parts]

    @property
    def pieces(self) -> list[Piece]:
        """What this rank has of each target."""
        return [_piece(target, self.split) for target in self.targets]

    def __call__(self, x_TI: Tensor, adapters: AdapterBatch | None) -> Tensor:
        if x_TI.requires_grad:
            out: Tensor = _TrainedLinear.apply(x_TI, self, adapters)
            return out
        return self.forward(x_TI, adapters)[0]

    def forward(
        self, x_TI: Tensor, adapters: AdapterBatch | None, out_TO: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`y_TO`, in `out_TO` if that is of use, and the adapters' hidden values, which the
        backward pass wants again."""
        raise NotImplementedError

    def serve(
        self,
        x_TI: Tensor,
        adapters: AdapterBatch | None,
        together: Together,
        out_TO: Tensor | None = None,
    ) -> Tensor:
        """`y_TO` for sampling, by threads that may share the work."""
        return self.forward(x_TI, adapters, out_TO)[0]

    def backward(
        self, grad_TO: Tensor, x_TI: Tensor, h_TR: Tensor | None, adapters: AdapterBatch | None
    ) -> Tensor:
        """`dL/dx_TI`; adapter gradients go to the batch's sink, the frozen weight gets none."""
        raise NotImplementedError


class TorchLinear(LoraLinear):
    """By torch: on a GPU the adapters segment by segment; else all of a batch stacked, two products
    per target, however many there are."""

    def __init__(
        self, group: TargetGroup, parts: Sequence[PartWeights], split: Split = WHOLE
    ) -> None:
        super().__init__(group, parts, split)
        weights = [weight for _, weight, _ in parts]
        self.weight_OI = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.bias_O = joined_bias(parts)

    def forward(
        self, x_TI: Tensor, adapters: AdapterBatch | None, out_TO: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        y_TO = F.linear(x_TI, self.weight_OI, self.bias_O)
        delta = adapters.delta(self.group, self.paths) if adapters else None
        if delta is None:
            return y_TO, None
        if not isinstance(delta, LoraDelta):
            return y_TO, delta.add_(y_TO, x_TI)
        h_TR = delta.select(F.linear(x_TI, delta.stacked.a_RI))
        for i, (part, b_RO) in enumerate(zip(self.parts, delta.stacked.bs_RO, strict=True)):
            y_TO[:, part.start : part.stop].addmm_(h_TR[:, delta.stacked.rows(i)], b_RO)
        return y_TO, h_TR

    def backward(
        self, grad_TO: Tensor, x_TI: Tensor, h_TR: Tensor | None, adapters: AdapterBatch | None
    ) -> Tensor:
        grad_x_TI = grad_TO @ self.weight_OI
        delta = adapters.delta(self.group, self.paths) if adapters else None
        if delta is None or h_TR is None or adapters is None:
            return grad_x_TI
        if not isinstance(delta, LoraDelta):
            delta.back_(grad_x_TI, grad_TO, x_TI, h_TR, adapters.sink)
            return grad_x_TI
        stacked = delta.stacked
        grads_TO = [grad_TO[:, part.start : part.stop] for part in self.parts]
        pairs = zip(grads_TO, stacked.bs_RO, strict=True)
        grad_h_TR = delta.select(torch.cat([F.linear(grad, b_RO) for grad, b_RO in pairs], dim=1))
        grad_x_TI.addmm_(grad_h_TR, stacked.a_RI)
        if adapters.sink is not None:
            grad_a_RI = grad_h_TR.t() @ x_TI
            for i, (part, grad_part_TO) in enumerate(zip(self.parts, grads_TO, strict=True)):
                rows = stacked.rows(i)
                grad_b_RO = h_TR[:, rows].t() @ grad_part_TO
                adapters.sink.add_stacked(self.group, part.path, grad_a_RI[rows], grad_b_RO)
        return grad_x_TI


class TiledLinear(LoraLinear):
    """bfloat16 on AVX512-BF16: weights laid out once for each direction, adapters row by row.

    `forth` and `back` are the weights of either direction. Sampling reads `serving`: the forward
    ones, or int8 ones of their own.
    """

    def __init__(
        self,
        group: TargetGroup,
        parts: Sequence[PartWeights],
        serves_int8: bool = False,
        split: Split = WHOLE,
    ) -> None:
        super().__init__(group, parts, split)
        weights = [weight for _, weight, _ in parts]
        biases = [bias for _, _, bias in parts if bias is not None]
        nothing = np.empty(0, np.float32)
        bias_O = torch.cat(biases).float().numpy() if biases else nothing
        self.forth, self._memory_forth = _weights(weights, bias_O, nothing)
        back = torch.cat(weights).t().contiguous()
        self.back, self._memory_back = _weights([back], nothing, nothing)
        self.serving, self._serving_memory = self.forth, self._memory_forth
        if serves_int8:
            self.serving, self._serving_memory = _int8_weights(weights, bias_O)
        self._ends_N = np.array([part.stop for part in self.parts])

    @staticmethod
    def suits(parts: Sequence[PartWeights]) -> bool:
        """Whether these weights, on this machine, can be multiplied in tiles."""
        weights = [weight for _, weight, _ in parts]
        is_bf16 = all(w.device.type == "cpu" and w.dtype == torch.bfloat16 for w in weights)
        return IS_AVAILABLE and is_bf16 and all(n % STRIP == 0 for w in weights for n in w.shape)

    def forward(
        self, x_TI: Tensor, adapters: AdapterBatch | None, out_TO: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return self._run(self.forth, x_TI, adapters, alone, out_TO)

    def serve(
        self,
        x_TI: Tensor,
        adapters: AdapterBatch | None,
        together: Together,
        out_TO: Tensor | None = None,
    ) -> Tensor:
        return self._run(self.serving, x_TI, adapters, together, out_TO)[0]

    def _run(
        self,
        weights: tiled.Weights,
        x_TI: Tensor,
        adapters: AdapterBatch | None,
        together: Together,
        out_TO: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        slots, num_rows = self._slots(adapters, "forth")
        y_TO = x_TI.new_empty(len(x_TI), self.num_out) if out_TO is None else out_TO
        h_TR = tiled.forward(x_TI.contiguous(), y_TO, weights, slots, num_rows, together)
        return y_TO, h_TR

    def backward(
        self, grad_TO: Tensor, x_TI: Tensor, h_TR: Tensor | None, adapters: AdapterBatch | None
    ) -> Tensor:
        grad_TO, x_TI = grad_TO.contiguous(), x_TI.contiguous()
        slots, num_rows = self._slots(adapters, "back")
        grad_x_TI, grad_h_TR = tiled.backward(
            grad_TO, self._ends_N, self.num_in, self.back, slots, num_rows
        )
        if adapters is not None and adapters.sink is not None and h_TR is not None:
            of_all = tuple(map(as_array, (grad_TO, x_TI, h_TR, grad_h_TR)))
            for slot, rows in adapters.runs:
                if adapters.stack.adapters[slot].has(self.paths[0]):
                    self._give(adapters.sink, slot, rows, of_all)
        return grad_x_TI

    def _slots(
        self, adapters: AdapterBatch | None, direction: Direction
    ) -> tuple[tiled.Slots, int]:
        """The adapters, and how many hidden values they give each token."""
        if adapters is None:
            return tiled.NO_ADAPTERS, 0
        num_rows = adapters.stack.widest * len(self.parts)
        return adapters.slots(self.paths, direction), num_rows

    def _give(
        self, sink: GradientSink, slot: int, rows: slice, of_all: tuple[AnyArray, ...]
    ) -> None:
        """Add the gradients of one slot, whose tokens are these rows, to the sink."""
        grad_TO, x_TI, h_TR, grad_h_TR = of_all
        for i, part in enumerate(self.parts):
            grad_a_RI, grad_b_RO = sink.arrays(slot, part.path)
            first = i * padded(len(grad_a_RI))
            tiled.add_outer_(grad_a_RI, grad_h_TR, first, x_TI, 0, rows)
            tiled.add_outer_(grad_b_RO, h_TR, first, grad_TO, part.start, rows)


class LogitsRoom:
    """Memory for logits, kept from one batch to the next: on CPUs fresh memory of that size would
    have to be cleared by the operating system first, a quarter of the product's time."""

    def __init__(self, head: LoraLinear) -> None:
        self._head = head
        self._room_RV: Tensor | None = None

    def rows(self, count: int) -> Tensor | None:
        """Room for so many rows, until it is asked for again; None where torch keeps memory."""
        if not isinstance(self._head, TiledLinear):
            return None
        if self._room_RV is None or len(self._room_RV) < count:
            self._room_RV = torch.empty(count, self._head.num_out, dtype=self._head.dtype)
        return self._room_RV[:count]


def lora_linear(
    group: TargetGroup,
    parts: Sequence[PartWeights],
    serves_int8: bool = False,
    split: Split = WHOLE,
) -> LoraLinear:
    """The fastest kind for these weights on this machine.

    Raises InvalidRequest for an int8 serving base where there are no tiles.
    """
    if TiledLinear.suits(parts):
        return TiledLinear(group, parts, serves_int8, split)
    if serves_int8:
        raise InvalidRequest(
            "worker.serving_weights = int8 needs worker.dtype = bfloat16, a CPU with AVX512-BF16 "
            "and layers whose widths are multiples of 8"
        )
    return TorchLinear(group, parts, split)


def joined_bias(parts: Sequence[PartWeights]) -> Tensor | None:
    """Of all parts, which have biases or have none."""
    biases = [bias for _, _, bias in parts if bias is not None]
    return torch.cat(biases) if biases else None


def _piece(own: TargetModule, split: Split) -> Piece:
    rank, size = split.ranks.rank, split.ranks.size
    ins, outs = (0, own.num_in), (0, own.num_out)
    whole_in, whole_out = own.num_in, own.num_out
    if split.axis == "in":
        ins, whole_in = (rank * own.num_in, (rank + 1) * own.num_in), size * own.num_in
    if split.axis == "out":
        outs, whole_out = (rank * own.num_out, (rank + 1) * own.num_out), size * own.num_out
    whole = TargetModule(own.path, own.group, whole_in, whole_out)
    return Piece(whole, ins, outs, has_shares=size > 1)


def _weights(weights: Sequence[Tensor], bias_O: Any, scale_O: Any) -> _InMemory:
    memory, panels_P3 = tiled.pack(weights)
    num_in = weights[0].shape[1]
    return tiled.Weights(memory.data_ptr(), panels_P3, bias_O, scale_O, num_in), memory


def _int8_weights(weights: Sequence[Tensor], bias_O: Any) -> _InMemory:
    both = [tiled.to_int8(weight_OI) for weight_OI in weights]
    scale_O = torch.cat([scale_O for _, scale_O in both]).numpy()
    return _weights([rounded_OI for rounded_OI, _ in both], bias_O, scale_O)


class _TrainedLinear(torch.autograd.Function):
    """LoraLinear under autograd: saves only x and the tiny h, never a product of the base."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, linear: LoraLinear, adapters: AdapterBatch | None
    ) -> Tensor:
        y_TO, h_TR = linear.forward(x_TI, adapters)
        ctx.save_for_backward(x_TI, h_TR)
        ctx.call = (linear, adapters)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        linear, adapters = ctx.call
        x_TI, h_TR = ctx.saved_tensors
        return linear.backward(grads[0], x_TI, h_TR, adapters), None, None
