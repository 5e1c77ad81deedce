"""The routed experts of one layer by grouped products of torch: one for all experts, and nothing on
the host that waits for the device.

Shapes: T tokens, K experts of a token, N = T * K rows, E experts of this rank, S slots, G groups of
rows, I in, O out, D hidden size, F feed-forward size, R adapter rows, M targets with one input.

Rows stand by expert, and within an expert by adapter, those of the bare base first. So the groups
of the base's product are experts, and those of the adapters' are experts times slots. Where Triton
runs, it reads A and B of each such group where they lie (`layers/segmented.py`); else they are put
together once, with zeros for the base and up to the highest rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from openmint.kernels.choice import use_triton
from openmint.layers.adapters import AdapterBatch, GradientSink
from openmint.layers.linear import LoraLinear, Part, TorchLinear

if TYPE_CHECKING:
    from openmint.kernels.segmented import Segments
    from openmint.layers.segmented import SegmentedDelta

MOST_GROUPS = 1023
"""That one product of torch's takes on a GPU."""
ALIGNMENT = 16
"""Each row of an operand begins at a multiple of so many bytes."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertRows:
    """How the rows of one layer stand."""

    order_N: Tensor
    """Each row's place among the choices of all tokens, `token * K + k`."""
    expert_N: Tensor
    ends_E: Tensor
    """int32: where each expert's rows end."""
    ends_G: Tensor
    """int32: where those of each expert's slots end, the base's before them; without adapters, or
    with one for all tokens, the same as `ends_E`."""
    is_foreign_N1: Tensor | None
    """True for the rows at the end whose experts are on other ranks; None: there are none."""
    scale_N1: Tensor | float = 1.0
    """Of each row's adapter."""
    segments: Segments | None = None
    """The adapters' groups for Triton's kernels; None: they don't run."""


