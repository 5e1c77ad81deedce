"""Attention over the keys that an indexer chose (DeepSeek Sparse Attention, arXiv:2512.02556).

Shapes: S sequences, L padded length, T packed tokens, H query heads, I index heads, D size of a
head's keys, E of its values, K keys, C chosen keys of a query.

Each query attends to C keys that are gathered for it, so its work doesn't grow with the context.
The choice has no gradient, and neither have the indexer's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

QUERIES = 256
"""So many queries have their keys gathered at once: 256 x 2,048 keys of 576 bf16 values take
0.6 GB."""
NONE = -1
"""Stands where a query has fewer keys than are chosen."""


@dataclass(frozen=True, slots=True)
class IndexQueries:
    """What the indexer of one layer makes of a batch."""

    layer: int
    """Its place in the cache."""
    num_chosen: int
    q_TID: Tensor
    k_TD: Tensor
    weight_TI: Tensor
    """Of the index heads' scores."""


def parts_of(count: int) -> list[slice]:
    """All queries, so many at once."""
    return [slice(start, start + QUERIES) for start in range(0, count, QUERIES)]


def choose(q_SLID: Tensor, k_SKD: Tensor, weight_SLI: Tensor, at_SL: Tensor, count: int) -> Tensor:
    """Positions of the keys with the highest `sum_i weight_i * relu(q_i . k)` among those up to the
    query's own, ascending and then NONE, int64 `[S, L, C]`."""
    num_keys = k_SKD.shape[1]
    parts = []
    for rows in parts_of(q_SLID.shape[1]):
        q, weight, at = q_SLID[:, rows].float(), weight_SLI[:, rows].float(), at_SL[:, rows]
        score_SLIK = torch.einsum("slid,skd->slik", q, k_SKD.float()).relu_()
        score_SLK = torch.einsum("slik,sli->slk", score_SLIK, weight)
        is_later = torch.arange(num_keys, device=at.device) > at[..., None]
        best = score_SLK.masked_fill_(is_later, -torch.inf).topk(min(count, num_keys), dim=-1)
        position_SLC = best.indices.masked_fill_(best.values == -torch.inf, num_keys)
        position_SLC = position_SLC.sort(dim=-1).values
        parts.append(position_SLC.masked_fill_(position_SLC == num_keys, NONE))
    return torch.cat(parts, dim=1)


def attend_chosen(
    q_THD: Tensor, k_TCD: Tensor, v_TCE: Tensor, none_TC: Tensor, scale: float
) -> Tensor:
    """Attention output `[T, H, E]` over keys that all heads share."""
    score_THC = torch.einsum("thd,tcd->thc", q_THD, k_TCD).float() * scale
    probs_THC = score_THC.masked_fill_(none_TC[:, None], -torch.inf).softmax(-1)
    return torch.einsum("thc,tce->the", probs_THC.to(v_TCE.dtype), v_TCE)


class ChosenPacked(torch.autograd.Function):
    """Attention output `[T, H, E]` over rows of the same batch, which heads have of their own;
    probabilities are computed again on the way back."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_THD: Tensor, v_THE: Tensor, row_TC: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q_THD, k_THD, v_THE, row_TC)
        ctx.scale = scale
        outputs = []
        for part in parts_of(len(q_THD)):
            probs_THC = _probs(q_THD[part], k_THD, row_TC[part], scale)
            v_TCHE = v_THE[row_TC[part].clamp(min=0)]
            outputs.append(torch.einsum("thc,tche->the", probs_THC, v_TCHE))
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_THD, k_THD, v_THE, row_TC = ctx.saved_tensors
        grad_k, grad_v = torch.zeros_like(k_THD), torch.zeros_like(v_THE)
        grad_qs = []
        for part in parts_of(len(q_THD)):
            rows_N = row_TC[part].clamp(min=0)
            q, k_TCHD, v_TCHE, grad_THE = q_THD[part], k_THD[rows_N], v_THE[rows_N], grads[0][part]
            probs_THC = _probs(q, k_THD, row_TC[part], ctx.scale)
            along_THC = torch.einsum("the,tche->thc", grad_THE, v_TCHE)
            total_TH1 = (along_THC * probs_THC).sum(-1, keepdim=True)
            grad_THC = probs_THC * (along_THC - total_TH1) * ctx.scale
            grad_qs.append(torch.einsum("thc,tchd->thd", grad_THC, k_TCHD))
            grad_k.index_put_((rows_N,), torch.einsum("thc,thd->tchd", grad_THC, q), True)
            grad_v.index_put_((rows_N,), torch.einsum("thc,the->tche", probs_THC, grad_THE), True)
        return torch.cat(grad_qs), grad_k, grad_v, None, None


def _probs(q_THD: Tensor, k_THD: Tensor, row_TC: Tensor, scale: float) -> Tensor:
    score_THC = torch.einsum("thd,tchd->thc", q_THD, k_THD[row_TC.clamp(min=0)]).float() * scale
    probs_THC = score_THC.masked_fill_((row_TC == NONE)[:, None], -torch.inf).softmax(-1)
    return probs_THC.to(q_THD.dtype)
