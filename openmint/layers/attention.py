"""Causal attention over packed tokens: without a cache for training, over pages for sampling.

Shapes: T packed tokens, S sequences, L padded length, H query heads, G key/value heads,
D head size, P pages of a sequence. Models only see `attend`; an MLA or DSA family brings its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PADDING = 1.25
"""A bucket's padded size may exceed its tokens by this factor."""
PLAIN_TOKENS = 1024
"""Up to so many keys, CPUs attend by plain GEMMs: 6x faster than the flash kernel at 32 tokens,
even at 256, and prefill, decode and training round alike (docs/numerics.md)."""

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


class PackedAttention:
    """Whole sequences, each causal within itself; differentiable.

    Sequences of like length are padded into one rectangle. Padding stands at the right, so a causal
    mask alone keeps real queries from padded keys.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, window: int | None) -> None:
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        self._window = window
        self._index_SL: list[Tensor] = []
        inverse_T = torch.empty(starts[-1], dtype=torch.int64)
        offset = 0
        for bucket in length_buckets(lengths):
            width = lengths[bucket[0]]
            steps_L = torch.arange(width)
            lengths_S = torch.tensor([lengths[i] for i in bucket])
            starts_S = torch.tensor([starts[i] for i in bucket])
            index_SL = starts_S[:, None] + torch.minimum(steps_L, lengths_S[:, None] - 1)
            real_SL = steps_L < lengths_S[:, None]
            flat_SL = offset + torch.arange(index_SL.numel()).view_as(index_SL)
            inverse_T[index_SL[real_SL]] = flat_SL[real_SL]
            self._index_SL.append(index_SL.to(device))
            offset += index_SL.numel()
        self._inverse_T = inverse_T.to(device)

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        outputs = [self._attend_bucket(index, q_THD, k_TGD, v_TGD) for index in self._index_SL]
        out_THD = torch.cat(outputs)[self._inverse_T]
        return out_THD.flatten(1)

    def _attend_bucket(self, index_SL: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_SLHD, k_SGLD, v_SGLD = (
            q[index_SL],
            k[index_SL].transpose(1, 2),
            v[index_SL].transpose(1, 2),
        )
        width = index_SL.shape[1]
        steps_L = torch.arange(width, device=q.device)
        distance_LL = steps_L[:, None] - steps_L[None, :]
        sees_LL = distance_LL >= 0
        if self._window is not None:
            sees_LL &= distance_LL < self._window
        mask_S1QK = score_mask(sees_LL[None], q.shape[1] // k.shape[1], q.dtype)
        return _attend(q_SLHD, k_SGLD, v_SGLD, mask_S1QK).flatten(0, 1)


def score_mask(sees_SLK: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores, 0 or -inf, `[S, 1, shared * L, K]`: see `_attend` for the rows."""
    mask_SLK = torch.zeros(sees_SLK.shape, dtype=dtype, device=sees_SLK.device)
    mask_SLK.masked_fill_(~sees_SLK, float("-inf"))
    return mask_SLK[:, None].repeat(1, 1, shared, 1)


def _attend(q_SLHD: Tensor, k_SGKD: Tensor, v_SGKD: Tensor, mask_S1QK: Tensor) -> Tensor:
    """Attention output `[S, L, H, D]`. Training and sampling share every line of it.

    Query heads that share a key head become extra queries (head-major), so keys are never repeated.
    """
    num_seqs, width, num_heads, head_dim = q_SLHD.shape
    num_kv_heads = k_SGKD.shape[1]
    split = (num_seqs, width, num_kv_heads, num_heads // num_kv_heads, head_dim)
    q_SGQD = q_SLHD.view(split).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if q_SLHD.device.type == "cpu" and k_SGKD.shape[2] <= PLAIN_TOKENS:
        scores: Tensor = (q_SGQD @ k_SGKD.transpose(2, 3)) * head_dim**-0.5 + mask_S1QK
        out = scores.softmax(-1, dtype=torch.float32).to(v_SGKD.dtype) @ v_SGKD
    else:
        out = F.scaled_dot_product_attention(q_SGQD, k_SGKD, v_SGKD, mask_S1QK)
    out = out.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, width, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(num_seqs, width, num_heads, head_dim)


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
    mask_S1QK: Tensor
    """As `score_mask` makes it."""


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
        keys.flatten(0, 1)[self._slot_T] = k_TGD
        values.flatten(0, 1)[self._slot_T] = v_TGD.nan_to_num(0.0)
        out_THD = torch.empty_like(q_THD)
        for group in self._groups:
            k_SGKD, v_SGKD = (
                cached[group.pages_SP].flatten(1, 2).transpose(1, 2) for cached in (keys, values)
            )
            out_SLHD = _attend(q_THD[group.query_SL], k_SGKD, v_SGKD, group.mask_S1QK)
            out_THD[group.query_SL[group.real_SL]] = out_SLHD[group.real_SL]
        return out_THD.flatten(1)
