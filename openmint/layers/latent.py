"""Multi-head latent attention (arXiv:2405.04434), and the indexer of its sparse form.

Shapes: T packed tokens, D hidden size, H heads, R latent size, N part of a head's key that is made
from the latent, P part that turns and all heads share, E size of a head's values, A adapter rows,
I index heads.

A token leaves one latent for all heads. Training makes keys and values from it. Sampling caches the
latents as they are: queries are taken into latent space instead (`absorbed`), so a step's work per
cached token is R + P numbers for each head, and no key or value is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openmint.layers.adapters import AdapterBatch, LoraDelta
from openmint.layers.attention import Attention, Heads, PackedAttention
from openmint.layers.batch import Batch
from openmint.layers.linear import LoraLinear
from openmint.layers.norm import rms_norm
from openmint.layers.rotary import Angles, rotate_halves, rotate_pairs
from openmint.layers.sparse import IndexQueries

NORM_EPS = 1e-6
"""Of the latents' norms, in every published model, whatever its config says of the others."""


@dataclass(frozen=True, slots=True)
class LatentShape:
    num_heads: int
    latent: int
    from_latent: int
    turned: int
    value: int


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """What a batch's tokens are to attention: queries in two parts, and for keys and values of all
    heads one latent and a part that turns."""

    q_THN: Tensor
    q_THP: Tensor
    latent_TR: Tensor
    k_T1P: Tensor


class LatentAttention:
    """One layer's."""

    def __init__(
        self,
        heads: Heads,
        shape: LatentShape,
        down: LoraLinear,
        q_up: tuple[Tensor, LoraLinear] | None,
        latent_norm_R: Tensor,
        up: LoraLinear,
        up_weight: Tensor,
        out: LoraLinear,
        indexer: Indexer | None,
        turns_pairs: bool,
    ) -> None:
        """`down` gives the queries, or with `q_up` (its norm and itself) their latents, and then
        the latent and the shared part of the key. `up_weight` is the frozen weight of `up`."""
        self.heads, self.shape = heads, shape
        self._down, self._q_up, self._up, self._out = down, q_up, up, out
        self._latent_norm_R, self._indexer = latent_norm_R, indexer
        by_head = up_weight.unflatten(0, (shape.num_heads, -1))
        self._key_HNR, self._value_HER = by_head.split([shape.from_latent, shape.value], dim=1)
        self._turn = rotate_pairs if turns_pairs else rotate_halves

    @property
    def linears(self) -> list[LoraLinear]:
        q_up = [self._q_up[1]] if self._q_up else []
        return [self._down, *q_up, self._up, self._out]

    def forward(self, x_TD: Tensor, angles: Angles, batch: Batch) -> Tensor:
        shape, attention, adapters = self.shape, batch.attention, batch.adapters
        latents = self._down(x_TD, adapters)
        num_q = latents.shape[1] - shape.latent - shape.turned
        q, latent_TR, turned_TP = latents.split([num_q, shape.latent, shape.turned], dim=1)
        if self._q_up is not None:
            norm_D, q_up = self._q_up
            q = rms_norm(q.contiguous(), norm_D, NORM_EPS)
            if self._indexer is not None:
                queries = self._indexer.queries(x_TD.detach(), q.detach(), angles)
                attention.choose(queries, batch.routes)
            q = q_up(q, adapters)
        q_THN, q_THP = q.unflatten(1, (shape.num_heads, -1)).split(
            [shape.from_latent, shape.turned], dim=2
        )
        q_THP, k_T1P = self._turn(q_THP, angles), self._turn(turned_TP[:, None], angles)
        latent_TR = rms_norm(latent_TR.contiguous(), self._latent_norm_R, NORM_EPS)
        made = LatentHeads(q_THN, q_THP, latent_TR, k_T1P)
        attend = self._expanded if isinstance(attention, PackedAttention) else self._absorbed
        return self._out(attend(made, attention, adapters), adapters)

    def _expanded(
        self, made: LatentHeads, attention: Attention, adapters: AdapterBatch | None
    ) -> Tensor:
        up_THW = self._up(made.latent_TR, adapters).unflatten(1, (self.shape.num_heads, -1))
        k_THN, v_THE = up_THW.split([self.shape.from_latent, self.shape.value], dim=2)
        k_THP = made.k_T1P.expand(-1, self.shape.num_heads, -1)
        q, k = torch.cat((made.q_THN, made.q_THP), dim=2), torch.cat((k_THN, k_THP), dim=2)
        return attention.attend(self.heads, q, k, v_THE)

    def _absorbed(
        self, made: LatentHeads, attention: Attention, adapters: AdapterBatch | None
    ) -> Tensor:
        q_HTR = made.q_THN.transpose(0, 1) @ self._key_HNR
        k_T1R = made.latent_TR[:, None]
        delta = adapters.stacked_delta(self._up.group, self._up.paths) if adapters else None
        if delta is not None:
            b_AHN, b_AHE = self._b_of(delta)
            h_HTA = delta.select(torch.einsum("thn,ahn->hta", made.q_THN, b_AHN))
            q_HTR = q_HTR + h_HTA @ delta.stacked.a_RI
        q = torch.cat((q_HTR.transpose(0, 1), made.q_THP), dim=2)
        k = torch.cat((k_T1R, made.k_T1P), dim=2)
        seen_TW = attention.attend(self.heads, q, k, k_T1R)
        seen_HTR = seen_TW.unflatten(1, (self.shape.num_heads, -1)).transpose(0, 1)
        out_HTE = seen_HTR @ self._value_HER.transpose(1, 2)
        if delta is not None:
            h_HTA = delta.select(seen_HTR @ delta.stacked.a_RI.t())
            out_HTE = out_HTE + torch.einsum("hta,ahe->hte", h_HTA, b_AHE)
        out_TW: Tensor = out_HTE.transpose(0, 1).flatten(1)
        return out_TW

    def _b_of(self, delta: LoraDelta) -> tuple[Tensor, Tensor]:
        """The adapters' B of keys and of values, by head."""
        b_AHW = delta.stacked.bs_RO[0].unflatten(1, (self.shape.num_heads, -1))
        b_AHN, b_AHE = b_AHW.split([self.shape.from_latent, self.shape.value], dim=2)
        return b_AHN, b_AHE


