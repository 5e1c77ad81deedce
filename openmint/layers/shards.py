"""Adapters over ranks: which part of each target a rank has, and the whole from all parts.

Outside the engine an adapter is always whole, one flat vector in the layout of its file. Inside,
each rank holds a vector of its own parts. Of a target that is divided by outputs A is on every rank
and B is cut; of one divided by inputs A is cut and B is on every rank. The half that every rank has
gets a share of its gradient on each, and shares are summed once per work. What ranks hold in common
must stay the same to the bit; whoever gathers a whole adapter finds out whether it did.

Shapes: P parameters of a whole adapter, L of this rank's part, N targets of a stack, R rank,
I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from openmint.errors import EngineFailed
from openmint.layers.adapters import AdapterLayout
from openmint.layers.ranks import ALONE, Ranks
from openmint.types import LoraSpec, TargetModule, stacks_of

MOST_SHAPES = 256
"""Shapes of adapters whose parts are known at once; clients choose ranks and alphas."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank has of a target."""

    whole: TargetModule
    ins: tuple[int, int]
    """Its inputs `[0]` up to `[1]`; likewise outputs."""
    outs: tuple[int, int]
    has_shares: bool
    """Whether gradients of the half that isn't cut are shares of a sum."""

    @property
    def own(self) -> TargetModule:
        """The target as this rank's layers have it."""
        num_in, num_out = self.ins[1] - self.ins[0], self.outs[1] - self.outs[0]
        return TargetModule(self.whole.path, self.whole.group, num_in, num_out)


@dataclass(frozen=True, slots=True)
class Places:
    """Where one rank's part of a stack lies in the whole: some of its targets, some columns."""

    members_N: Tensor
    paths: tuple[str, ...]
    columns: tuple[slice, slice]
    """Of A and of B."""
    is_cut: tuple[bool, bool]
    has_shares: bool


class Shard:
    """This rank's part of the adapters of one shape. Here there is one rank, and it has all."""

    def __init__(self, whole: AdapterLayout) -> None:
        self.whole = self.layout = whole

    def take(self, whole_P: Tensor) -> Tensor:
        """This rank's part of a whole vector."""
        return whole_P

    def gather(self, own_L: Tensor) -> Tensor:
        """The whole vector of all ranks' parts, on each of them.

        Raises EngineFailed, on all, where what they have in common differs.
        """
        return own_L

    def sum_shares_(self, grads_L: Tensor) -> None:
        """Make a gradient of shares the gradient."""

    def norm(self, own_L: Tensor) -> float:
        """Of the whole vector."""
        return float(own_L.norm())

    def agree(self, is_so: bool) -> bool:
        """Whether it is so on every rank."""
        return is_so


