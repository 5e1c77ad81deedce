"""Many adapters in one batch on a GPU, with the kernels of `kernels/segmented.py`.

Shapes: T tokens, I in, O out, L slots, K targets with one input, R rank, M target modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from openmint.kernels import segmented
from openmint.kernels.segmented import Matrices, Segments
from openmint.types import IntArray, LoraSpec, TargetGroup, TargetModule

if TYPE_CHECKING:
    from openmint.layers.adapters import AdapterWeights, GradientSink

GROUPS: tuple[TargetGroup, ...] = ("attn", "mlp", "unembed")
LEAST_RANK = 16
"""The fewest columns that tensor cores take."""


@dataclass(frozen=True, slots=True)
class SegmentedDelta:
    """What the adapters of a batch add to targets with one input; stands where `LoraDelta` does."""

    a: Matrices
    b: Matrices
    scale_L: Tensor
    by: Segments
    slot_L: Tensor | None = None
    """Whose matrices these are, where an adapter has several; None: each slot has one."""

    def add_(self, y_TO: Tensor, x_TI: Tensor) -> Tensor:
        """Add to the base's output; the adapters' `h_TKR`, which the backward pass wants again."""
        h_TKR = segmented.shrink(_rows(x_TI), self.by, self.a, self.scale_L)
        segmented.expand_(y_TO, h_TKR, self.by, self.b)
        return h_TKR

    def back_(
        self,
        grad_x_TI: Tensor,
        grad_y_TO: Tensor,
        x_TI: Tensor,
        h_TKR: Tensor,
        sink: GradientSink | None,
    ) -> None:
        """Add to the base's `dL/dx`; adapter gradients go to the sink."""
        grad_y_TO = _rows(grad_y_TO)
        grad_h_TKR = segmented.shrink(grad_y_TO, self.by, self.b, self.scale_L)
        segmented.expand_(grad_x_TI, grad_h_TKR, self.by, self.a)
        if sink is not None:
            sink_L = sink.addresses if self.slot_L is None else sink.addresses[self.slot_L]
            segmented.accumulate_(sink_L, grad_h_TKR, _rows(x_TI), self.by, self.a)
            segmented.accumulate_(sink_L, h_TKR, grad_y_TO, self.by, self.b)


def _rows(x_TC: Tensor) -> Tensor:
    """The same rows, each without gaps."""
    return x_TC if x_TC.stride(1) == 1 else x_TC.contiguous()


