"""Causal attention of whole sequences, forth and back, in tiles on AVX512-BF16.

T tokens, W values of all heads (queries, keys, values), H query heads, N tokens of one sequence, D
head size, M queries of a block. A query's sums run over its keys in order, as in `attend.py`: they
agree to the bit. The way back computes probabilities again from each query's largest score, block
by block with keys as rows (FlashAttention-2, arXiv:2307.08691): nothing of size N x N is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from openmint.kernels.attend import add_values, soften
from openmint.kernels.jit import (
    F32,
    address,
    exp,
    floats,
    halves,
    inlined,
    load,
    piece,
    rounded,
    words,
)
from openmint.kernels.tile import MOST_ROWS, PANEL, tile


class Heads(NamedTuple):
    """How the values of a row are divided, and how far back a query sees."""

    num_q: int
    num_kv: int
    width: int
    window: int


class Softened(NamedTuple):
    """What the way back needs to compute a query's probabilities again."""

    top_HT: Any
    share_HT: Any


@piece
def _panels(x_NW: Any, column: Any, width: Any, panels_B: Any) -> None:
    """Rows as columns of panels, `[N / 64, D / 2, 64]` pairs; missing rows are zero."""
    x, stride, pairs = address(x_NW) + 2 * column, 2 * x_NW.shape[1], width // 2
    for b in range(len(panels_B)):
        panel, rows = address(panels_B[b]), min(PANEL, len(x_NW) - b * PANEL)
        for n in range(rows):
            from_P, to = words(x + (b * PANEL + n) * stride, pairs), words(panel, pairs * PANEL)
            for p in range(pairs):
                to[p * PANEL + n] = from_P[p]
        for p in range(pairs):
            words(panel + 4 * PANEL * p, PANEL)[rows:] = 0


@piece
def _pairs(x_NW: Any, column: Any, width: Any, pairs_PD: Any) -> None:
    """Rows in pairs, `[N / 2, D]`; missing rows are zero."""
    x, stride, num_rows = address(x_NW) + 2 * column, 2 * x_NW.shape[1], len(x_NW)
    for p in range(len(pairs_PD)):
        to_D, first = pairs_PD[p], x + 2 * p * stride
        if 2 * p + 1 < num_rows:
            first_D, second_D = halves(first, width), halves(first + stride, width)
            for d in range(width):
                to_D[d] = _together(first_D[d], second_D[d])
        elif 2 * p < num_rows:
            for d in range(width):
                to_D[d] = np.uint32(halves(first, width)[d])
        else:
            to_D[:] = 0


@inlined
def _together(first: Any, second: Any) -> Any:
    return np.uint32(first) | (np.uint32(second) << np.uint32(16))


