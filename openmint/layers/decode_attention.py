"""Attention of a step in which every sequence brings its newest token alone; GPUs only, for keys
that have values beside them.

Shapes: S sequences, H query heads, G key/value heads, D head size, P pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openmint.kernels import paged_decode
from openmint.layers.attention import Heads, KVCache
from openmint.layers.routes import Routes
from openmint.layers.sparse import IndexQueries
from openmint.types import IntArray


@dataclass(frozen=True, slots=True)
class DecodeAttention:
    """Where each sequence's keys and values lie, and where its newest ones go."""

    cache: KVCache
    place_S: Tensor
    """int64 `page * page_tokens + offset` of the newest token; negative: it is padding."""
    pages_SP: Tensor
    """int32; what stands behind a sequence's last page is never read."""
    length_S: Tensor
    """int32: cached tokens, the newest among them."""

    @staticmethod
    def of(cache: KVCache, pages: Sequence[Sequence[int]], at_S: IntArray) -> DecodeAttention:
        """`at_S` is each newest token's position; `pages` hold it and all before."""
        device, size = cache.keys.device, cache.page_tokens
        num_pages = int(at_S.max()) // size + 1
        pages_SP = np.zeros((len(pages), num_pages), np.int32)
        for row_P, own in zip(pages_SP, pages, strict=True):
            used = own[:num_pages]
            row_P[: len(used)] = used
        place_S = pages_SP[np.arange(len(pages)), at_S // size].astype(np.int64) * size
        place_S += at_S % size
        place, table, length = (
            torch.from_numpy(x).to(device) for x in (place_S, pages_SP, at_S.astype(np.int32) + 1)
        )
        return DecodeAttention(cache, place, table, length)

    def choose(self, queries: IndexQueries, routes: Routes | None) -> None:
        raise AssertionError("keys are chosen among latents, and those have no values here")

    def attend(self, heads: Heads, q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> Tensor:
        keys, values = self.cache.keys[heads.layer], self.cache.values[heads.layer]
        paged_decode.write(k_SGD, v_SGD, self.place_S, keys, values)
        window = min(heads.window, 2**31 - 1)
        table, length_S = self.pages_SP, self.length_S
        return paged_decode.attend(
            q_SHD, keys, values, table, length_S, window, heads.scale, heads.sinks_H
        ).flatten(1)
