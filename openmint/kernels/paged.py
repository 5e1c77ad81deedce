"""In and out of the pages of keys and values.

S sequences, G key heads, D head size, P pages, T tokens of a page, K keys. A sequence's key k is
token `k % T` of its page `k // T`.

Attention over them then runs as in training. Where a model is sampled in tiles, keys and values lie
in blocks of their own layout (`attend.py`) and are read in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmint.kernels.jit import F32, as_array, kernel, load, rounded
from openmint.types import IntArray

LARGEST = 1e9
"""Cached values stay within it, so that no score of another sequence's page is ever infinite."""


@kernel
def _write(fresh_TGD: Any, slot_T: Any, cache_SGD: Any) -> None:
    """NaN becomes 0: pages are shared, padded and handed on, and 0 x NaN is NaN."""
    for t in range(len(slot_T)):
        for g in range(fresh_TGD.shape[1]):
            fresh_D, cached_D = fresh_TGD[t, g], cache_SGD[slot_T[t], g]
            for d in range(len(fresh_D)):
                value = load(fresh_D[d])
                value = value if value == value else F32(0.0)
                value = min(max(value, F32(-LARGEST)), F32(LARGEST))
                cached_D[d] = rounded(value, cached_D)


@kernel
def _gather(cache_PTGD: Any, pages_SP: Any, out_SGKD: Any) -> None:
    page_tokens = cache_PTGD.shape[1]
    for s in range(len(pages_SP)):
        for p in range(pages_SP.shape[1]):
            for t in range(page_tokens):
                for g in range(out_SGKD.shape[1]):
                    cached_D = cache_PTGD[pages_SP[s, p], t, g]
                    out_D = out_SGKD[s, g, p * page_tokens + t]
                    for d in range(len(out_D)):
                        out_D[d] = cached_D[d]


def write(fresh_TGD: Tensor, slot_T: IntArray, cache_PTGD: Tensor) -> None:
    """Put new keys or values into their places, `page * page_tokens + offset`, finite ones only."""
    if fresh_TGD.device.type != "cpu":
        clean_TGD = fresh_TGD.nan_to_num(0.0).clamp(-LARGEST, LARGEST)
        places = torch.from_numpy(slot_T).to(fresh_TGD.device)
        cache_PTGD.flatten(0, 1).index_copy_(0, places, clean_TGD)
        return
    _write(as_array(fresh_TGD.contiguous()), slot_T, as_array(cache_PTGD.flatten(0, 1)))


def gather(cache_PTGD: Tensor, pages_SP: IntArray, room_SGKD: Tensor | None = None) -> Tensor:
    """The keys, or values, of each sequence's pages end to end, `[S, G, K, D]`.

    On CPUs they are put into `room_SGKD`, an earlier result of the same pages, if one is given.
    """
    if cache_PTGD.device.type != "cpu":
        pages = torch.from_numpy(pages_SP).to(cache_PTGD.device)
        return cache_PTGD[pages].flatten(1, 2).transpose(1, 2)
    if room_SGKD is None:
        _, page_tokens, num_heads, width = cache_PTGD.shape
        num_seqs, num_pages = pages_SP.shape
        room_SGKD = cache_PTGD.new_empty(num_seqs, num_heads, num_pages * page_tokens, width)
    _gather(as_array(cache_PTGD), pages_SP, as_array(room_SGKD))
    return room_SGKD