class RankShard(Shard):
    """This rank's part of several."""

    def __init__(self, whole: AdapterLayout, pieces: Sequence[Sequence[Piece]], ranks: Ranks):
        """`pieces` of every rank."""
        self.whole, self._ranks = whole, ranks
        groups = whole.spec.groups
        kept = [[piece for piece in own if piece.whole.group in groups] for own in pieces]
        self._layouts = [AdapterLayout(whole.spec, [p.own for p in own]) for own in kept]
        self._places = [_places(whole, own) for own in kept]
        self.layout = self._layouts[ranks.rank]

    def take(self, whole_P: Tensor) -> Tensor:
        own_L = whole_P.new_empty(self.layout.num_params)
        for places, ours, theirs in self._pairs(self._ranks.rank, own_L, whole_P):
            for half, columns in enumerate(places.columns):
                ours[half].copy_(theirs[half][places.members_N][..., columns])
        return own_L

    def gather(self, own_L: Tensor) -> Tensor:
        whole_P = own_L.new_empty(self.whole.num_params)
        parts = self._ranks.gather(own_L)
        for rank, part_L in enumerate(parts):
            for places, ours, theirs in self._pairs(rank, part_L, whole_P):
                for half, columns in enumerate(places.columns):
                    theirs[half][places.members_N, :, columns] = ours[half]
        for rank, part_L in enumerate(parts):
            self._check(rank, part_L, whole_P)
        return whole_P

    def _check(self, rank: int, part_L: Tensor, whole_P: Tensor) -> None:
        """What a rank has must be in the whole, to which the last one wrote."""
        for places, ours, theirs in self._pairs(rank, part_L, whole_P):
            for half, columns in enumerate(places.columns):
                found_NRC = theirs[half][places.members_N][..., columns]
                differs_N = (_bits(found_NRC) != _bits(ours[half])).flatten(1).any(1)
                if differs_N.any():
                    path = places.paths[int(differs_N.nonzero()[0])]
                    raise EngineFailed(
                        f"{'AB'[half]} of target {path} differs between rank {rank} and rank "
                        f"{len(self._layouts) - 1}, which must have the same"
                    )

    def sum_shares_(self, grads_L: Tensor) -> None:
        shared = [
            halves[half]
            for places, halves, _ in self._pairs(self._ranks.rank, grads_L, None)
            for half, is_cut in enumerate(places.is_cut)
            if places.has_shares and not is_cut
        ]
        if not shared:
            return
        sums = self._ranks.sum_(torch.cat([half.flatten() for half in shared]))
        for half, total in zip(shared, sums.split([h.numel() for h in shared]), strict=True):
            half.copy_(total.view_as(half))

    def norm(self, own_L: Tensor) -> float:
        squares = 0.0
        for places, halves, _ in self._pairs(self._ranks.rank, own_L, None):
            for half, is_cut in zip(halves, places.is_cut, strict=True):
                copies = 1 if is_cut else self._ranks.size
                squares += float(half.norm(dtype=torch.float64)) ** 2 / copies
        return math.sqrt(self._ranks.total(squares))

    def agree(self, is_so: bool) -> bool:
        return self._ranks.agree(is_so)

    def _pairs(
        self, rank: int, part_L: Tensor, whole_P: Tensor | None
    ) -> Iterable[tuple[Places, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """Stack by stack: where it lies, A and B of the rank's part, and those of the whole."""
        ours = self._layouts[rank].stack_views(part_L)
        theirs = ours if whole_P is None else self.whole.stack_views(whole_P)
        for name, places in self._places[rank].items():
            yield places, ours[name], theirs[name]


def _bits(values: Tensor) -> Tensor:
    """Equal where the values are the same to the bit, NaNs too."""
    return values.contiguous().view(torch.int32 if values.itemsize == 4 else torch.int16)


def _places(whole: AdapterLayout, pieces: Iterable[Piece]) -> dict[str, Places]:
    by_path = {piece.whole.path: piece for piece in pieces}
    found = {}
    for stack in whole.stacks:
        paths = tuple(target.path for target in stack.targets)
        members = [n for n, path in enumerate(paths) if path in by_path]
        if not members:
            continue
        piece = by_path[paths[members[0]]]
        has_all = len(members) == len(paths)
        found[stack.name] = Places(
            torch.tensor(members),
            tuple(paths[n] for n in members),
            (slice(*piece.ins), slice(*piece.outs)),
            (
                not has_all or piece.ins != (0, stack.num_in),
                not has_all or piece.outs != (0, stack.num_out),
            ),
            piece.has_shares,
        )
    return found


class Shards:
    """Which parts of a model's targets every rank has."""

    def __init__(self, own: Sequence[Piece], ranks: Ranks = ALONE) -> None:
        """Every rank makes one at the same time."""
        self.ranks = ranks
        self._pieces = ranks.gather_values(tuple(own))
        self._shard = lru_cache(MOST_SHAPES)(self._make)

    @cached_property
    def targets(self) -> tuple[TargetModule, ...]:
        """The whole model's, as an adapter's vector has them."""
        found = {piece.whole.path: piece.whole for pieces in self._pieces for piece in pieces}
        return tuple(target for stack in stacks_of(found.values()) for target in stack.targets)

    def of(self, whole: AdapterLayout) -> Shard:
        """This rank's part of adapters of this layout."""
        return Shard(whole) if self.ranks.size == 1 else self._shard(whole.spec)

    def _make(self, spec: LoraSpec) -> RankShard:
        targets = [target for target in self.targets if target.group in spec.groups]
        return RankShard(AdapterLayout(spec, targets), self._pieces, self.ranks)


ONE_RANK = Shards(())
"""Where nothing is divided."""
