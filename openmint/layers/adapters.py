"""Many LoRA adapters in one batch of tokens.

Shapes: T tokens, I in, O out, R adapter rows (the ranks of all adapters of the batch, end to end),
P parameters of one adapter, S slots.

An adapter is one flat vector; A and B of every target are views into it. B is kept transposed, so
that the rows of both belong to one adapter and adapters of any rank stack by concatenation. A batch
then needs two GEMMs per target however many adapters it holds: `h_TR = x_TI @ A_RI.T`, zero where
row r isn't the token's own adapter, `y_TO += h_TR @ B_RO`. The same zeros keep each adapter's
gradient its own: `dA_RI = dh_TR.T @ x_TI`. Extra work is T*R*(I+O); a GPU kernel that skips the
zero blocks (SGMV, arXiv:2310.18547) can stand in for `LoraDelta` behind the same interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from openmint.types import Digest, LoraSpec, TargetGroup, TargetModule


class AdapterLayout:
    """Where A and B of each target lie in an adapter's flat vector: target by target, A then B."""

    def __init__(self, spec: LoraSpec, targets: Sequence[TargetModule]) -> None:
        self.spec = spec
        self.targets = tuple(targets)
        self.num_params = sum(spec.rank * (t.num_in + t.num_out) for t in self.targets)

    def views(self, flat_P: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """`path -> (A_RI, B_RO)`, views that share the vector's memory."""
        views, start, rank = {}, 0, self.spec.rank
        for target in self.targets:
            middle = start + rank * target.num_in
            stop = middle + rank * target.num_out
            a_RI = flat_P[start:middle].view(rank, target.num_in)
            views[target.path] = (a_RI, flat_P[middle:stop].view(rank, target.num_out))
            start = stop
        return views


class AdapterWeights:
    """One adapter in compute precision, as a forward pass reads it.

    `revision` names the stored bytes that these weights came from; None while they are in training.
    It travels with the tensors, so what a batch reports is what it multiplied with.
    """

    def __init__(
        self, layout: AdapterLayout, flat_P: Tensor, revision: Digest | None = None
    ) -> None:
        self.layout = layout
        self.revision = revision
        self.spec = layout.spec
        self.flat_P = flat_P
        self.views = layout.views(flat_P)

    @property
    def num_bytes(self) -> int:
        return self.flat_P.nbytes


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """What the adapters of a batch add to one target: `y_TO += scale * select(x_TI @ A.T) @ B`."""

    path: str
    a_RI: Tensor
    b_RO: Tensor
    own_TR: Tensor | None
    """True where row r belongs to token t's adapter; None when one adapter serves every token."""
    scale_R: Tensor | float

    def select(self, h_TR: Tensor) -> Tensor:
        # where, not a product with zero: another adapter's overflow must not become a NaN here.
        if self.own_TR is not None:
            h_TR = torch.where(self.own_TR, h_TR, 0.0)
        return h_TR * self.scale_R


class AdapterStack:
    """The adapters that a batch uses, stacked by rows; built once, reused while the set lasts."""

    def __init__(self, adapters: Sequence[AdapterWeights]) -> None:
        self.adapters = tuple(adapters)
        self._rows: dict[str, tuple[Tensor, Tensor]] = {}

    def members(self, group: TargetGroup) -> list[int]:
        """Slots whose adapter has targets in `group`."""
        return [i for i, adapter in enumerate(self.adapters) if group in adapter.spec.groups]

    def rows(self, path: str) -> tuple[Tensor, Tensor]:
        """`(A_RI, B_RO)` of one target over all slots that have it, in slot order."""
        if path not in self._rows:
            own = [adapter.views[path] for adapter in self.adapters if path in adapter.views]
            a_RI = own[0][0] if len(own) == 1 else torch.cat([a for a, _ in own])
            b_RO = own[0][1] if len(own) == 1 else torch.cat([b for _, b in own])
            self._rows[path] = (a_RI, b_RO)
        return self._rows[path]

    def row_ranges(self, group: TargetGroup) -> list[tuple[int, int, int]]:
        """`(slot, start, stop)` of each member's rows."""
        ranges, start = [], 0
        for slot in self.members(group):
            stop = start + self.adapters[slot].spec.rank
            ranges.append((slot, start, stop))
            start = stop
        return ranges


class GradientSink:
    """Where a backward pass leaves adapter gradients: one fp32 vector per slot of the stack."""

    def __init__(self, stack: AdapterStack, grads_SP: Sequence[Tensor]) -> None:
        self._stack = stack
        pairs = zip(stack.adapters, grads_SP, strict=True)
        self._views = [adapter.layout.views(grad_P) for adapter, grad_P in pairs]

    def add(self, group: TargetGroup, path: str, grad_a_RI: Tensor, grad_b_RO: Tensor) -> None:
        for slot, start, stop in self._stack.row_ranges(group):
            a_RI, b_RO = self._views[slot][path]
            a_RI += grad_a_RI[start:stop]
            b_RO += grad_b_RO[start:stop]


class AdapterBatch:
    """The adapters of one packed batch. Slot -1 marks tokens of the bare base."""

    def __init__(
        self, stack: AdapterStack, slot_T: Tensor, sink: GradientSink | None = None
    ) -> None:
        self.stack = stack
        self.sink = sink
        self._slot_T = slot_T
        self._selectors: dict[TargetGroup, tuple[Tensor | None, Tensor | float] | None] = {}

    def delta(self, group: TargetGroup, path: str) -> LoraDelta | None:
        """The update of one target, or None when no adapter of the batch has it."""
        if group not in self._selectors:
            self._selectors[group] = self._select(group)
        if (selector := self._selectors[group]) is None:
            return None
        a_RI, b_RO = self.stack.rows(path)
        return LoraDelta(path, a_RI, b_RO, *selector)

    @cached_property
    def _is_uniform(self) -> bool:
        return len(self.stack.adapters) == 1 and bool((self._slot_T == 0).all())

    def _select(self, group: TargetGroup) -> tuple[Tensor | None, Tensor | float] | None:
        members = self.stack.members(group)
        if not members:
            return None
        specs = [self.stack.adapters[slot].spec for slot in members]
        if self._is_uniform:
            return None, specs[0].scaling
        device = self._slot_T.device
        pairs = zip(members, specs, strict=True)
        slot_R = torch.tensor([slot for slot, spec in pairs for _ in range(spec.rank)])
        scale_R = torch.tensor([spec.scaling for spec in specs for _ in range(spec.rank)])
        own_TR = self._slot_T[:, None] == slot_R.to(device)[None, :]
        return own_TR, scale_R.to(device, self.stack.adapters[0].flat_P.dtype)