class Indexer:
    """Chooses keys for queries by cheap heads of its own. It is frozen: the choice has no gradient,
    so an adapter on it would never learn."""

    def __init__(
        self,
        layer: int,
        num_heads: int,
        num_chosen: int,
        weights: tuple[Tensor, Tensor, Tensor],
        k_norm: tuple[Tensor, Tensor],
        turned: int,
        turns_pairs: bool,
    ) -> None:
        """`weights` of `wq_b`, `wk` and `weights_proj`; `k_norm` has a weight and a bias."""
        self.layer, self._num_heads, self._num_chosen = layer, num_heads, num_chosen
        self._q_weight, self._k_weight, self._head_weight = weights
        self._k_norm, self._turned = k_norm, turned
        self._turn = rotate_pairs if turns_pairs else rotate_halves

    @torch.no_grad()
    def queries(self, x_TD: Tensor, q_latent: Tensor, angles: Angles) -> IndexQueries:
        """Of hidden states and their queries' latents."""
        q_TID = F.linear(q_latent, self._q_weight).unflatten(1, (self._num_heads, -1))
        k_TD = F.linear(x_TD, self._k_weight)
        k_TD = F.layer_norm(k_TD, k_TD.shape[1:], *self._k_norm, eps=NORM_EPS)
        weight_TI = F.linear(x_TD.float(), self._head_weight)
        scale = (self._num_heads * k_TD.shape[1]) ** -0.5
        q_TID, k_T1D = self._turned_part(q_TID, angles), self._turned_part(k_TD[:, None], angles)
        return IndexQueries(self.layer, self._num_chosen, q_TID, k_T1D[:, 0], weight_TI * scale)

    def _turned_part(self, x_THD: Tensor, angles: Angles) -> Tensor:
        turned, still = x_THD[..., : self._turned], x_THD[..., self._turned :]
        return torch.cat((self._turn(turned, angles), still), dim=-1)