@piece
def forward(heads_TW: Any, first: Any, stop: Any, heads: Any, kept: Any, out_TW: Any) -> None:
    """The sequence `first..stop`, `out_TW` being `[T, H * D]`."""
    num_tokens, width, shared = stop - first, heads.width, heads.num_q // heads.num_kv
    num_blocks, scale = (num_tokens + PANEL - 1) // PANEL, F32(1.0) / np.sqrt(F32(width))
    keys_B = np.empty((num_blocks, width // 2, PANEL), np.uint32)
    values_PD = np.empty((num_blocks * PANEL // 2, width), np.uint32)
    scores_RN = np.empty((MOST_ROWS, num_blocks * PANEL), np.float32)
    probs_RN = np.empty((MOST_ROWS, num_blocks * PANEL), np.uint16)
    x_NW, stride, row_bytes = heads_TW[first:stop], 2 * heads_TW.shape[1], 4 * num_blocks * PANEL
    sums_RD = np.empty((MOST_ROWS, width), np.float32)
    scores, probs, sums = address(scores_RN), address(probs_RN), address(sums_RD)
    for g in range(heads.num_kv):
        _panels(x_NW, (heads.num_q + g) * width, width, keys_B)
        _pairs(x_NW, (heads.num_q + heads.num_kv + g) * width, width, values_PD)
        for head in range(g * shared, (g + 1) * shared):
            for row in range(0, num_tokens, MOST_ROWS):
                rows = min(MOST_ROWS, num_tokens - row)
                q = address(x_NW) + row * stride + 2 * head * width
                low = max(0, row - heads.window + 1)
                for b in range(low // PANEL, (row + rows + PANEL - 1) // PANEL):
                    keys, to = address(keys_B[b]), scores + 4 * PANEL * b
                    tile(rows, q, stride, keys, 4 * PANEL, width // 2, to, row_bytes)
                low, high = low // 2 * 2, (row + rows + 1) // 2 * 2
                for r in range(rows):
                    at, probs_N = row + r, probs_RN[r]
                    seen = max(0, at - heads.window + 1)
                    probs_N[low:seen] = 0
                    probs_N[at + 1 : high] = 0
                    top, share = soften(scores_RN[r, seen : at + 1], probs_N[seen : at + 1], scale)
                    kept.top_HT[head, first + at] = top
                    kept.share_HT[head, first + at] = share
                sums_RD[:] = F32(0.0)
                values, depth = address(values_PD[low // 2]), (high - low) // 2
                add_values(rows, probs + 2 * low, row_bytes // 2, values, depth, width, sums)
                for r in range(rows):
                    out_D = out_TW[first + row + r, head * width : (head + 1) * width]
                    sums_D = sums_RD[r]
                    for d in range(width):
                        out_D[d] = rounded(sums_D[d], out_D)


class Block(NamedTuple):
    """A block of one head's queries and of the gradient of what they gave, laid out for tiles."""

    q_PM: Any
    q_PD: Any
    grad_PM: Any
    grad_PD: Any
    softened_3M: Any
    """Of each query: largest score, share, and the sum of its output times that one's gradient."""


@piece
def backward(
    heads_TW: Any,
    out_TW: Any,
    grad_TW: Any,
    first: Any,
    stop: Any,
    heads: Any,
    kept: Any,
    to_TW: Any,
) -> None:
    """dL/dheads of the sequence, in `to_TW`; `grad_TW` is that of `out_TW`."""
    num_tokens, width, shared = stop - first, heads.width, heads.num_q // heads.num_kv
    num_blocks = (num_tokens + PANEL - 1) // PANEL
    keys_DN = np.empty((width, num_blocks * PANEL), np.uint16)
    slopes_PM = np.empty((num_blocks * PANEL // 2, PANEL), np.uint32)
    grad_keys_ND = np.empty((num_tokens, width), np.float32)
    grad_values_ND = np.empty((num_tokens, width), np.float32)
    grad_q_DM = np.empty((width, PANEL), np.float32)
    pairs_PM = np.empty((width // 2, PANEL), np.uint32)
    block, scratch_B = _block(width), np.empty(12 * MOST_ROWS * PANEL, np.uint8)
    x_NW, y_NW, grad_NW = heads_TW[first:stop], out_TW[first:stop], grad_TW[first:stop]
    for g in range(heads.num_kv):
        k_column, v_column = (heads.num_q + g) * width, (heads.num_q + heads.num_kv + g) * width
        _turned(x_NW[:, k_column : k_column + width], keys_DN)
        grad_keys_ND[:] = F32(0.0)
        grad_values_ND[:] = F32(0.0)
        for head in range(g * shared, (g + 1) * shared):
            column = head * width
            for start in range(0, num_tokens, PANEL):
                end = min(start + PANEL, num_tokens)
                _take(x_NW, y_NW, grad_NW, start, end, column, width, block)
                span = slice(first + start, first + end)
                _copy(kept.top_HT[head, span], block.softened_3M[0])
                _copy(kept.share_HT[head, span], block.softened_3M[1])
                span = (start, end, heads.window)
                sums = (grad_keys_ND, grad_values_ND, slopes_PM)
                low = _keys(x_NW, k_column, v_column, width, span, block, scratch_B, sums)
                depth = (end + 1) // 2 - low // 2
                _add_queries(keys_DN, low, slopes_PM, depth, grad_q_DM)
                _give_queries(grad_q_DM, pairs_PM, to_TW[first + start : first + end], column)
        for n in range(num_tokens):
            to_W = to_TW[first + n]
            for d in range(width):
                to_W[k_column + d] = rounded(grad_keys_ND[n, d], to_W)
            for d in range(width):
                to_W[v_column + d] = rounded(grad_values_ND[n, d], to_W)


@piece
def _block(width: Any) -> Any:
    return Block(
        np.empty((1, width // 2, PANEL), np.uint32),
        np.empty((PANEL // 2, width), np.uint32),
        np.empty((1, width // 2, PANEL), np.uint32),
        np.empty((PANEL // 2, width), np.uint32),
        np.zeros((3, PANEL), np.float32),
    )


@piece
def _turned(x_ND: Any, to_DN: Any) -> None:
    """Rows as columns; missing ones are zero."""
    for d in range(len(to_DN)):
        to_N = to_DN[d]
        for n in range(len(x_ND)):
            to_N[n] = x_ND[n, d]
        to_N[len(x_ND) :] = 0


@piece
def _take(
    x_NW: Any, y_NW: Any, grad_NW: Any, start: Any, end: Any, column: Any, width: Any, block: Any
) -> None:
    """Lay out the queries `start..end`."""
    _panels(x_NW[start:end], column, width, block.q_PM)
    _pairs(x_NW[start:end], column, width, block.q_PD)
    _panels(grad_NW[start:end], column, width, block.grad_PM)
    _pairs(grad_NW[start:end], column, width, block.grad_PD)
    for m in range(end - start):
        y_D, grad_D = (
            y_NW[start + m, column : column + width],
            grad_NW[start + m, column : column + width],
        )
        along = F32(0.0)
        for d in range(width):
            along += load(y_D[d]) * load(grad_D[d])
        block.softened_3M[2, m] = along


@piece
def _copy(from_M: Any, to_M: Any) -> None:
    for m in range(len(from_M)):
        to_M[m] = from_M[m]


@piece
def _keys(
    x_NW: Any,
    k_column: Any,
    v_column: Any,
    width: Any,
    span: Any,
    block: Any,
    scratch_B: Any,
    sums: Any,
) -> Any:
    """Add a block of queries' share to the gradients of the keys and values that it sees, and lay
    out the slopes of its scores in pairs of keys; the first key."""
    start, end, window = span
    softened, scale = address(block.softened_3M), F32(1.0) / np.sqrt(F32(width))
    x, stride, depth = address(x_NW), 2 * x_NW.shape[1], width // 2
    to_keys, to_values, to_slopes = address(sums[0]), address(sums[1]), address(sums[2])
    low = max(0, start - window + 1) // 2 * 2
    scores, slopes = address(scratch_B), address(scratch_B) + 4 * MOST_ROWS * PANEL
    probs = slopes + 4 * MOST_ROWS * PANEL
    rounded_slopes = probs + 2 * MOST_ROWS * PANEL
    q, grad = address(block.q_PM), address(block.grad_PM)
    q_pairs, grad_pairs = address(block.q_PD), address(block.grad_PD)
    for key in range(low, end, MOST_ROWS):
        rows, here = min(MOST_ROWS, end - key), x + key * stride
        tile(rows, here + 2 * k_column, stride, q, 4 * PANEL, depth, scores, 4 * PANEL)
        tile(rows, here + 2 * v_column, stride, grad, 4 * PANEL, depth, slopes, 4 * PANEL)
        for r in range(rows):
            to_probs, to_slope = probs + 2 * PANEL * r, rounded_slopes + 2 * PANEL * r
            here = 4 * PANEL * r
            _slopes(scores + here, slopes + here, softened, scale, to_probs, to_slope)
            if key + r > start:
                _clear(to_probs, to_slope, 0, key + r - start)
            if end < start + PANEL or key + r + window < end:
                _clear(to_probs, to_slope, min(end, key + r + window) - start, PANEL)
        for r in range(0, rows, 2):
            if r + 1 == rows:
                halves(rounded_slopes + 2 * PANEL * rows, PANEL)[:] = 0
            place = to_slopes + 2 * PANEL * (key + r)
            _weave(rounded_slopes + 2 * PANEL * r, rounded_slopes + 2 * PANEL * (r + 1), place)
        skipped = max(0, key - start) // 2
        left, past = PANEL // 2 - skipped, 4 * skipped * width
        into, x_pairs = to_values + 4 * width * key, grad_pairs + past
        add_values(rows, probs + 4 * skipped, 2 * PANEL, x_pairs, left, width, into)
        into, x_pairs = to_keys + 4 * width * key, q_pairs + past
        add_values(rows, rounded_slopes + 4 * skipped, 2 * PANEL, x_pairs, left, width, into)
    return low


@piece
def _slopes(scores: Any, slopes: Any, softened: Any, scale: Any, probs: Any, out: Any) -> None:
    """One key's probabilities, and dL/dscores, for a block of queries; all are addresses."""
    scores_M, slopes_M = floats(scores, PANEL), floats(slopes, PANEL)
    top_M, share_M = floats(softened, PANEL), floats(softened + 4 * PANEL, PANEL)
    along_M = floats(softened + 8 * PANEL, PANEL)
    probs_M, out_M = halves(probs, PANEL), halves(out, PANEL)
    for m in range(PANEL):
        scores_M[m] = exp((scores_M[m] - top_M[m]) * scale) * share_M[m]
    for m in range(PANEL):
        probs_M[m] = rounded(scores_M[m], probs_M)
    for m in range(PANEL):
        out_M[m] = rounded(scores_M[m] * (slopes_M[m] - along_M[m]) * scale, out_M)


@piece
def _clear(probs: Any, slopes: Any, start: Any, stop: Any) -> None:
    """Queries that don't see a key."""
    for m in range(max(0, start), stop):
        halves(probs, PANEL)[m] = 0
        halves(slopes, PANEL)[m] = 0


@piece
def _weave(even: Any, odd: Any, out: Any) -> None:
    """Two rows as pairs."""
    even_M, odd_M, out_M = halves(even, PANEL), halves(odd, PANEL), words(out, PANEL)
    for m in range(PANEL):
        out_M[m] = _together(even_M[m], odd_M[m])


@piece
def _add_queries(keys_DN: Any, low: Any, slopes_PM: Any, depth: Any, grad_q_DM: Any) -> None:
    """dL/dqueries of a block, value by value, from the keys `low..low + 2 * depth`."""
    stride, slopes = 2 * keys_DN.shape[1], address(slopes_PM[low // 2])
    for d in range(0, len(keys_DN), MOST_ROWS):
        rows, keys = min(MOST_ROWS, len(keys_DN) - d), address(keys_DN[d]) + 2 * low
        tile(rows, keys, stride, slopes, 4 * PANEL, depth, address(grad_q_DM[d]), 4 * PANEL)


@piece
def _give_queries(grad_q_DM: Any, pairs_PM: Any, to_MW: Any, column: Any) -> None:
    """dL/dqueries of a block, rounded, query by query; by way of pairs, of which a row is made."""
    num_pairs = len(pairs_PM)
    for p in range(num_pairs):
        even_M, odd_M, to_M = grad_q_DM[2 * p], grad_q_DM[2 * p + 1], pairs_PM[p]
        for m in range(PANEL):
            to_M[m] = _together(rounded(even_M[m], to_MW), rounded(odd_M[m], to_MW))
    for m in range(len(to_MW)):
        to_P = words(address(to_MW) + 2 * (m * to_MW.shape[1] + column), num_pairs)
        for p in range(num_pairs):
            to_P[p] = pairs_PM[p, m]
