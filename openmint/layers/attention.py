"""Causal attention over packed tokens: without a cache for training, over pages for sampling.

Shapes: T packed tokens, S sequences, L padded length, H query heads, G key/value heads,
D size of a head's keys, E of its values, P pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openmint.kernels import paged
from openmint.kernels.attend import BLOCK, block_shapes
from openmint.kernels.softmax import softmax_, softmax_backward_
from openmint.kernels.team import Together
from openmint.layers.routes import Routes
from openmint.layers.sparse import NONE, ChosenPacked, IndexQueries, attend_chosen, choose
from openmint.types import IntArray

MAX_PADDING = 1.25
"""A bucket's padded size may exceed its tokens by this factor."""
PLAIN_TOKENS = 1024
"""Up to so many keys, CPUs attend by plain GEMMs: 6x faster than the flash kernel at 32 tokens,
even at 256."""

NO_WINDOW = 1 << 40


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """What the attention of one layer is beside its tensors."""

    layer: int
    """Its place in the cache."""
    scale: float
    """Of the scores."""
    window: int = NO_WINDOW
    """How many tokens a query sees, itself the last."""
    sinks_H: Tensor | None = None
    """A score of each head that takes its share and gives nothing (arXiv:2309.17453)."""
    values_within: int | None = None
    """Values are the first so many columns of the keys, and aren't cached. None: they have their
    own place."""
    is_sparse: bool = False
    """Queries see only what the latest `choose` of the batch left them."""


class Attention(Protocol):
    """How the tokens of one batch see each other and the cache."""

    def attend(self, heads: Heads, q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor) -> Tensor:
        """Attention output `[T, H * E]` of one layer; may write k and v to a cache."""
        ...

    def choose(self, queries: IndexQueries, routes: Routes | None) -> None:
        """Settle which keys each query sees in this layer and those that share its choice."""
        ...


def length_buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences that are padded together, longest first, little padding in each."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    buckets: list[list[int]] = []
    num_tokens = 0
    for i in order:
        padded = lengths[buckets[-1][0]] * (len(buckets[-1]) + 1) if buckets else 0
        if not buckets or padded > MAX_PADDING * (num_tokens + lengths[i]):
            buckets.append([])
            num_tokens = 0
        buckets[-1].append(i)
        num_tokens += lengths[i]
    return buckets


