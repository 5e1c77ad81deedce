"""Feed-forward layers: gated ones, and mixtures of experts of which each token takes a few.

Shapes: T tokens, D hidden size, E experts, K experts of a token, N = T * K rows expert by expert,
R rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from openmint.layers.adapters import AdapterBatch
from openmint.layers.batch import Batch
from openmint.layers.linear import LoraLinear
from openmint.layers.router import Router
from openmint.layers.swiglu import silu_gate

Activation = Callable[[Tensor], Tensor]
"""Of rows that hold the gate and then the up values."""


class GatedFeedForward:
    """`down(activation(gate_up(x)))`: a dense layer, or one expert."""

    def __init__(
        self, gate_up: LoraLinear, down: LoraLinear, activation: Activation = silu_gate
    ) -> None:
        self.gate_up, self.down = gate_up, down
        self._activation = activation

    @property
    def linears(self) -> list[LoraLinear]:
        return [self.gate_up, self.down]

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        return self.adapted(x_TD, batch.adapters)

    def adapted(self, x_TD: Tensor, adapters: AdapterBatch | None) -> Tensor:
        return self.down(self._activation(self.gate_up(x_TD, adapters)), adapters)


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
        y_TD = self._routed(x_TD, expert_TK, weight_TK, batch.adapters)
        return y_TD if self.shared is None else y_TD + self.shared.forward(x_TD, batch)

    def _routed(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, adapters: AdapterBatch | None
    ) -> Tensor:
        """Rows are put together by expert, so that each expert multiplies once.

        A token's outputs are summed in the order of its row of `expert_TK`, whoever stands beside
        it in the batch. Experts of other ranks give zeros.
        """
        order_N = expert_TK.flatten().argsort(stable=True)
        token_N = order_N // expert_TK.shape[1]
        counts = torch.bincount(expert_TK.flatten(), minlength=self.own.stop).tolist()
        shares = [*zip(x_TD[token_N].split(counts), token_N.split(counts), strict=True)]
        before, upto = sum(counts[: self.own.start]), sum(counts[: self.own.stop])
        parts = [x_TD.new_zeros(before, x_TD.shape[1])]
        for expert, (x_RD, token_R) in zip(self.experts, shares[self.own], strict=True):
            if len(token_R):
                own = adapters.at(token_R) if adapters else None
                parts.append(expert.adapted(x_RD, own))
        parts.append(x_TD.new_zeros(len(order_N) - upto, x_TD.shape[1]))
        y_TKD = torch.cat(parts)[order_N.argsort()].unflatten(0, expert_TK.shape)
        y_TD: Tensor = (y_TKD.float() * weight_TK[..., None].float()).sum(1)
        return y_TD.to(x_TD.dtype)
