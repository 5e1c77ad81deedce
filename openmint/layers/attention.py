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

from openmint.kernels.softmax import softmax_, softmax_backward_
from openmint.types import IntArray

MAX_PADDING = 1.25
"""A bucket's padded size may exceed its tokens by this factor."""
PLAIN_TOKENS = 1024
"""Up to so many keys, CPUs attend by plain GEMMs: 6x faster than the flash kernel at 32 tokens,
even at 256, and prefill, decode and training round alike (docs/numerics.md)."""

NO_WINDOW = 1 << 40
LARGEST_KEY = 1e9
"""Cached keys stay within it, so that no score of another sequence's page is ever infinite."""


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
        starts = np.cumsum([0, *lengths])
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
        self.inverse_T = torch.from_numpy(inverse_T).to(device)

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        longest = max(bucket.index_SL.shape[1] for bucket in self.buckets)
        if is_plain(q_THD, longest):
            out: Tensor = _PlainPacked.apply(q_THD, k_TGD, v_TGD, self)
            return out
        outputs = []
        for bucket in self.buckets:
            q_SLHD, k_SLGD, v_SLGD = (x[bucket.index_SL] for x in (q_THD, k_TGD, v_TGD))
            k_SGLD, v_SGLD = k_SLGD.transpose(1, 2), v_SLGD.transpose(1, 2)
            outputs.append(attend(q_SLHD, k_SGLD, v_SGLD, bucket.sight).flatten(0, 1))
        return torch.cat(outputs)[self.inverse_T].flatten(1)


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
    """`PackedAttention` on CPUs, up to PLAIN_TOKENS; keeps the probabilities for the way back."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, packed: PackedAttention
    ) -> Tensor:
        outputs, kept = [], []
        for bucket in packed.buckets:
            q_SLHD, k_SLGD, v_SLGD = (x[bucket.index_SL] for x in (q_THD, k_TGD, v_TGD))
            k_SGLD, v_SGLD = (x.transpose(1, 2).contiguous() for x in (k_SLGD, v_SLGD))
            q_SGQD = _grouped(q_SLHD, k_SGLD.shape[1])
            out_SGQD, probs_SGQK = _plain(q_SGQD, k_SGLD, v_SGLD, bucket.sight)
            outputs.append(_ungrouped(out_SGQD, q_SLHD.shape).flatten(0, 1))
            kept += [q_SGQD, k_SGLD, v_SGLD, probs_SGQK]
        ctx.save_for_backward(*kept)
        ctx.packed, ctx.heads_shape = packed, q_THD.shape
        return torch.cat(outputs)[packed.inverse_T].flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        packed: PackedAttention = ctx.packed
        grad_THD = grads[0].view(ctx.heads_shape)
        parts = []
        for i, bucket in enumerate(packed.buckets):
            q_SGQD, k_SGLD, v_SGLD, probs_SGQK = ctx.saved_tensors[4 * i : 4 * i + 4]
            grad_SLHD = grad_THD[bucket.index_SL]
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
        q_THD, k_TGD, v_TGD = (
            torch.cat(list(grad))[packed.inverse_T] for grad in zip(*parts, strict=True)
        )
        return q_THD, k_TGD, v_TGD, None


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


@dataclass(frozen=True, slots=True)
class PagedGroup:
    """Sequences of one batch that attend together: `query_SL` rows, their pages, who sees whom."""

    query_SL: Tensor
    real_SL: Tensor
    pages_SP: Tensor
    sight: Sight


class PagedAttention:
    """New tokens of many sequences over their pages: prefill chunks and decode steps alike."""

    def __init__(self, cache: KVCache, slot_T: Tensor, groups: Sequence[PagedGroup]) -> None:
        """`slot_T` is each token's place in the cache, `page * page_tokens + offset`."""
        self._cache = cache
        self._slot_T = slot_T
        self._groups = groups

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        # Pages are shared, padded and handed on, and a masked NaN is still a NaN (0 x NaN): what an
        # adapter that overflows leaves there must not reach its neighbours.
        k_TGD = k_TGD.nan_to_num(0.0).clamp(-LARGEST_KEY, LARGEST_KEY)
        keys.flatten(0, 1).index_copy_(0, self._slot_T, k_TGD)
        values.flatten(0, 1).index_copy_(0, self._slot_T, v_TGD.nan_to_num(0.0))
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        for group in self._groups:
            k_SGKD, v_SGKD = (
                cached[group.pages_SP].flatten(1, 2).transpose(1, 2) for cached in (keys, values)
            )
            out_SLHD = attend(q_THD[group.query_SL], k_SGKD, v_SGKD, group.sight)
            out_THD[group.query_SL[group.real_SL]] = out_SLHD[group.real_SL]
        return out_THD.flatten(1)