class Sight:
    """Which keys each query of a rectangle of sequences sees: none after it, none too far back."""

    def __init__(self, at_SL: IntArray, device: torch.device) -> None:
        """`at_SL` is each query's position among its sequence's keys."""
        self.at_SL = np.ascontiguousarray(at_SL)
        self._device = device
        self._masks: dict[int, Tensor] = {}

    def mask(self, num_keys: int, shared: int, dtype: torch.dtype, window: int) -> Tensor:
        """What is added to scores, 0 or -inf, `[S, 1, shared * L, K]`; made once for all layers
        with this window."""
        if window not in self._masks:
            distance_SLK = self.at_SL[:, :, None] - np.arange(num_keys)
            sees_SLK = torch.from_numpy((distance_SLK >= 0) & (distance_SLK < window))
            mask_SLK = torch.zeros(sees_SLK.shape, dtype=dtype).masked_fill_(~sees_SLK, -torch.inf)
            self._masks[window] = mask_SLK[:, None].to(self._device).repeat(1, 1, shared, 1)
        return self._masks[window]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of like length, padded into one rectangle of rows `index_SL`."""

    index_SL: Tensor
    is_padding_SL: Tensor | None
    sight: Sight


class PackedAttention:
    """Whole sequences, each causal within itself; differentiable.

    Sequences of like length are padded into one rectangle. Padding stands at the right and repeats
    the last token, so no real query sees a padded key.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        starts = self.starts_S = np.cumsum([0, *lengths])
        inverse_T = np.empty(starts[-1], np.int64)
        self.buckets: list[Bucket] = []
        offset = 0
        for members in length_buckets(lengths):
            lengths_S = np.array([lengths[i] for i in members])
            steps_L = np.arange(lengths_S.max())
            at_SL = np.minimum(steps_L, lengths_S[:, None] - 1)
            index_SL = starts[members][:, None] + at_SL
            is_real_SL = steps_L < lengths_S[:, None]
            flat_SL = offset + np.arange(index_SL.size).reshape(index_SL.shape)
            inverse_T[index_SL[is_real_SL]] = flat_SL[is_real_SL]
            padding = None if is_real_SL.all() else torch.from_numpy(~is_real_SL).to(device)
            sight = Sight(at_SL, device)
            self.buckets.append(Bucket(torch.from_numpy(index_SL).to(device), padding, sight))
            offset += index_SL.size
        self._starts_T = torch.from_numpy(np.repeat(starts[:-1], np.diff(starts))).to(device)
        self._chosen_TC: Tensor | None = None
        self._inverse_T = torch.from_numpy(inverse_T).to(device)
        self._is_whole = offset == len(inverse_T) and bool((inverse_T == np.arange(offset)).all())

    def take(self, x_T: Tensor, bucket: Bucket) -> Tensor:
        """The rows of a bucket, `[S, L, ...]`; a view when nothing has to move."""
        if self._is_whole and len(self.buckets) == 1:
            return x_T.view(*bucket.index_SL.shape, *x_T.shape[1:])
        return x_T[bucket.index_SL]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows in packed order again, from those of all buckets, `[S * L, ...]` each."""
        rows = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return rows if self._is_whole else rows[self._inverse_T]

    def attend(self, heads: Heads, q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor) -> Tensor:
        if heads.is_sparse and self._chosen_TC is not None:
            none_TC = self._chosen_TC == NONE
            row_TC = (self._chosen_TC + self._starts_T[:, None]).masked_fill_(none_TC, NONE)
            sparse: Tensor = ChosenPacked.apply(q_THD, k_TGD, v_TGE, row_TC, heads.scale)
            return sparse.flatten(1)
        if is_plain(q_THD, self._longest) and heads.sinks_H is None:
            out: Tensor = _PlainPacked.apply(q_THD, k_TGD, v_TGE, self, heads)
            return out
        outputs = []
        for bucket in self.buckets:
            q_SLHD, k_SLGD, v_SLGE = (self.take(x, bucket) for x in (q_THD, k_TGD, v_TGE))
            k_SGLD, v_SGLE = k_SLGD.transpose(1, 2), v_SLGE.transpose(1, 2)
            is_causal = q_THD.device.type == "cuda" and heads.window == NO_WINDOW
            if is_causal and heads.sinks_H is None:
                outputs.append(causal(q_SLHD, k_SGLD, v_SGLE, heads.scale).flatten(0, 1))
                continue
            outputs.append(attend(heads, q_SLHD, k_SGLD, v_SGLE, bucket.sight).flatten(0, 1))
        return self.join(outputs).flatten(1)

    def choose(self, queries: IndexQueries, routes: Routes | None) -> None:
        own_TC = None  # all keys, where there are no more than may be chosen
        if self._longest > queries.num_chosen:
            own_TC = self._choose(queries)
        self._chosen_TC = own_TC if routes is None else routes.keys(queries.layer, own_TC)

    @torch.no_grad()
    def _choose(self, queries: IndexQueries) -> Tensor:
        given, parts = (queries.q_TID, queries.k_TD, queries.weight_TI), []
        for bucket in self.buckets:
            q_SLID, k_SKD, weight_SLI = (self.take(x, bucket) for x in given)
            at_SL = torch.from_numpy(bucket.sight.at_SL).to(q_SLID.device)
            chosen_SLC = choose(q_SLID, k_SKD, weight_SLI, at_SL, queries.num_chosen)
            room = queries.num_chosen - chosen_SLC.shape[2]
            parts.append(F.pad(chosen_SLC, (0, room), value=NONE).flatten(0, 1))
        return self.join(parts)

    @property
    def _longest(self) -> int:
        return max(bucket.index_SL.shape[1] for bucket in self.buckets)


def causal(q_SLHD: Tensor, k_SGLD: Tensor, v_SGLE: Tensor, scale: float) -> Tensor:
    """`attend` of whole sequences without a window: no mask is read, and half of it is skipped.

    Rows of padding stand at the end and are cut off, so what they see doesn't matter."""
    q_SHLD = q_SLHD.transpose(1, 2)
    out_SHLD = F.scaled_dot_product_attention(
        q_SHLD,
        k_SGLD,
        v_SGLE,
        is_causal=True,
        scale=scale,
        enable_gqa=q_SHLD.shape[1] != k_SGLD.shape[1],
    )
    return out_SHLD.transpose(1, 2)


def is_plain(q: Tensor, num_keys: int) -> bool:
    """Whether attention runs as GEMMs around the softmax kernel."""
    return q.device.type == "cpu" and num_keys <= PLAIN_TOKENS


