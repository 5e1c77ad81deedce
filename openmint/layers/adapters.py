"""Many LoRA adapters in one batch of tokens.

Shapes: T tokens, I in, O out, R adapter rows (the ranks of all adapters of the batch, end to end),
P parameters of one adapter, S slots.

An adapter is one flat vector; A and B of every target are views into it. B is kept transposed, so
that the rows of both belong to one adapter and adapters of any rank stack by concatenation. Targets
that share an input, such as q, k and v, share one product with their stacked A's, then each has one
with its B's, however many adapters there are: `h_TR = x_TI @ A_RI.T`, zero where row r isn't the
token's own adapter, `y_TO += h_TR @ B_RO`. The same zeros keep each adapter's gradient its own:
`dA_RI = dh_TR.T @ x_TI`. Extra work is T*R*(I+O). The tiled kernels of CPUs, and those of GPUs that
stand in for `LoraDelta` (`layers/segmented.py`), do without the zero blocks, as SGMV
(arXiv:2310.18547) does: each row is multiplied with its own adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from openmint.kernels import dense
from openmint.kernels import linear as tiled
from openmint.kernels.adapter_tiles import Direction, Plan, Target, lay_out, padded, plan
from openmint.kernels.choice import use_triton
from openmint.kernels.jit import as_array
from openmint.types import (
    AnyArray,
    Digest,
    IntArray,
    LoraSpec,
    TargetGroup,
    TargetModule,
    stacks_of,
)

if TYPE_CHECKING:
    from openmint.kernels.segmented import Segments
    from openmint.layers.segmented import AdapterTable, SegmentedDelta


Fused = tuple[str, ...]
"""Paths of targets that share an input."""


class Tiles(NamedTuple):
    """Addresses of an adapter's strips and panels in one linear layer, and the memory that they
    are in."""

    strips: int
    panels: int
    words_W: Tensor


class AdapterLayout:
    """Where A and B of each target lie in an adapter's flat vector, which is as the adapter file
    has it: stack by stack, all A of its layers, then all B."""

    def __init__(self, spec: LoraSpec, targets: Sequence[TargetModule]) -> None:
        self.spec = spec
        self.targets = tuple(targets)
        self.starts: dict[str, tuple[int, int]] = {}
        """Of each target's A and B."""
        self.num_params = 0
        self.stacks = stacks_of(targets)
        for stack in self.stacks:
            size_a, size_b = spec.rank * stack.num_in, spec.rank * stack.num_out
            bs_start = self.num_params + len(stack.targets) * size_a
            for layer, target in enumerate(stack.targets):
                starts = self.num_params + layer * size_a, bs_start + layer * size_b
                self.starts[target.path] = starts
            self.num_params = bs_start + len(stack.targets) * size_b
        self._places: dict[tuple[str, ...], IntArray] = {}
        self._widths = {target.path: (target.num_in, target.num_out) for target in targets}
        self._plans: dict[tuple[tuple[Fused, ...], Direction], Plan] = {}

    def plan(self, layers: tuple[Fused, ...], direction: Direction) -> Plan:
        """Where the tiles of these linear layers go; made once."""
        if (layers, direction) not in self._plans:
            found = {
                t.path: Target(*self.starts[t.path], t.num_in, t.num_out) for t in self.targets
            }
            targets = [[found[path] for path in paths] for paths in layers]
            self._plans[layers, direction] = plan(self.spec.rank, targets, direction)
        return self._plans[layers, direction]

    def views(self, flat_P: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """`path -> (A_RI, B_RO)`, views that share the vector's memory."""
        return {
            target.path: (
                self._view(flat_P, self.starts[target.path][0], target.num_in),
                self._view(flat_P, self.starts[target.path][1], target.num_out),
            )
            for target in self.targets
        }

    def arrays(self, flat_P: AnyArray, path: str) -> tuple[AnyArray, AnyArray]:
        """`(A_RI, B_RO)` of one target, views too; a tenth of the time that tensors would take."""
        sides = []
        for start, width in zip(self.starts[path], self._widths[path], strict=True):
            sides.append(flat_P[start : start + self.spec.rank * width].reshape(-1, width))
        return sides[0], sides[1]

    def stack_views(self, flat_P: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """`stack -> (A, B)` of all its targets, `[targets, rank, width]`; views too."""
        found = {}
        for stack in self.stacks:
            shape = len(stack.targets), self.spec.rank
            start, middle = self.starts[stack.targets[0].path]
            a = flat_P[start:middle].view(*shape, stack.num_in)
            stop = middle + shape[0] * shape[1] * stack.num_out
            found[stack.name] = a, flat_P[middle:stop].view(*shape, stack.num_out)
        return found

    def side_by_side(self, flat_P: Tensor, paths: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A and B of targets that follow one another in a stack, as the experts of a layer do,
        `[targets, rank, width]`; views too."""
        count, rank, views = len(paths), self.spec.rank, []
        widths, last = self._widths[paths[0]], self.starts[paths[-1]]
        for start, end, width in zip(self.starts[paths[0]], last, widths, strict=True):
            size = count * rank * width
            assert end + rank * width == start + size, "they follow one another"
            views.append(flat_P[start : start + size].view(count, rank, width))
        return views[0], views[1]

    def places(self, paths: tuple[str, ...]) -> IntArray:
        """Where A and B of these targets begin, `[2, M]`, -1 where it lacks one; found once."""
        if paths not in self._places:
            starts_M2 = [self.starts.get(path, (-1, -1)) for path in paths]
            self._places[paths] = np.array(starts_M2).T
        return self._places[paths]

    def _view(self, flat_P: Tensor, start: int, width: int) -> Tensor:
        return flat_P[start : start + self.spec.rank * width].view(self.spec.rank, width)


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
        self._tiles: dict[tuple[Fused, Direction], Tiles] = {}

    @cached_property
    def views(self) -> dict[str, tuple[Tensor, Tensor]]:
        """`path -> (A_RI, B_RO)`."""
        return self.layout.views(self.flat_P)

    def has(self, path: str) -> bool:
        """Whether it adapts this target."""
        return path in self.layout.starts

    def tiles(self, paths: Fused, direction: Direction) -> Tiles:
        """The strips and panels of targets with one input, made once; kept as long as the adapter.

        Threads may ask at once.
        """
        if (paths, direction) not in self._tiles:
            self.lay_out([paths], direction)
        return self._tiles[paths, direction]

    def lay_out(self, layers: Sequence[Fused], direction: Direction) -> None:
        """Make the tiles of many linear layers in one go; of those that the adapter has."""
        having = tuple(p for p in layers if self.has(p[0]) and (p, direction) not in self._tiles)
        if having:
            plan = self.layout.plan(having, direction)
            words_W = lay_out(self.flat_P, plan)
            for paths, (strips, panels) in zip(having, plan.places, strict=True):
                start = words_W.data_ptr()
                tiles = Tiles(start + 4 * strips, start + 4 * panels, words_W)
                self._tiles.setdefault((paths, direction), tiles)

    @property
    def num_bytes(self) -> int:
        """Of its vector."""
        return self.flat_P.nbytes

    @property
    def tiles_bytes(self) -> int:
        """Of its tiles of the forward pass, once they are laid out."""
        return self.flat_P.nbytes * padded(self.spec.rank) // self.spec.rank

    def on_host(self) -> AdapterWeights:
        """The same vector in host memory, where it may be already, and nothing laid out."""
        return AdapterWeights(self.layout, self.flat_P.cpu(), self.revision)


@dataclass(frozen=True, slots=True)
class StackedTargets:
    """Targets with one input over all adapters that have them: every target's rows in slot order,
    target after target in `a_RI`, and one B for each."""

    a_RI: Tensor
    bs_RO: tuple[Tensor, ...]

    def rows(self, target: int) -> slice:
        """Where a target's rows stand in `a_RI`, and in the hidden values that it gives."""
        num_rows = self.bs_RO[target].shape[0]
        return slice(target * num_rows, (target + 1) * num_rows)


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """What the adapters of a batch add to targets with one input:
    `y_TO += scale * select(x_TI @ A.T) @ B`."""

    stacked: StackedTargets
    own_TR: Tensor | None
    """True where row r belongs to token t's adapter; None when one adapter serves every token."""
    scale_R: Tensor | float

    def select(self, h_TR: Tensor) -> Tensor:
        # where, not a product with zero: another adapter's overflow must not become a NaN here.
        if self.own_TR is not None:
            h_TR = torch.where(self.own_TR, h_TR, 0.0)
        return h_TR * self.scale_R


class HasPaths(Protocol):
    @property
    def paths(self) -> tuple[str, ...]: ...


class AdapterStack:
    """The adapters that a batch uses, stacked by rows; built once, reused while the set lasts."""

    def __init__(self, adapters: Sequence[AdapterWeights]) -> None:
        self.adapters = tuple(adapters)
        self._stacked: dict[tuple[str, ...], StackedTargets] = {}
        self._experts: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}
        self._addresses: dict[tuple[tuple[str, ...], Direction], tuple[IntArray, IntArray]] = {}
        self._all_addresses: dict[tuple[Fused, Direction], tuple[IntArray, IntArray]] = {}
        self._laid_out: set[Direction] = set()
        self.rank_S = np.array([self.padded_rank(s) for s in range(len(adapters))], np.int64)
        self.scale_S = np.array([a.spec.scaling for a in adapters], np.float32)

    @property
    def widest(self) -> int:
        """Rows of one target of the adapter of the highest rank, padded."""
        return int(self.rank_S.max(initial=0))

    def padded_rank(self, slot: int) -> int:
        """Rows of one target in the tiles of a slot's adapter."""
        return padded(self.adapters[slot].spec.rank)

    def addresses(self, paths: tuple[str, ...], direction: Direction) -> tuple[IntArray, IntArray]:
        """Where each slot's strips and panels of these targets are; 0 where it has none."""
        key = (paths, direction)
        if key not in self._addresses:
            shrink_S, expand_S = np.zeros((2, len(self.adapters)), np.int64)
            for slot, adapter in enumerate(self.adapters):
                if adapter.has(paths[0]):
                    tiles = adapter.tiles(paths, direction)
                    shrink_S[slot], expand_S[slot] = tiles.strips, tiles.panels
            self._addresses[key] = (shrink_S, expand_S)
        return self._addresses[key]

    def all_addresses(
        self, layers: Sequence[HasPaths], direction: Direction
    ) -> tuple[IntArray, IntArray]:
        """`addresses` of many layers, `[N, S]` each; made once for those that begin with the first
        one, and each direction."""
        key = (layers[0].paths, direction)
        if key not in self._all_addresses:
            self.lay_out([layer.paths for layer in layers], direction)
            both = [self.addresses(layer.paths, direction) for layer in layers]
            joined = np.stack([s for s, _ in both]), np.stack([e for _, e in both])
            self._all_addresses[key] = joined
        return self._all_addresses[key]

    def lay_out(self, layers: Sequence[Fused], direction: Direction) -> None:
        """Make the tiles of many linear layers in one go, once."""
        if direction not in self._laid_out:
            for adapter in self.adapters:
                adapter.lay_out(layers, direction)
            self._laid_out.add(direction)

    def members(self, group: TargetGroup) -> list[int]:
        """Slots whose adapter has targets in `group`."""
        return [i for i, adapter in enumerate(self.adapters) if group in adapter.spec.groups]

    def stacked(self, paths: tuple[str, ...]) -> StackedTargets:
        """The targets over all slots that have them; they belong to one group."""
        if paths not in self._stacked:
            having = [a for a in self.adapters if a.has(paths[0])]
            views = [[adapter.views[path] for adapter in having] for path in paths]
            a_RI = _joined([a_RI for target in views for a_RI, _ in target])
            bs_RO = tuple(_joined([b_RO for _, b_RO in target]) for target in views)
            self._stacked[paths] = StackedTargets(a_RI, bs_RO)
        return self._stacked[paths]

    def experts(self, paths: Sequence[str], with_base: bool) -> tuple[Tensor, Tensor]:
        """A and B of one target of all experts of a layer, `[experts * slots, R, width]`; R is the
        highest rank, rounded up to whole tiles, and what is missing there is zero.

        `with_base`: a slot of zeros stands before the others. Else there is one adapter, and where
        its rank allows its own memory is given.
        """
        key = paths[0], with_base
        if key not in self._experts:
            self._experts[key] = self._side_by_side(paths, with_base)
        return self._experts[key]

    def _side_by_side(self, paths: Sequence[str], with_base: bool) -> tuple[Tensor, Tensor]:
        rank = max(padded(a.spec.rank) for a in self.adapters if a.has(paths[0]))
        parts = [
            a.layout.side_by_side(a.flat_P, paths) if a.has(paths[0]) else None
            for a in self.adapters
        ]
        if not with_base and parts[0] is not None and self.adapters[0].spec.rank == rank:
            return parts[0]
        parts = [None, *parts] if with_base else parts
        made = []
        for half in range(2):
            width = next(part[half].shape[2] for part in parts if part is not None)
            all_ESRW = self.adapters[0].flat_P.new_zeros(len(paths), len(parts), rank, width)
            for slot, part in enumerate(parts):
                if part is not None:
                    all_ESRW[:, slot, : part[half].shape[1]] = part[half]
            made.append(all_ESRW.flatten(0, 1))
        return made[0], made[1]

    @cached_property
    def scales(self) -> Tensor:
        """Of the bare base, 0, and of each slot."""
        first = self.adapters[0].flat_P
        scales = [0.0, *(adapter.spec.scaling for adapter in self.adapters)]
        return torch.tensor(scales, dtype=first.dtype).to(first.device)

    @cached_property
    def table(self) -> AdapterTable:
        """Where the adapters lie, for kernels that read them there; GPUs only, as is Triton."""
        from openmint.layers.segmented import AdapterTable

        return AdapterTable.of(self.adapters)

    def row_ranges(self, group: TargetGroup) -> list[tuple[int, int, int]]:
        """`(slot, start, stop)` of each member's rows within a target's."""
        ranges, start = [], 0
        for slot in self.members(group):
            stop = start + self.adapters[slot].spec.rank
            ranges.append((slot, start, stop))
            start = stop
        return ranges


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class GradientSink:
    """Where a backward pass leaves adapter gradients: one fp32 vector per slot of the stack."""

    def __init__(self, stack: AdapterStack, grads_SP: Sequence[Tensor]) -> None:
        self._stack = stack
        self._grads_SP = tuple(grads_SP)
        self._views: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}

    @cached_property
    def addresses(self) -> Tensor:
        """Where each slot's vector begins in device memory, int64 `[S]`."""
        addresses = [grad_P.data_ptr() for grad_P in self._grads_SP]
        return torch.tensor(addresses).to(self._grads_SP[0].device)

    def views(self, slot: int) -> dict[str, tuple[Tensor, Tensor]]:
        """`path -> (A_RI, B_RO)` of one slot's gradient."""
        if slot not in self._views:
            layout = self._stack.adapters[slot].layout
            self._views[slot] = layout.views(self._grads_SP[slot])
        return self._views[slot]

    def arrays(self, slot: int, path: str) -> tuple[AnyArray, AnyArray]:
        """`(A_RI, B_RO)` of one target of a slot's gradient, on CPUs."""
        return self._stack.adapters[slot].layout.arrays(self._flats[slot], path)

    def places(self, paths: tuple[str, ...]) -> IntArray:
        """Addresses of A's and B's gradients of these targets, `[2, M, S]`; 0 where a slot has
        none. On CPUs."""
        found_S2M = []
        for adapter, grad_P in zip(self._stack.adapters, self._grads_SP, strict=True):
            starts_2M = adapter.layout.places(paths)
            found_S2M.append(np.where(starts_2M < 0, 0, grad_P.data_ptr() + 4 * starts_2M))
        return np.ascontiguousarray(np.stack(found_S2M, axis=2))

    @cached_property
    def _flats(self) -> list[AnyArray]:
        return [as_array(grad_P) for grad_P in self._grads_SP]

    def add_stacked(
        self, group: TargetGroup, path: str, grad_a_RI: Tensor, grad_b_RO: Tensor
    ) -> None:
        """Add one target's gradients, all slots' rows in order."""
        for slot, start, stop in self._stack.row_ranges(group):
            a_RI, b_RO = self.views(slot)[path]
            a_RI += grad_a_RI[start:stop]
            b_RO += grad_b_RO[start:stop]

    def add_experts(self, paths: Sequence[str], grad_a_GRI: Tensor, grad_b_GRO: Tensor) -> None:
        """Add the gradients of one target of all experts of a layer, in `AdapterStack.experts`'
        order."""
        kinds = len(grad_a_GRI) // len(paths)
        for slot, adapter in enumerate(self._stack.adapters):
            if adapter.has(paths[0]):
                kind = slot + 1 if kinds > 1 else 0
                halves = adapter.layout.side_by_side(self._grads_SP[slot], paths)
                for half_ERW, grad_GRW in zip(halves, (grad_a_GRI, grad_b_GRO), strict=True):
                    half_ERW += grad_GRW[kind::kinds, : adapter.spec.rank]


class AdapterBatch:
    """The adapters of one packed batch. Slot -1 marks tokens of the bare base."""

    def __init__(
        self, stack: AdapterStack, slot_T: Tensor, sink: GradientSink | None = None
    ) -> None:
        self.stack = stack
        self.sink = sink
        self.slot_T = slot_T
        self._selectors: dict[tuple[TargetGroup, int], tuple[Tensor | None, Tensor | float]] = {}

    def at(self, rows: Tensor) -> AdapterBatch:
        """The same for some of the tokens."""
        return AdapterBatch(self.stack, self.slot_T[rows], self.sink)

    def delta(
        self, group: TargetGroup, paths: tuple[str, ...]
    ) -> LoraDelta | SegmentedDelta | None:
        """The update of targets with one input, or None when no adapter of the batch has them."""
        if not self.stack.members(group):
            return None
        if use_triton(self.slot_T.device) and not self.is_uniform:
            return self.stack.table.delta(paths, self._segments)
        return self.stacked_delta(group, paths)

    def stacked_delta(self, group: TargetGroup, paths: tuple[str, ...]) -> LoraDelta | None:
        """`delta` for a layer that multiplies with A and B itself."""
        if not self.stack.members(group):
            return None
        key = (group, len(paths))
        if key not in self._selectors:
            self._selectors[key] = self._select(*key)
        return LoraDelta(self.stack.stacked(paths), *self._selectors[key])

    def slots(self, paths: tuple[str, ...], direction: Direction) -> tiled.Slots:
        """The adapters of these targets as the tiled kernels read them."""
        stack = self.stack
        tiles = stack.addresses(paths, direction)
        return tiled.Slots(
            slot_T=self.slot_rows.ctypes.data,
            shrink_S=tiles[0].ctypes.data,
            expand_S=tiles[1].ctypes.data,
            rank_S=stack.rank_S.ctypes.data,
            scale_S=stack.scale_S.ctypes.data,
            num_parts=len(paths),
        )

    @cached_property
    def slot_rows(self) -> IntArray:
        """Each token's slot, on the host."""
        slot_T: IntArray = self.slot_T.cpu().numpy()
        return slot_T

    @cached_property
    def runs(self) -> list[tuple[int, slice]]:
        """Consecutive rows of one adapter, slot by slot as they stand."""
        edges = np.flatnonzero(np.diff(self.slot_rows)) + 1
        starts, stops = [0, *edges.tolist()], [*edges.tolist(), len(self.slot_rows)]
        runs = [(int(self.slot_rows[a]), slice(a, b)) for a, b in zip(starts, stops, strict=True)]
        return [(slot, rows) for slot, rows in runs if slot >= 0]

    @cached_property
    def is_uniform(self) -> bool:
        """Whether one adapter serves every token."""
        return len(self.stack.adapters) == 1 and bool((self.slot_T == 0).all())

    @cached_property
    def _segments(self) -> Segments:
        from openmint.kernels.segmented import segments

        return segments(self.slot_T, len(self.stack.adapters))

    def _select(self, group: TargetGroup, num_targets: int) -> tuple[Tensor | None, Tensor | float]:
        """Which rows are whose, and their scales, for rows that repeat once per target."""
        members = self.stack.members(group)
        specs = [self.stack.adapters[slot].spec for slot in members]
        if self.is_uniform:
            return None, specs[0].scaling
        device = self.slot_T.device
        pairs = list(zip(members, specs, strict=True))
        slot_R = torch.tensor([slot for slot, spec in pairs for _ in range(spec.rank)])
        scale_R = torch.tensor([spec.scaling for spec in specs for _ in range(spec.rank)])
        slot_R, scale_R = (rows_R.repeat(num_targets).to(device) for rows_R in (slot_R, scale_R))
        own_TR = self.slot_T[:, None] == slot_R[None, :]
        return own_TR, scale_R.to(self.stack.adapters[0].flat_P.dtype)


def adapters_of(
    batch: AdapterBatch | None,
    linears: Sequence[HasPaths],
    direction: Direction,
    slot_rows: IntArray | None = None,
) -> dense.Adapters:
    """The adapters of a batch for many linear layers; of rows in another order, their slots."""
    if batch is None:
        return dense.Adapters(0, 0, 0, 0, 0, 0)
    stack = batch.stack
    shrink_NS, expand_NS = stack.all_addresses(linears, direction)
    slot_T = batch.slot_rows if slot_rows is None else slot_rows
    return dense.Adapters(
        slot_T=slot_T.ctypes.data,
        shrink_NS=shrink_NS.ctypes.data,
        expand_NS=expand_NS.ctypes.data,
        rank_S=stack.rank_S.ctypes.data,
        scale_S=stack.scale_S.ctypes.data,
        num_slots=len(stack.adapters),
    )
