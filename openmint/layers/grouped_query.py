"""Attention in which groups of query heads share keys and values (arXiv:2305.13245).

Shapes: T packed tokens, D hidden size, W values of all heads, H query heads, G key/value heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmint.layers.attention import Heads
from openmint.layers.batch import Batch
from openmint.layers.linear import LoraLinear
from openmint.layers.norm import rms_norm
from openmint.layers.rotary import Angles, rotate


class GroupedQueryAttention:
    """One layer's."""

    def __init__(
        self,
        heads: Heads,
        num_heads: tuple[int, int],
        qkv: LoraLinear,
        out: LoraLinear,
        norms: tuple[Tensor | None, Tensor | None] = (None, None),
        eps: float = 0.0,
    ) -> None:
        """`num_heads` of queries and of keys. `norms` of q and k are as wide as a head, or as all
        heads together."""
        self.heads, self.num_heads = heads, num_heads
        self.qkv, self.out = qkv, out
        self.head_dim = qkv.num_out // (num_heads[0] + 2 * num_heads[1])
        self.q_norm_D, self.k_norm_D = norms
        self._eps = eps

    @property
    def linears(self) -> list[LoraLinear]:
        return [self.qkv, self.out]

    def forward(self, x_TD: Tensor, angles: Angles, batch: Batch) -> Tensor:
        heads_TW = self._normed(self.qkv(x_TD, batch.adapters))
        num_q, num_kv = self.num_heads
        turned_THD, v_TGD = rotate(heads_TW, angles, num_q + num_kv, self.head_dim)
        q_THD, k_TGD = turned_THD.split([num_q, num_kv], dim=1)
        seen_TW = batch.attention.attend(self.heads, q_THD, k_TGD, v_TGD)
        return self.out(seen_TW, batch.adapters)

    def _normed(self, heads_TW: Tensor) -> Tensor:
        """The same heads with q and k normalised, where the checkpoint does so."""
        if self.q_norm_D is None or self.k_norm_D is None:
            return heads_TW
        q_TW, k_TW, v_TW = heads_TW.split([part.stop - part.start for part in self.qkv.parts], -1)
        q_TW = _norm_each(q_TW, self.q_norm_D, self._eps)
        return torch.cat((q_TW, _norm_each(k_TW, self.k_norm_D, self._eps), v_TW), dim=1)


def _norm_each(x_TW: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return rms_norm(x_TW.unflatten(1, (-1, len(weight_D))), weight_D, eps).flatten(1)