class GroupedExperts:
    """Gated feed-forward experts that are alike."""

    def __init__(
        self,
        gate_ups: Sequence[TorchLinear],
        downs: Sequence[TorchLinear],
        activation: Callable[[Tensor], Tensor],
        own: slice,
        num_experts: int,
    ) -> None:
        """`own` says which of all `num_experts` these are. From here on weights and biases of the
        layers are views into one tensor each."""
        self._gate_up, self._down = ExpertLinear(gate_ups), ExpertLinear(downs)
        self._activation, self._num_experts = activation, num_experts
        self._first, self._count = int(own.start), len(downs)

    @staticmethod
    def suits(linears: Sequence[LoraLinear]) -> bool:
        """Whether grouped products take the weights of these layers, two of each expert."""
        if any(type(each) is not TorchLinear or each.dtype not in DTYPES for each in linears):
            return False
        targets = [(each.dtype.itemsize, target) for each in linears for target in each.targets]
        sizes = {size * width for size, t in targets for width in (t.num_in, t.num_out)}
        return len(linears) <= 2 * MOST_GROUPS and not any(size % ALIGNMENT for size in sizes)

    def takes(self, adapters: AdapterBatch | None) -> bool:
        """Whether the adapters of a batch make no more groups than there may be."""
        if adapters is None or use_triton(adapters.slot_T.device):
            return True
        return self._count * _num_kinds(adapters) <= MOST_GROUPS

    def forward(self, x_TD: Tensor, expert_TK: Tensor, adapters: AdapterBatch | None) -> Tensor:
        """What its experts make of each token, `[T, K, D]`; those of other ranks make zeros."""
        rows = self._rows(expert_TK, adapters)
        x_ND = x_TD[rows.order_N // expert_TK.shape[1]]
        active_NF = self._activation(self._gate_up(x_ND, rows, adapters))
        y_ND: Tensor = self._down(active_NF, rows, adapters)
        return y_ND[rows.order_N.argsort()].view(*expert_TK.shape, -1)

    def _rows(self, expert_TK: Tensor, adapters: AdapterBatch | None) -> ExpertRows:
        count, kinds = self._count, _num_kinds(adapters)
        num_groups = count * kinds
        group_N = (expert_TK.flatten() - self._first) * kinds
        if adapters is not None and kinds > 1:
            group_N += adapters.slot_T.repeat_interleave(expert_TK.shape[1]) + 1
        group_N = group_N.masked_fill((group_N < 0) | (group_N >= num_groups), num_groups)
        group_N, order_N = group_N.sort(stable=True)
        groups_G = torch.arange(num_groups, device=group_N.device)
        ends_G = torch.searchsorted(group_N, groups_G, right=True)
        rows = ExpertRows(
            order_N,
            (group_N // kinds).clamp(max=count - 1),
            ends_G[kinds - 1 :: kinds].int(),
            ends_G.int(),
            None if count == self._num_experts else (group_N == num_groups)[:, None],
        )
        return rows if adapters is None else _with_adapters(rows, group_N % kinds, adapters)


def _num_kinds(adapters: AdapterBatch | None) -> int:
    """Groups of one expert."""
    return 1 if adapters is None or adapters.is_uniform else 1 + len(adapters.stack.adapters)


def _with_adapters(rows: ExpertRows, kind_N: Tensor, adapters: AdapterBatch) -> ExpertRows:
    """The same rows with what their adapters need; of several kinds the base's is 0."""
    stack, kinds = adapters.stack, _num_kinds(adapters)
    if kinds == 1:
        return replace(rows, scale_N1=stack.adapters[0].spec.scaling)
    if not use_triton(kind_N.device):
        return replace(rows, scale_N1=stack.scales.index_select(0, kind_N)[:, None])
    from openmint.kernels.segmented import segments_between

    starts_G = torch.cat((rows.ends_G.new_zeros(1), rows.ends_G[:-1]))
    first_L, stop_L = (x.view(-1, kinds)[:, 1:].flatten() for x in (starts_G, rows.ends_G))
    as_they_stand = torch.arange(len(kind_N), device=kind_N.device)
    return replace(rows, segments=segments_between(as_they_stand, first_L, stop_L))


class ExpertLinear:
    """One linear layer of every expert, with adapters."""

    def __init__(self, linears: Sequence[TorchLinear]) -> None:
        self._group, self._parts = linears[0].group, linears[0].parts
        self._paths_ME = tuple(zip(*(each.paths for each in linears), strict=True))
        self._weight_EOI = torch.stack([each.weight_OI for each in linears])
        biases = [each.bias_O for each in linears if each.bias_O is not None]
        self._bias_EO = torch.stack(biases) if biases else None
        for expert, linear in enumerate(linears):
            linear.weight_OI = self._weight_EOI[expert]
            linear.bias_O = None if self._bias_EO is None else self._bias_EO[expert]

    def __call__(self, x_NI: Tensor, rows: ExpertRows, adapters: AdapterBatch | None) -> Tensor:
        if x_NI.requires_grad:
            out: Tensor = _TrainedExperts.apply(x_NI, self, rows, adapters)
            return out
        return self.forward(x_NI, rows, adapters)[0]

    def forward(
        self, x_NI: Tensor, rows: ExpertRows, adapters: AdapterBatch | None
    ) -> tuple[Tensor, Tensor | None]:
        """`y_NO`, and the adapters' hidden values, which the backward pass wants again."""
        y_NO = grouped_mm(x_NI, self._weight_EOI.transpose(1, 2), offs=rows.ends_E)
        if self._bias_EO is not None:
            y_NO += self._bias_EO[rows.expert_N]
        delta = self._delta(rows, adapters)
        h = None if delta is None else delta.add_(y_NO, x_NI)
        return _without_foreign(y_NO, rows), h

    def backward(
        self,
        grad_NO: Tensor,
        x_NI: Tensor,
        h: Tensor | None,
        rows: ExpertRows,
        adapters: AdapterBatch | None,
    ) -> Tensor:
        """`dL/dx_NI`; adapter gradients go to the batch's sink."""
        grad_NO = grad_NO.contiguous()
        grad_x_NI = grouped_mm(grad_NO, self._weight_EOI, offs=rows.ends_E)
        delta = self._delta(rows, adapters)
        if delta is not None and adapters is not None and h is not None:
            delta.back_(grad_x_NI, grad_NO, x_NI, h, adapters.sink)
        return _without_foreign(grad_x_NI, rows)

    def _delta(
        self, rows: ExpertRows, adapters: AdapterBatch | None
    ) -> GroupedDelta | SegmentedDelta | None:
        """What the adapters add; None when no adapter of the batch has these layers."""
        if adapters is None or not adapters.stack.members(self._group):
            return None
        if rows.segments is not None:
            return adapters.stack.table.expert_delta(self._paths_ME, rows.segments)
        with_base = not adapters.is_uniform
        pairs = [adapters.stack.experts(paths_E, with_base) for paths_E in self._paths_ME]
        return GroupedDelta(self._paths_ME, self._parts, pairs, rows)


def _without_foreign(y_N: Tensor, rows: ExpertRows) -> Tensor:
    """Zeros in rows that are in no group, where a product leaves whatever was there."""
    return y_N if rows.is_foreign_N1 is None else y_N.masked_fill_(rows.is_foreign_N1, 0.0)


@dataclass(frozen=True, slots=True)
class GroupedDelta:
    """What the adapters add to a layer of all experts; stands where `SegmentedDelta` does."""

    paths_ME: Sequence[tuple[str, ...]]
    parts: Sequence[Part]
    pairs_M: Sequence[tuple[Tensor, Tensor]]
    """Of each target `(A_GRI, B_GRO)`."""
    rows: ExpertRows

    def add_(self, y_NO: Tensor, x_NI: Tensor) -> Tensor:
        """Add to the base's output; the adapters' `h`, each target's beside the last one's."""
        h = torch.cat([self._times(x_NI, a_GRI.transpose(1, 2)) for a_GRI, _ in self.pairs_M], 1)
        h *= self.rows.scale_N1
        for part, own_NR, (_, b_GRO) in zip(self.parts, self._each(h), self.pairs_M, strict=True):
            y_NO[:, part.start : part.stop] += self._times(own_NR, b_GRO)
        return h

    def back_(
        self,
        grad_x_NI: Tensor,
        grad_y_NO: Tensor,
        x_NI: Tensor,
        h: Tensor,
        sink: GradientSink | None,
    ) -> None:
        """Add to the base's `dL/dx`; adapter gradients go to the sink."""
        of_all = zip(self.paths_ME, self.parts, self._each(h), self.pairs_M, strict=True)
        for paths_E, part, own_NR, (a_GRI, b_GRO) in of_all:
            grad_y = grad_y_NO[:, part.start : part.stop]
            grad_h_NR = self._times(grad_y, b_GRO.transpose(1, 2)) * self.rows.scale_N1
            grad_x_NI += self._times(grad_h_NR, a_GRI)
            if sink is not None:
                grad_a_GRI = self._times(grad_h_NR.t(), x_NI)
                sink.add_experts(paths_E, grad_a_GRI, self._times(own_NR.t(), grad_y))

    def _each(self, h: Tensor) -> tuple[Tensor, ...]:
        return h.chunk(len(self.pairs_M), dim=1)

    def _times(self, left: Tensor, right: Tensor) -> Tensor:
        return grouped_mm(left, right, offs=self.rows.ends_G)


class _TrainedExperts(torch.autograd.Function):
    """`ExpertLinear` under autograd: saves x and the small h, never a product of the base."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        linear: ExpertLinear,
        rows: ExpertRows,
        adapters: AdapterBatch | None,
    ) -> Tensor:
        y_NO, h = linear.forward(x_NI, rows, adapters)
        ctx.save_for_backward(x_NI, h)
        ctx.call = linear, rows, adapters
        return y_NO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        linear, rows, adapters = ctx.call
        x_NI, h = ctx.saved_tensors
        return linear.backward(grads[0], x_NI, h, rows, adapters), None, None, None