class AdapterTable:
    """Where the matrices of some adapters lie on the device, slot by slot.

    `fill` writes into the same memory each time, so that a CUDA graph finds other adapters there,
    if targets with one input follow one another.
    """

    def __init__(
        self, targets: Iterable[TargetModule], num_slots: int, device: torch.device
    ) -> None:
        self._targets = list(targets)
        self._column = {target.path: i for i, target in enumerate(self._targets)}
        shape = (num_slots, len(self._targets))
        self._address_L = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._scale_L = torch.zeros(num_slots, device=device)
        self._rank_GL = torch.zeros(len(GROUPS), num_slots, dtype=torch.int32, device=device)
        self._offset_2LM = torch.zeros(2, *shape, dtype=torch.int64, device=device)
        self._matrices: dict[tuple[str, ...], tuple[Matrices, Matrices]] = {}
        self._expert_deltas: dict[str, SegmentedDelta] = {}
        self.rank = LEAST_RANK
        widths = [width for target in self._targets for width in (target.num_in, target.num_out)]
        self._is_aligned = not any(width % 16 for width in widths)
        self.num_slots = num_slots

    @staticmethod
    def of(adapters: Sequence[AdapterWeights]) -> AdapterTable:
        """A table of just these."""
        targets = {target: None for adapter in adapters for target in adapter.layout.targets}
        table = AdapterTable(targets, len(adapters), adapters[0].flat_P.device)
        table.fill(adapters)
        return table

    def fill(self, adapters: Sequence[AdapterWeights]) -> None:
        """Slot i holds the i-th adapter; the others hold none."""
        scales_L = np.zeros(self.num_slots, np.float32)
        addresses_L = np.zeros(self.num_slots, np.int64)
        ranks_GL = np.zeros((len(GROUPS), self.num_slots), np.int32)
        offsets_2LM = np.zeros(tuple(self._offset_2LM.shape), np.int64)
        known: dict[LoraSpec, IntArray] = {}
        for slot, adapter in enumerate(adapters):
            spec = adapter.spec
            if spec not in known:
                known[spec] = self._offsets(adapter)
            offsets_2LM[:, slot] = known[spec]
            addresses_L[slot], scales_L[slot] = adapter.flat_P.data_ptr(), spec.scaling
            ranks_GL[:, slot] = [spec.rank if group in spec.groups else 0 for group in GROUPS]
        assert not (addresses_L % 16).any(), "torch's own allocations begin at such addresses"
        self._address_L.copy_(torch.from_numpy(addresses_L))
        self._scale_L.copy_(torch.from_numpy(scales_L))
        self._rank_GL.copy_(torch.from_numpy(ranks_GL))
        self._offset_2LM.copy_(torch.from_numpy(offsets_2LM))
        self.rank = rank_block(adapters)
        self._matrices.clear()
        self._expert_deltas.clear()

    def _offsets(self, adapter: AdapterWeights) -> IntArray:
        """Where A and B of each target begin in a flat vector of this layout, `[2, M]`."""
        offsets_2M = np.zeros((2, len(self._targets)), np.int64)
        for path, starts in adapter.layout.starts.items():
            offsets_2M[:, self._column[path]] = starts
        return offsets_2M

    def delta(self, paths: tuple[str, ...], by: Segments) -> SegmentedDelta:
        """The update of targets with one input, whose outputs stand side by side."""
        if paths not in self._matrices:
            self._matrices[paths] = self._find(paths)
        a, b = self._matrices[paths]
        return SegmentedDelta(a, b, self._scale_L, by)

    def expert_delta(self, paths_ME: Sequence[Sequence[str]], by: Segments) -> SegmentedDelta:
        """The update of these targets of all experts of a layer; the slots of `by` are those of the
        first expert, then those of the second, and so on."""
        key, count = paths_ME[0][0], len(paths_ME[0])
        if key not in self._expert_deltas:
            slot_L = torch.arange(self.num_slots, device=self._address_L.device).repeat(count)
            columns = [
                [self._column[path] for path in paths] for paths in zip(*paths_ME, strict=True)
            ]
            offset_2LEK = self._offset_2LM[:, :, torch.tensor(columns).to(slot_L.device)]
            offset_2LK = offset_2LEK.transpose(1, 2).flatten(1, 2)
            pair = self._find(tuple(paths[0] for paths in paths_ME))
            a, b = (
                replace(
                    one,
                    address_L=one.address_L[slot_L],
                    offset_LK=offset_2LK[which],
                    rank_L=one.rank_L[slot_L],
                )
                for which, one in enumerate(pair)
            )
            self._expert_deltas[key] = SegmentedDelta(a, b, self._scale_L[slot_L], by, slot_L)
        return replace(self._expert_deltas[key], by=by)

    def _find(self, paths: tuple[str, ...]) -> tuple[Matrices, Matrices]:
        targets = [self._targets[self._column[path]] for path in paths]
        widths = [target.num_out for target in targets]
        starts = [sum(widths[:k]) for k in range(len(widths))]
        inputs = [target.num_in for target in targets]
        a = self._place(targets, 0, [0] * len(paths), inputs)
        return a, self._place(targets, 1, starts, widths)

    def _offsets_of(self, targets: Sequence[TargetModule], which: int) -> Tensor:
        """Of A or of B, `[L, K]`; a view where they follow one another."""
        columns = [self._column[target.path] for target in targets]
        if columns == list(range(columns[0], columns[0] + len(columns))):
            return self._offset_2LM[which, :, columns[0] : columns[-1] + 1]
        return self._offset_2LM[which][:, torch.tensor(columns).to(self._address_L.device)]

    def _place(
        self,
        targets: Sequence[TargetModule],
        which: int,
        starts: Sequence[int],
        widths: Sequence[int],
    ) -> Matrices:
        device = self._address_L.device
        group = GROUPS.index(targets[0].group)
        starts_K2, tiles_N4 = segmented.layout_of(tuple(starts), tuple(widths), device)
        return Matrices(
            self._address_L,
            self._offsets_of(targets, which),
            self._rank_GL[group],
            starts_K2,
            tiles_N4,
            self.rank,
            is_shared=which == 0,
            is_aligned=self._is_aligned,
        )


def rank_block(adapters: Sequence[AdapterWeights]) -> int:
    """The power of two that holds every rank."""
    largest = max((adapter.spec.rank for adapter in adapters), default=1)
    return max(LEAST_RANK, 1 << (largest - 1).bit_length())
