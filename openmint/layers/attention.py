"""Causal attention over packed tokens: without a cache for training, over pages for sampling.

Shapes: T packed tokens, S sequences, L padded length, H query heads, G key/value heads,
D head size, P pages of a sequence. Models only see `attend`; an MLA or DSA family brings its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openmint.kernels import paged
from openmint.kernels.attend import BLOCK, block_shapes
from openmint.kernels.softmax import softmax_, softmax_backward_
from openmint.kernels.team import Together
from openmint.types import IntArray

MAX_PADDING = 1.25
"""A bucket's padded size may exceed its tokens by this factor."""
PLAIN_TOKENS = 1024
"""Up to so many keys, CPUs attend by plain GEMMs: 6x faster than the flash kernel at 32 tokens,
even at 256."""

NO_WINDOW = 1 << 40


class Attention(Protocol):
    """How the tokens of one batch see each other and the cache."""

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """Attention output `[T, H * D]` of one layer; may write k and v to a cache."""
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

    def __init__(self, at_SL: IntArray, window: int | None, device: torch.device) -> None:
        """`at_SL` is each query's position among its sequence's keys."""
        self.at_SL = np.ascontiguousarray(at_SL)
        self.window = NO_WINDOW if window is None else window
        self._device = device
        self._mask_S1QK: Tensor | None = None

    def mask(self, num_keys: int, shared: int, dtype: torch.dtype) -> Tensor:
        """What is added to scores, 0 or -inf, `[S, 1, shared * L, K]`; made once for all layers."""
        if self._mask_S1QK is None:
            distance_SLK = self.at_SL[:, :, None] - np.arange(num_keys)
            sees_SLK = torch.from_numpy((distance_SLK >= 0) & (distance_SLK < self.window))
            mask_SLK = torch.zeros(sees_SLK.shape, dtype=dtype).masked_fill_(~sees_SLK, -torch.inf)
            self._mask_S1QK = mask_SLK[:, None].repeat(1, 1, shared, 1).to(self._device)
        return self._mask_S1QK


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

    def __init__(self, lengths: Sequence[int], device: torch.device, window: int | None) -> None:
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
            sight = Sight(at_SL, window, device)
            self.buckets.append(Bucket(torch.from_numpy(index_SL).to(device), padding, sight))
            offset += index_SL.size
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

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        longest = max(bucket.index_SL.shape[1] for bucket in self.buckets)
        if is_plain(q_THD, longest):
            out: Tensor = _PlainPacked.apply(q_THD, k_TGD, v_TGD, self)
            return out
        outputs = []
        for bucket in self.buckets:
            q_SLHD, k_SLGD, v_SLGD = (self.take(x, bucket) for x in (q_THD, k_TGD, v_TGD))
            k_SGLD, v_SGLD = k_SLGD.transpose(1, 2), v_SLGD.transpose(1, 2)
            if q_THD.device.type == "cuda" and bucket.sight.window == NO_WINDOW:
                outputs.append(causal(q_SLHD, k_SGLD, v_SGLD).flatten(0, 1))
                continue
            outputs.append(attend(q_SLHD, k_SGLD, v_SGLD, bucket.sight).flatten(0, 1))
        return self.join(outputs).flatten(1)


def causal(q_SLHD: Tensor, k_SGLD: Tensor, v_SGLD: Tensor) -> Tensor:
    """`attend` of whole sequences without a window: no mask is read, and half of it is skipped.

    Rows of padding stand at the end and are cut off, so what they see doesn't matter."""
    q_SHLD = q_SLHD.transpose(1, 2)
    out_SHLD = F.scaled_dot_product_attention(
        q_SHLD, k_SGLD, v_SGLD, is_causal=True, enable_gqa=q_SHLD.shape[1] != k_SGLD.shape[1]
    )
    return out_SHLD.transpose(1, 2)


def is_plain(q: Tensor, num_keys: int) -> bool:
    """Whether attention runs as GEMMs around the softmax kernel."""
    return q.device.type == "cpu" and num_keys <= PLAIN_TOKENS


def attend(q_SLHD: Tensor, k_SGKD: Tensor, v_SGKD: Tensor, sight: Sight) -> Tensor:
    """Attention output `[S, L, H, D]`. Training and sampling share `_plain`, so they agree."""
    q_SGQD = _grouped(q_SLHD, k_SGKD.shape[1])
    if is_plain(q_SLHD, k_SGKD.shape[2]):
        out_SGQD, _ = _plain(q_SGQD, k_SGKD, v_SGKD, sight)
    else:
        shared = q_SGQD.shape[2] // q_SLHD.shape[1]
        mask_S1QK = sight.mask(k_SGKD.shape[2], shared, q_SLHD.dtype)
        out_SGQD = F.scaled_dot_product_attention(q_SGQD, k_SGKD, v_SGKD, mask_S1QK)
    return _ungrouped(out_SGQD, q_SLHD.shape)


