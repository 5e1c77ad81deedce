"""Causal attention of single queries over blocks of keys and values, on AVX512-BF16.

S sequences, L padded length, T tokens, H query heads, G key heads, I query heads of one key head, D
head size, B blocks, N keys. A block holds 16 tokens, laid out for tiles: keys `[D / 2, 16, 2]`,
values `[8, D, 2]`. Trainer and sampler call the same function row by row: they agree to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmint.kernels.jit import F32, address, as_array, exp, kernel, largest, load, piece, rounded
from openmint.kernels.paged import LARGEST
from openmint.kernels.tile import PANEL, add_slim_tile, add_tile, quad, slim_tile
from openmint.types import IntArray

BLOCK = 16
"""Tokens of a block."""
MOST_QUERIES = 4
"""Query heads that go through the tiles together."""


def block_shapes(num_heads: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a block's keys and of its values."""
    return (num_heads, width // 2, BLOCK, 2), (num_heads, BLOCK // 2, width, 2)


@piece
def place(keys_GD: Any, values_GD: Any, index: Any, keys_B: Any, values_B: Any) -> None:
    """Put one token into the blocks of one layer, at `index` in `block * 16 + offset`."""
    block, token = index // BLOCK, index % BLOCK
    clean_D = np.empty(keys_GD.shape[1], np.uint16)
    for g in range(keys_GD.shape[0]):
        _finite(keys_GD[g], clean_D)
        to_P = keys_B[block, g]
        for p in range(len(to_P)):
            to_P[p, token, 0] = clean_D[2 * p]
            to_P[p, token, 1] = clean_D[2 * p + 1]
        _finite(values_GD[g], clean_D)
        to_D = values_B[block, g, token // 2]
        for d in range(len(to_D)):
            to_D[d, token % 2] = clean_D[d]


@piece
def _finite(from_D: Any, to_D: Any) -> None:
    """Blocks are handed on, and zero times NaN is NaN."""
    for d in range(len(from_D)):
        value = load(from_D[d])
        value = value if value == value else F32(0.0)
        to_D[d] = rounded(min(max(value, F32(-LARGEST)), F32(LARGEST)), to_D)


@piece
def _soften(scores_N: Any, probs_N: Any, scale: Any) -> None:
    top, total = largest(scores_N), F32(0.0)
    for n in range(len(scores_N)):
        scores_N[n] = exp((scores_N[n] - top) * scale)
    for n in range(len(scores_N)):
        total += scores_N[n]
    share = F32(1.0) / total
    for n in range(len(scores_N)):
        probs_N[n] = rounded(scores_N[n] * share, probs_N)


@piece
def attend(
    q_ID: Any,
    at: Any,
    window: Any,
    keys_B: Any,
    values_B: Any,
    blocks_B: Any,
    g: Any,
    scores_IN: Any,
    probs_IN: Any,
    out_ID: Any,
) -> None:
    """Attention of the query heads of key head `g` at position `at`, in float32; the probabilities
    of the keys in the blocks that it sees, zero where it doesn't see one of them."""
    width = q_ID.shape[1]
    scale = F32(1.0) / np.sqrt(F32(width))
    first, stop = max(0, at - window + 1), at + 1
    first_block, stop_block = first // BLOCK, (stop + BLOCK - 1) // BLOCK
    keys, values = address(keys_B), address(values_B)
    head, block = 2 * BLOCK * width, 2 * BLOCK * width * keys_B.shape[1]
    scores, row = address(scores_IN), 4 * scores_IN.shape[1]
    for i in range(0, len(q_ID), MOST_QUERIES):
        rows, q = min(MOST_QUERIES, len(q_ID) - i), address(q_ID) + 2 * width * i
        b, keys_g = first_block, keys + g * head
        while b < stop_block:
            here, out = keys_g + blocks_B[b] * block, scores + i * row + 4 * BLOCK * b
            if b + 4 <= stop_block:
                second, third = keys_g + blocks_B[b + 1] * block, keys_g + blocks_B[b + 2] * block
                last = keys_g + blocks_B[b + 3] * block
                stride, depth = 4 * BLOCK, width // 2
                quad(rows, q, 2 * width, here, second, third, last, stride, depth, out, row)
                b += 4
            else:
                slim_tile(rows, q, 2 * width, here, 4 * BLOCK, width // 2, out, row, here)
                b += 1
    for i in range(len(q_ID)):
        probs_N = probs_IN[i]
        for n in range(first_block * BLOCK, first):
            probs_N[n] = 0
        for n in range(stop, stop_block * BLOCK):
            probs_N[n] = 0
        _soften(scores_IN[i, first:stop], probs_N[first:stop], scale)
    out_ID[:] = F32(0.0)
    probs, row = address(probs_IN), 2 * probs_IN.shape[1]
    for i in range(0, len(q_ID), MOST_QUERIES):
        rows, out = min(MOST_QUERIES, len(q_ID) - i), address(out_ID) + 4 * width * i
        b = first_block
        while b < stop_block:  # blocks that stand end to end are one product
            end = b + 1
            while end < stop_block and blocks_B[end] == blocks_B[end - 1] + 1 and block == head:
                end += 1
            here = values + blocks_B[b] * block + g * head
            depth = (end - b) * BLOCK // 2
            _add_values(rows, probs + i * row + 2 * BLOCK * b, row, here, depth, width, out)
            b = end


@piece
def _add_values(
    rows: Any, probs: Any, stride: Any, values: Any, depth: Any, width: Any, out: Any
) -> None:
    """`out += probs @ values` of `depth` pairs of keys."""
    column = 0
    while column < width:
        here, there = values + 4 * column, out + 4 * column
        if width - column >= PANEL:
            add_tile(rows, probs, stride, here, 4 * width, depth, there, 4 * width, here)
            column += PANEL
        else:
            add_slim_tile(rows, probs, stride, here, 4 * width, depth, there, 4 * width, here)
            column += BLOCK


@kernel
def _forward(
    q_SLHD: Any,
    k_SLGD: Any,
    v_SLGD: Any,
    at_SL: Any,
    window: Any,
    keys_B: Any,
    values_B: Any,
    out_SLHD: Any,
    probs_SGQN: Any,
) -> None:
    """Head by head of each sequence, in room for one, where its blocks stand end to end."""
    num_seqs, length, num_groups, width = k_SLGD.shape
    shared, num_keys = q_SLHD.shape[2] // num_groups, len(keys_B) * BLOCK
    scores_IN = np.empty((shared, num_keys), np.float32)
    probs_IN = np.empty((shared, num_keys), np.uint16)
    out_ID, blocks_B = np.empty((shared, width), np.float32), np.arange(len(keys_B))
    for s in range(num_seqs):
        for g in range(num_groups):
            for t in range(length):
                place(k_SLGD[s, t, g : g + 1], v_SLGD[s, t, g : g + 1], t, keys_B, values_B)
            for t in range(length):
                at, q_ID = at_SL[s, t], q_SLHD[s, t, g * shared : (g + 1) * shared]
                attend(q_ID, at, window, keys_B, values_B, blocks_B, 0, scores_IN, probs_IN, out_ID)
                first = max(0, at - window + 1)
                for i in range(shared):
                    out_D, sums_D = out_SLHD[s, t, g * shared + i], out_ID[i]
                    for d in range(width):
                        out_D[d] = rounded(sums_D[d], out_D)
                    kept_N, probs_N = probs_SGQN[s, g, i * length + t], probs_IN[i]
                    kept_N[:first] = 0
                    for n in range(first, at + 1):
                        kept_N[n] = probs_N[n]
                    kept_N[at + 1 :] = 0


def forward(
    q_SLHD: Tensor, k_SLGD: Tensor, v_SLGD: Tensor, at_SL: IntArray, window: int
) -> tuple[Tensor, Tensor]:
    """Attention output `[S, L, H, D]` and the probabilities `[S, G, I * L, L]`."""
    num_seqs, length, num_heads, width = q_SLHD.shape
    num_groups = k_SLGD.shape[2]
    out_SLHD = torch.empty_like(q_SLHD, memory_format=torch.contiguous_format)
    num_queries = num_heads // num_groups * length
    probs_SGQN = q_SLHD.new_empty(num_seqs, num_groups, num_queries, length)
    shapes = block_shapes(1, width)
    room = [np.zeros((-(-length // BLOCK), *shape), np.uint16) for shape in shapes]
    inputs = [as_array(x.contiguous()) for x in (q_SLHD, k_SLGD, v_SLGD)]
    _forward(*inputs, at_SL, window, *room, as_array(out_SLHD), as_array(probs_SGQN))
    return out_SLHD, probs_SGQN
