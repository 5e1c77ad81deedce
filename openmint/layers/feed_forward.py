"""Feed-forward layers: gated ones, and mixtures of experts of which each token takes a few.

Shapes: T tokens, D hidden size, E experts, K experts of a token, N = T * K rows expert by expert,
R rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from openmint.layers.adapters import AdapterBatch
from openmint.layers.batch import Batch
from openmint.layers.grouped_experts import GroupedExperts
from openmint.layers.linear import LoraLinear, TiledLinear, TorchLinear
from openmint.layers.router import Router
from openmint.layers.swiglu import silu_gate
from openmint.layers.tiled_experts import TiledExperts

Activation = Callable[[Tensor], Tensor]
"""Of rows that hold the gate and then the up values."""


class GatedFeedForward:
    """`down(activation(gate_up(x)))`: a dense layer, or one expert."""

    def __init__(
        self, gate_up: LoraLinear, down: LoraLinear, activation: Activation = silu_gate
    ) -> None:
        self.gate_up, self.down = gate_up, down
        self.activation = activation

    @property
    def linears(self) -> list[LoraLinear]:
        return [self.gate_up, self.down]

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        return self.adapted(x_TD, batch.adapters)

    def adapted(self, x_TD: Tensor, adapters: AdapterBatch | None) -> Tensor:
        return self.down(self.activation(self.gate_up(x_TD, adapters)), adapters)


def tiled_experts(experts: Sequence[GatedFeedForward]) -> TiledExperts | None:
    """Them as one kernel computes them, where it can."""
    gate_ups = [each.gate_up for each in experts if isinstance(each.gate_up, TiledLinear)]
    downs = [each.down for each in experts if isinstance(each.down, TiledLinear)]
    are_tiled = len(gate_ups) == len(downs) == len(experts)
    if not are_tiled or any(each.activation is not silu_gate for each in experts):
        return None
    return TiledExperts(gate_ups, downs)


def grouped_experts(
    experts: Sequence[GatedFeedForward], own: slice, num_experts: int
) -> GroupedExperts | None:
    """Them as grouped products compute them, where they can; `own` of all there are."""
    gate_ups = [each.gate_up for each in experts if isinstance(each.gate_up, TorchLinear)]
    downs = [each.down for each in experts if isinstance(each.down, TorchLinear)]
    linears = [linear for each in experts for linear in each.linears]
    if len(gate_ups) + len(downs) < len(linears) or not GroupedExperts.suits(linears):
        return None
    return GroupedExperts(gate_ups, downs, experts[0].activation, own, num_experts)


class MixtureOfExperts:
    """Each token's experts, weighed by the router, and one that all tokens share."""

    def __init__(
        self,
        router: Router,
        experts: Sequence[GatedFeedForward],
        own: slice,
        shared: GatedFeedForward | None,
        place: int,
    ) -> None:
        """`own` says which of all experts these are, the others are on other ranks; `place` among
        the layers that have experts."""
        self.router, self.experts, self.own, self.shared = router, experts, own, shared
        self._place = place
        self._tiled = tiled_experts(experts)
        self._grouped = grouped_experts(experts, own, router.num_experts)

    @property
    def linears(self) -> list[LoraLinear]:
        parts = [*self.experts, *([self.shared] if self.shared else [])]
        return [linear for part in parts for linear in part.linears]

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        logits_TE = self.router.logits(x_TD)
        expert_TK = self.router.choose(logits_TE.detach())
        if batch.routes is not None:
            expert_TK = batch.routes.experts(self._place, expert_TK)
        weight_TK = self.router.weigh(logits_TE, expert_TK)
        y_TD = self._routed(x_TD, expert_TK, weight_TK, batch)
        return y_TD if self.shared is None else y_TD + self.shared.forward(x_TD, batch)

    def _routed(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, batch: Batch) -> Tensor:
        """The weighed sum of each token's experts, in the order of its choices, whoever stands
        beside it in the batch."""
        if self._tiled is not None and not x_TD.requires_grad:
            chosen = expert_TK, weight_TK, self.own.start
            return self._tiled.serve(x_TD, chosen, batch.adapters, batch.together)
        if self._grouped is not None and self._grouped.takes(batch.adapters):
            y_TKD = self._grouped.forward(x_TD, expert_TK, batch.adapters)
        else:
            y_TKD = self._one_by_one(x_TD, expert_TK, batch.adapters)
        y_TD: Tensor = (y_TKD.float() * weight_TK[..., None].float()).sum(1)
        return y_TD.to(x_TD.dtype)

    def _one_by_one(self, x_TD: Tensor, expert_TK: Tensor, adapters: AdapterBatch | None) -> Tensor:
        """What its experts make of each token, `[T, K, D]`; those of other ranks make zeros.

        Rows are put together by expert, so that each expert multiplies once.
        """
        order_N = expert_TK.flatten().argsort(stable=True)
        counts = torch.bincount(expert_TK.flatten(), minlength=self.own.stop).tolist()
        before, upto = sum(counts[: self.own.start]), sum(counts[: self.own.stop])
        token_N = order_N[before:upto] // expert_TK.shape[1]
        y_ND = self._of_own(x_TD[token_N], counts[self.own], token_N, adapters)
        y_ND = F.pad(y_ND, (0, 0, before, len(order_N) - upto))
        return y_ND[order_N.argsort()].view(*expert_TK.shape, -1)

    def _of_own(
        self,
        x_ND: Tensor,
        counts: Sequence[int],
        token_N: Tensor,
        adapters: AdapterBatch | None,
    ) -> Tensor:
        """Rows that stand expert by expert, so many of each, through this rank's experts."""
        if self._tiled is not None:
            return self._tiled.forward(x_ND, counts, token_N, adapters)
        parts = [x_ND[:0]]
        shares = zip(self.experts, x_ND.split(counts), token_N.split(counts), strict=True)
        for expert, x_RD, token_R in shares:
            if len(token_R):
                own = adapters.at(token_R) if adapters else None
                parts.append(expert.adapted(x_RD, own))
        return torch.cat(parts)