def attend(heads: Heads, q_SLHD: Tensor, k_SGKD: Tensor, v_SGKE: Tensor, sight: Sight) -> Tensor:
    """Attention output `[S, L, H, E]`. Training and sampling share `_plain`, so they agree."""
    q_SGQD = _grouped(q_SLHD, k_SGKD.shape[1])
    shared = q_SGQD.shape[2] // q_SLHD.shape[1]
    if heads.sinks_H is not None:
        mask_S1QK = sight.mask(k_SGKD.shape[2], shared, q_SLHD.dtype, heads.window)
        out_SGQE = _with_sinks(heads.sinks_H, q_SGQD * heads.scale, k_SGKD, v_SGKE, mask_S1QK)
    elif is_plain(q_SLHD, k_SGKD.shape[2]):
        out_SGQE, _ = _plain(heads, q_SGQD, k_SGKD, v_SGKE, sight)
    else:
        mask_S1QK = sight.mask(k_SGKD.shape[2], shared, q_SLHD.dtype, heads.window)
        out_SGQE = F.scaled_dot_product_attention(
            q_SGQD, k_SGKD, v_SGKE, mask_S1QK, scale=heads.scale
        )
    return _ungrouped(out_SGQE, q_SLHD.shape)


def _plain(
    heads: Heads, q_SGQD: Tensor, k_SGKD: Tensor, v_SGKE: Tensor, sight: Sight
) -> tuple[Tensor, Tensor]:
    """The output and the probabilities."""
    scores_SGQK = q_SGQD @ k_SGKD.transpose(2, 3)
    probs_SGQK = softmax_(scores_SGQK, sight.at_SL, heads.window, heads.scale)
    return probs_SGQK @ v_SGKE, probs_SGQK


def _with_sinks(
    sinks_H: Tensor, q_SGQD: Tensor, k_SGKD: Tensor, v_SGKE: Tensor, mask_S1QK: Tensor
) -> Tensor:
    """The output, of scaled queries."""
    num_seqs, num_groups, num_rows, _ = q_SGQD.shape
    scores_SGQK = (q_SGQD @ k_SGKD.transpose(2, 3) + mask_S1QK).float()
    length = num_rows * num_groups // len(sinks_H)
    sinks_GQ1 = sinks_H.float().view(num_groups, -1, 1).repeat_interleave(length, dim=1)
    sinks_SGQ1 = sinks_GQ1.expand(num_seqs, -1, -1, -1)
    probs_SGQK = torch.cat((scores_SGQK, sinks_SGQ1), dim=-1).softmax(-1)[..., :-1]
    return probs_SGQK.to(v_SGKE.dtype) @ v_SGKE


