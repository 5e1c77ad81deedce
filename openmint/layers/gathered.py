"""Frozen weights that ranks hold in parts: a block's are whole only while it computes.

For ranks that divide data, not layers: each computes all of a model for its own tokens. A block's
weights are gathered when it begins and dropped when it ends, on the way back again. Nothing frozen
has a gradient, so there is nothing to scatter.

Shapes: I in, O out, R rows of one rank, F values of one rank, N ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from openmint.layers.linear import LoraLinear, PartWeights, TorchLinear, joined_bias
from openmint.layers.ranks import Ranks, Split
from openmint.types import TargetGroup


class GatheredLinear(TorchLinear):
    """A layer of whose weight each rank holds some rows; whole between `BlockWeights`' calls."""

    def __init__(
        self, group: TargetGroup, parts: Sequence[PartWeights], own_RI: Tensor, ranks: Ranks
    ) -> None:
        """Of the weights of `parts` only shapes are read. `own_RI` are this rank's rows of all of
        them end to end, as many on each rank; behind the last row they may be anything."""
        LoraLinear.__init__(self, group, parts, Split(None, ranks))
        self.bias_O = joined_bias(parts)
        self.own_RI = own_RI
        self.weight_OI = own_RI[:0]

    @staticmethod
    def rows(count: int, ranks: Ranks) -> tuple[int, int]:
        """This rank's first and last but one of `count` rows; how many each rank has is
        `ceil(count / size)`."""
        each = -(-count // ranks.size)
        return min(count, ranks.rank * each), min(count, (ranks.rank + 1) * each)


class BlockWeights:
    """The weights of one block's linear layers."""

    def __init__(self, linears: Sequence[LoraLinear], ranks: Ranks) -> None:
        self._linears = [each for each in linears if isinstance(each, GatheredLinear)]
        self._ranks = ranks
        self._own_F = torch.cat([linear.own_RI.flatten() for linear in self._linears])
        self._sizes = [linear.own_RI.numel() for linear in self._linears]
        for linear, own_F in zip(self._linears, self._own_F.split(self._sizes), strict=True):
            linear.own_RI = own_F.view_as(linear.own_RI)

    def begin(self, x_TD: Tensor) -> Tensor:
        """What the block computes from: `x_TD`, after which all weights are there."""
        self.gather()
        return _on_way_back(x_TD, self.drop)

    def end(self, y_TD: Tensor) -> Tensor:
        """What the block has computed."""
        self.drop()
        return _on_way_back(y_TD, self.gather)

    def gather(self) -> None:
        """Have every layer's weight be whole."""
        all_NF = self._ranks.gather(self._own_F)
        for linear, part_NF in zip(self._linears, all_NF.split(self._sizes, dim=1), strict=True):
            linear.weight_OI = part_NF.reshape(-1, linear.num_in)[: linear.num_out]

    def drop(self) -> None:
        for linear in self._linears:
            linear.weight_OI = linear.own_RI[:0]


def _on_way_back(x_TD: Tensor, act: Callable[[], None]) -> Tensor:
    """`x_TD`; where it has a way back, `act` is called on it."""
    if not x_TD.requires_grad:
        return x_TD
    out: Tensor = _Acting.apply(x_TD, act)
    return out


class _Acting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, act: Callable[[], None]) -> Tensor:
        ctx.act = act
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.act()
        return grads[0], None
