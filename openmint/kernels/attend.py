"""Causal attention of single queries over blocks of keys and values, on AVX512-BF16.

G key heads, I query heads of one key head, D head size, B blocks, N keys. A block holds 16 tokens,
laid out for tiles: keys `[D / 2, 16, 2]`, values `[8, D, 2]`. `causal.py` gives whole sequences the
same sums, to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from openmint.kernels.jit import F32, address, exp, largest, load, piece, rounded
from openmint.kernels.paged import LARGEST
from openmint.kernels.tile import PANEL, add_slim_tile, add_tile, quad, slim_tile

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
def soften(scores_N: Any, probs_N: Any, scale: Any) -> Any:
    """Probabilities of scores, which it uses up; the largest score, and what the powers were
    multiplied with."""
    top, total = largest(scores_N), F32(0.0)
    for n in range(len(scores_N)):
        scores_N[n] = exp((scores_N[n] - top) * scale)
    for n in range(len(scores_N)):
        total += scores_N[n]
    share = F32(1.0) / total
    for n in range(len(scores_N)):
        probs_N[n] = rounded(scores_N[n] * share, probs_N)
    return top, share


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
                slim_tile(rows, q, 2 * width, here, 4 * BLOCK, width // 2, out, row)
                b += 1
    for i in range(len(q_ID)):
        probs_N = probs_IN[i]
        for n in range(first_block * BLOCK, first):
            probs_N[n] = 0
        for n in range(stop, stop_block * BLOCK):
            probs_N[n] = 0
        soften(scores_IN[i, first:stop], probs_N[first:stop], scale)
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
            add_values(rows, probs + i * row + 2 * BLOCK * b, row, here, depth, width, out)
            b = end


@piece
def add_values(
    rows: Any, probs: Any, stride: Any, values: Any, depth: Any, width: Any, out: Any
) -> None:
    """`out += probs @ values` of `depth` pairs of keys."""
    column = 0
    while column < width:
        here, there = values + 4 * column, out + 4 * column
        if width - column >= PANEL:
            add_tile(rows, probs, stride, here, 4 * width, depth, there, 4 * width)
            column += PANEL
        else:
            add_slim_tile(rows, probs, stride, here, 4 * width, depth, there, 4 * width)
            column += BLOCK