def _plain(q_SGQD: Tensor, k_SGKD: Tensor, v_SGKD: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    """The output and the probabilities."""
    scores_SGQK = q_SGQD @ k_SGKD.transpose(2, 3)
    scale = q_SGQD.shape[3] ** -0.5
    probs_SGQK = softmax_(scores_SGQK, sight.at_SL, sight.window, scale)
    return probs_SGQK @ v_SGKD, probs_SGQK


def _grouped(x_SLHD: Tensor, num_groups: int) -> Tensor:
    """Query heads that share a key head become extra queries, head-major: keys aren't repeated."""
    num_seqs, length, num_heads, width = x_SLHD.shape
    split = x_SLHD.reshape(num_seqs, length, num_groups, num_heads // num_groups, width)
    return split.permute(0, 2, 3, 1, 4).flatten(2, 3)


def _ungrouped(x_SGQD: Tensor, shape: torch.Size) -> Tensor:
    num_seqs, length, num_heads, width = shape
    num_groups = x_SGQD.shape[1]
    split = x_SGQD.reshape(num_seqs, num_groups, num_heads // num_groups, length, width)
    return split.permute(0, 3, 1, 2, 4).reshape(shape)


class _PlainPacked(torch.autograd.Function):
    """`PackedAttention` on CPUs; keeps the probabilities for the way back."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, packed: PackedAttention
    ) -> Tensor:
        outputs, kept = [], []
        for bucket in packed.buckets:
            q_SLHD, k_SLGD, v_SLGD = (packed.take(x, bucket) for x in (q_THD, k_TGD, v_TGD))
            k_SGLD, v_SGLD = (x.transpose(1, 2).contiguous() for x in (k_SLGD, v_SLGD))
            q_SGQD = _grouped(q_SLHD, k_SGLD.shape[1])
            out_SGQD, probs_SGQK = _plain(q_SGQD, k_SGLD, v_SGLD, bucket.sight)
            outputs.append(_ungrouped(out_SGQD, q_SLHD.shape).flatten(0, 1))
            kept += [q_SGQD, k_SGLD, v_SGLD, probs_SGQK]
        ctx.save_for_backward(*kept)
        ctx.packed, ctx.heads_shape = packed, q_THD.shape
        return packed.join(outputs).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        packed: PackedAttention = ctx.packed
        grad_THD = grads[0].view(ctx.heads_shape)
        parts = []
        for i, bucket in enumerate(packed.buckets):
            q_SGQD, k_SGLD, v_SGLD, probs_SGQK = ctx.saved_tensors[4 * i : 4 * i + 4]
            grad_SLHD = packed.take(grad_THD, bucket)
            if bucket.is_padding_SL is not None:
                grad_SLHD[bucket.is_padding_SL] = 0.0
            grad_SGQD = _grouped(grad_SLHD, k_SGLD.shape[1])
            grad_v_SGLD = probs_SGQK.transpose(2, 3) @ grad_SGQD
            grad_SGQK = grad_SGQD @ v_SGLD.transpose(2, 3)
            sight, scale = bucket.sight, q_SGQD.shape[3] ** -0.5
            softmax_backward_(grad_SGQK, probs_SGQK, sight.at_SL, sight.window, scale)
            grad_q = _ungrouped(grad_SGQK @ k_SGLD, grad_SLHD.shape)
            grad_k_SGLD = grad_SGQK.transpose(2, 3) @ q_SGQD
            grad_k, grad_v = grad_k_SGLD.transpose(1, 2), grad_v_SGLD.transpose(1, 2)
            parts.append([grad.flatten(0, 1) for grad in (grad_q, grad_k, grad_v)])
        grad_q, grad_k, grad_v = (packed.join(grads) for grads in zip(*parts, strict=True))
        return grad_q, grad_k, grad_v, None


class KVCache:
    """Paged keys and values of every layer. Which page belongs to whom is the scheduler's book."""

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_pages, page_tokens, num_kv_heads, head_dim)
        self.page_tokens = page_tokens
        self.keys = _zeros(shape, dtype, device)
        self.values = _zeros(shape, dtype, device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on CPUs pages of memory that are taken only when first written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype)


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

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        paged.write(k_TGD, self._slot_T, keys)
        paged.write(v_TGD, self._slot_T, values)
        if self._is_whole:  # every step that only decodes
            (group,) = self._groups
            q_SLHD = q_THD.unflatten(0, group.query_SL.shape)
            return self._attend_group(q_SLHD, keys, values, group).reshape(len(q_THD), -1)
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        for group in self._groups:
            out_SLHD = self._attend_group(q_THD[group.query_SL], keys, values, group)
            out_THD[group.query_SL[group.real_SL]] = out_SLHD[group.real_SL]
        return out_THD.flatten(1)

    def _attend_group(
        self, q_SLHD: Tensor, keys: Tensor, values: Tensor, group: PagedGroup
    ) -> Tensor:
        gathered = []
        for which, cached in enumerate((keys, values)):
            # One room for all layers: a fresh one each time is fresh memory each time.
            place = (id(group), which)
            room_SGKD = paged.gather(cached, group.pages_SP, self._rooms.get(place))
            self._rooms[place] = room_SGKD
            gathered.append(room_SGKD)
        return attend(q_SLHD, gathered[0], gathered[1], group.sight)