def _grouped(x_SLHD: Tensor, num_groups: int) -> Tensor:
    """Query heads that share a key head become extra queries, head-major: keys aren't repeated."""
    num_seqs, length, num_heads, width = x_SLHD.shape
    split = x_SLHD.reshape(num_seqs, length, num_groups, num_heads // num_groups, width)
    return split.permute(0, 2, 3, 1, 4).flatten(2, 3)


def _ungrouped(x_SGQD: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_grouped` for queries of this shape; values may be wider or narrower."""
    num_seqs, length, num_heads, _ = shape
    num_groups, width = x_SGQD.shape[1], x_SGQD.shape[3]
    split = x_SGQD.reshape(num_seqs, num_groups, num_heads // num_groups, length, width)
    return split.permute(0, 3, 1, 2, 4).reshape(num_seqs, length, num_heads, width)


class _PlainPacked(torch.autograd.Function):
    """`PackedAttention` on CPUs; keeps the probabilities for the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGE: Tensor,
        packed: PackedAttention,
        heads: Heads,
    ) -> Tensor:
        outputs, kept = [], []
        for bucket in packed.buckets:
            q_SLHD, k_SLGD, v_SLGE = (packed.take(x, bucket) for x in (q_THD, k_TGD, v_TGE))
            k_SGLD, v_SGLE = (x.transpose(1, 2).contiguous() for x in (k_SLGD, v_SLGE))
            q_SGQD = _grouped(q_SLHD, k_SGLD.shape[1])
            out_SGQE, probs_SGQK = _plain(heads, q_SGQD, k_SGLD, v_SGLE, bucket.sight)
            outputs.append(_ungrouped(out_SGQE, q_SLHD.shape).flatten(0, 1))
            kept += [q_SGQD, k_SGLD, v_SGLE, probs_SGQK]
        ctx.save_for_backward(*kept)
        ctx.call, ctx.num_heads = (packed, heads), q_THD.shape[1]
        return packed.join(outputs).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        packed, heads = ctx.call
        grad_THE = grads[0].unflatten(1, (ctx.num_heads, -1))
        parts = []
        for i, bucket in enumerate(packed.buckets):
            q_SGQD, k_SGLD, v_SGLE, probs_SGQK = ctx.saved_tensors[4 * i : 4 * i + 4]
            grad_SLHE = packed.take(grad_THE, bucket)
            if bucket.is_padding_SL is not None:
                grad_SLHE[bucket.is_padding_SL] = 0.0
            grad_SGQE = _grouped(grad_SLHE, k_SGLD.shape[1])
            grad_v_SGLE = probs_SGQK.transpose(2, 3) @ grad_SGQE
            grad_SGQK = grad_SGQE @ v_SGLE.transpose(2, 3)
            at_SL = bucket.sight.at_SL
            softmax_backward_(grad_SGQK, probs_SGQK, at_SL, heads.window, heads.scale)
            grad_q = _ungrouped(grad_SGQK @ k_SGLD, grad_SLHE.shape)
            grad_k_SGLD = grad_SGQK.transpose(2, 3) @ q_SGQD
            grad_k, grad_v = grad_k_SGLD.transpose(1, 2), grad_v_SGLE.transpose(1, 2)
            parts.append([grad.flatten(0, 1) for grad in (grad_q, grad_k, grad_v)])
        grad_q, grad_k, grad_v = (packed.join(grads) for grads in zip(*parts, strict=True))
        return grad_q, grad_k, grad_v, None, None


class KVCache:
    """Paged keys and values of every layer. Which page belongs to whom is the scheduler's book."""

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_tokens: int,
        num_kv_heads: int,
        widths: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        index: tuple[int, int] = (0, 0),
    ) -> None:
        """`widths` of a head's keys and of its values; 0 where values lie within the keys. `index`
        is how many layers have an indexer, and the width of its keys."""
        shape = (num_layers, num_pages, page_tokens, num_kv_heads)
        self.page_tokens = page_tokens
        self.keys = _zeros((*shape, widths[0]), dtype, device)
        self.values = _zeros((*shape, widths[1]), dtype, device)
        self.index_keys = _zeros((index[0], num_pages, page_tokens, 1, index[1]), dtype, device)

    @property
    def has_values(self) -> bool:
        """Whether values have a place of their own."""
        return self.values.shape[-1] > 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on CPUs pages of memory that are taken only when first written to."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


class TiledCache:
    """Paged keys and values of every layer in the layout of `kernels/attend.py`."""

    def __init__(
        self, num_layers: int, num_pages: int, page_tokens: int, num_kv_heads: int, head_dim: int
    ) -> None:
        """`page_tokens` is a multiple of 16."""
        self.page_tokens = page_tokens
        num_blocks = num_pages * page_tokens // BLOCK
        # numpy's zeros take memory only when they are written to.
        self.keys_LB, self.values_LB = (
            np.zeros((num_layers, num_blocks, *shape), np.uint16)
            for shape in block_shapes(num_kv_heads, head_dim)
        )

    def blocks(self, pages_SP: IntArray) -> IntArray:
        """The blocks of the pages, in order."""
        each = self.page_tokens // BLOCK
        return (pages_SP[:, :, None] * each + np.arange(each)).reshape(len(pages_SP), -1)


@dataclass(frozen=True, slots=True)
class TiledPages:
    """New tokens of many sequences over their pages, for kernels that compute a whole stack."""

    cache: TiledCache
    sequence_T: IntArray
    blocks_SB: IntArray
    together: Together


@dataclass(frozen=True, slots=True)
class PagedGroup:
    """Chunks of like length that attend together: `query_SL` rows, their pages, who sees whom."""

    query_SL: Tensor
    real_SL: Tensor
    pages_SP: IntArray
    sight: Sight

    def holds_in_order(self, num_rows: int) -> bool:
        """Whether its rows are just the batch's rows."""
        query_T = self.query_SL.flatten()
        return len(query_T) == num_rows and bool((query_T.cpu() == torch.arange(num_rows)).all())


class PagedAttention:
    """New tokens of many sequences over their pages: prefill chunks and decode steps alike."""

    def __init__(self, cache: KVCache, slot_T: IntArray, groups: Sequence[PagedGroup]) -> None:
        """`slot_T` is each token's place in the cache, `page * page_tokens + offset`."""
        self._cache = cache
        self._slot_T = slot_T
        self._groups = groups
        self._is_whole = len(groups) == 1 and groups[0].holds_in_order(len(slot_T))
        self._rooms: dict[tuple[int, int], Tensor] = {}
        self._chosen: list[Tensor] | None = None
        """By each group's queries, `[S, L, C]`; None: all keys."""

    def attend(self, heads: Heads, q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor) -> Tensor:
        keys, values = self._cache.keys[heads.layer], self._cache.values[heads.layer]
        paged.write(k_TGD, self._slot_T, keys)
        if heads.values_within is None:
            paged.write(v_TGE, self._slot_T, values)
        if self._is_whole:  # every step that only decodes
            q_SLHD = q_THD.unflatten(0, self._groups[0].query_SL.shape)
            return self._attend_group(heads, q_SLHD, keys, values, 0).reshape(len(q_THD), -1)
        out_THE = q_THD.new_empty(*q_THD.shape[:2], v_TGE.shape[2])
        for i, group in enumerate(self._groups):
            q_SLHD = q_THD[group.query_SL]
            out_SLHE = self._attend_group(heads, q_SLHD, keys, values, i)
            out_THE[group.query_SL[group.real_SL]] = out_SLHE[group.real_SL]
        return out_THE.flatten(1)

    def choose(self, queries: IndexQueries, routes: Routes | None) -> None:
        keys = self._cache.index_keys[queries.layer]
        paged.write(queries.k_TD[:, None], self._slot_T, keys)
        longest = max(int(group.sight.at_SL.max()) for group in self._groups) + 1
        self._chosen = self._choose(queries, keys) if longest > queries.num_chosen else None
        if routes is None:
            return
        chosen_TC = None
        if self._chosen is not None:
            chosen_TC = queries.k_TD.new_full(
                (len(self._slot_T), queries.num_chosen), NONE, dtype=torch.int64
            )
            for group, chosen_SLC in zip(self._groups, self._chosen, strict=True):
                width = chosen_SLC.shape[2]
                chosen_TC[group.query_SL[group.real_SL], :width] = chosen_SLC[group.real_SL]
        routes.keys(queries.layer, chosen_TC)

    def _choose(self, queries: IndexQueries, keys: Tensor) -> list[Tensor]:
        """By each group's queries, `[S, L, C]`."""
        parts = []
        for group in self._groups:
            q_SLID, weight_SLI = (x[group.query_SL] for x in (queries.q_TID, queries.weight_TI))
            k_SKD = paged.gather(keys, group.pages_SP)[:, 0]
            at_SL = torch.from_numpy(group.sight.at_SL).to(q_SLID.device)
            parts.append(choose(q_SLID, k_SKD, weight_SLI, at_SL, queries.num_chosen))
        return parts

    def _attend_group(
        self, heads: Heads, q_SLHD: Tensor, keys: Tensor, values: Tensor, index: int
    ) -> Tensor:
        group = self._groups[index]
        if heads.is_sparse and self._chosen is not None:
            return self._attend_chosen(heads, q_SLHD, keys, group, self._chosen[index])
        k_SGKD = self._gathered(keys, group, 0)
        if heads.values_within is None:
            v_SGKE = self._gathered(values, group, 1)
        else:
            v_SGKE = k_SGKD[..., : heads.values_within]
        return attend(heads, q_SLHD, k_SGKD, v_SGKE, group.sight)

    def _attend_chosen(
        self, heads: Heads, q_SLHD: Tensor, keys: Tensor, group: PagedGroup, chosen_SLC: Tensor
    ) -> Tensor:
        """Over latents, which all heads share, from the pages."""
        size, shape = self._cache.page_tokens, q_SLHD.shape
        position_SLC = chosen_SLC.clamp(min=0)
        pages_SLP = torch.from_numpy(group.pages_SP).to(q_SLHD.device)[:, None]
        pages_SLP = pages_SLP.expand(-1, shape[1], -1)
        place_SLC = pages_SLP.gather(2, position_SLC // size) * size + position_SLC % size
        k_TCD = keys.flatten(0, 1)[place_SLC.flatten(0, 1), 0]
        v_TCE = k_TCD[..., : heads.values_within]
        none_TC = (chosen_SLC == NONE).flatten(0, 1)
        out_THE = attend_chosen(q_SLHD.flatten(0, 1), k_TCD, v_TCE, none_TC, heads.scale)
        return out_THE.view(*shape[:2], *out_THE.shape[1:])

    def _gathered(self, cached: Tensor, group: PagedGroup, which: int) -> Tensor:
        """Into one room for all layers: a fresh one each time is fresh memory each time."""
        place = (id(group), which)
        self._rooms[place] = paged.gather(cached, group.pages_SP, self._rooms.get(place))
        return self._rooms[place]
