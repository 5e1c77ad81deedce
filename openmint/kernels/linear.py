"""A linear layer and its adapters in one pass, on AVX512-BF16.

T tokens, I in, O out, P panels, S adapter slots, R adapter rows: the rank, padded to whole strips,
of every target of a fused layer in turn. A row's sum goes on from the base's product into its own
adapter's, `y = x @ W + (scale * x @ A) @ B`, and is rounded once. Rows are independent: who stands
beside a token makes no difference to it, and many adapters cost little more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openmint.kernels.jit import (
    F32,
    add_float,
    address,
    as_array,
    float_at,
    floats,
    halves,
    inlined,
    int_at,
    ints,
    kernel,
    load,
    piece,
    rounded,
    scratch,
)
from openmint.kernels.team import Together, alone, share, team
from openmint.kernels.tile import (
    MOST_ROWS,
    OUTER,
    PANEL,
    STRIP,
    add_tile,
    byte_tile,
    finish,
    finish_adding,
    outer,
    panels,
    strip,
    tile,
)
from openmint.types import AnyArray

FEW, MANY = 4, 256
"""Rows of a team's piece of work, of small operations and of products."""
DEEP = 1024
"""Pairs of the inner dimension that all rows go through before the next ones, so that their part of
a panel and of x stays in the second cache; sums wait in memory meanwhile."""
LIST = 4096
"""Most cache lines that a panel lists to be brought near."""
_lines = scratch(8 * LIST)
_strip_sums, _panel_sums = scratch(4 * 4 * STRIP), scratch(4 * MANY * PANEL)
COLUMN, WIDTH, PART = 0, 1, 2
"""Fields of a panel: its first column of y, how many, and which target of the layer they are."""


class Weights(NamedTuple):
    """A frozen weight in panels. Its memory is its maker's to keep."""

    address: int
    panels_P3: Any
    bias_O: Any
    """float32; empty without a bias."""
    scale_O: Any
    """float32; empty when the panels are bfloat16, else they are int8 and y is multiplied by it."""
    num_in: int


class Slots(NamedTuple):
    """The adapters of a batch, for one linear layer: addresses of arrays that others keep."""

    slot_T: int
    """-1 for the bare base; no array at all when the whole batch is."""
    shrink_S: int
    """Of addresses of strips; 0 where an adapter doesn't have this layer."""
    expand_S: int
    """Of addresses of panels."""
    rank_S: int
    """Rows of one target, padded to whole strips."""
    scale_S: int
    """float32."""
    num_parts: int
    next_shrink_S: int = 0
    """Of the linear layer that comes next, if it is brought near meanwhile; as its `expand_S`."""
    next_expand_S: int = 0
    next_bytes: int = 0
    """Of its strips that each panel has brought near, for each row of a target; 0 for none."""


@piece
def followed(slots: Any, weights: Any, next_slots: Any, next_weights: Any) -> Any:
    """The slots of a linear layer that has those of the next one brought near."""
    num_panels = len(weights.panels_P3)
    next_bytes = 2 * next_slots.num_parts * next_weights.num_in
    return Slots(
        slots.slot_T,
        slots.shrink_S,
        slots.expand_S,
        slots.rank_S,
        slots.scale_S,
        slots.num_parts,
        next_slots.shrink_S,
        next_slots.expand_S,
        (next_bytes + num_panels - 1) // num_panels,
    )


def pack(parts_OI: Sequence[Tensor]) -> tuple[Tensor, Any]:
    """The weights of targets that share an input as panels, and where those stand in y. Each target
    begins a panel of its own."""
    places, column = [], 0
    for part, weight_OI in enumerate(parts_OI):
        for start in range(0, len(weight_OI), PANEL):
            places.append((column + start, min(PANEL, len(weight_OI) - start), part))
        column += len(weight_OI)
    padded = [torch.nn.functional.pad(w, (0, 0, 0, -len(w) % PANEL)) for w in parts_OI]
    return panels(torch.cat(padded)), np.array(places)


def to_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 and a float32 scale each: the largest of a row becomes 127."""
    scale_O = weight_OI.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight_OI.float() / scale_O[:, None]).round().to(torch.int8), scale_O


@piece
def _alike(slot_T: Any, row: Any, stop: Any) -> Any:
    """How many rows from `row` on have its slot."""
    end = row + 1
    while end < stop and int_at(slot_T, end) == int_at(slot_T, row):
        end += 1
    return end - row


@piece
def shrink(
    x: Any,
    x_stride: Any,
    pairs: Any,
    first: Any,
    stop: Any,
    slots: Any,
    h_TR: Any,
    part: Any,
    before: Any,
) -> None:
    """`h = scale * x @ A` of rows `first..stop`: of all targets for `part < 0`, else of one, whose
    strips follow those of parts with `before` inputs."""
    sums, h, h_stride = _strip_sums(), address(h_TR), 2 * h_TR.shape[1]
    row = first
    while row < stop:
        slot = int_at(slots.slot_T, row)
        rows = 4 if _alike(slots.slot_T, row, min(stop, row + 4)) == 4 else 1
        tiles = np.int64(0) if slot < 0 else int_at(slots.shrink_S, slot)
        if tiles != 0:
            rank, scale = int_at(slots.rank_S, slot), float_at(slots.scale_S, slot)
            num_strips = (slots.num_parts if part < 0 else 1) * rank // STRIP
            start = max(part, 0) * rank
            for s in range(num_strips):
                place = tiles + 2 * rank * before + s * pairs * 4 * STRIP
                strip(rows, x + row * x_stride, x_stride, place, pairs, sums)
                to = h + row * h_stride + 2 * (start + s * STRIP)
                for i in range(rows):
                    sums_8, h_8 = (
                        floats(sums + 4 * STRIP * i, STRIP),
                        halves(to + i * h_stride, STRIP),
                    )
                    for r in range(STRIP):
                        h_8[r] = rounded(sums_8[r] * scale, h_8)
        row += rows


@inlined
def expand(sums: Any, first: Any, rows: Any, panel: Any, part: Any, slots: Any, h: Any) -> None:
    """`sums += h @ B` of rows `first..first + rows` in one panel of y; of the h of one part, or of
    all parts for `part < 0`. `h` is the address and the stride of all rows' hidden values."""
    row, stop = first, first + rows
    while row < stop:
        alike, slot = _alike(slots.slot_T, row, stop), int_at(slots.slot_T, row)
        tiles = np.int64(0) if slot < 0 else int_at(slots.expand_S, slot)
        if tiles != 0:
            rank = int_at(slots.rank_S, slot)
            depth = rank if part >= 0 else rank * slots.num_parts
            own, stride = h[0] + row * h[1] + 2 * rank * max(part, 0), h[1]
            place, out = tiles + panel * 2 * depth * PANEL, sums + (row - first) * 4 * PANEL
            add_tile(alike, own, stride, place, 4 * PANEL, depth // 2, out, 4 * PANEL)
        row += alike


@piece
def _list_ahead(
    lines: Any, w: Any, first: Any, stop: Any, index: Any, weights: Any, slots: Any
) -> Any:
    """List the cache lines of these rows' own adapters that are wanted soon: what the panel after
    the next expands with, and a share of the next layer's strips. Returns how many.

    Each row of a batch may have an adapter of its own, whose pieces are too short for a machine to
    see where they lead to; without this list it waits for each of them.
    """
    lines_N, count, row, num_panels = ints(lines, LIST), 0, first, len(weights.panels_P3)
    lines_N[0] = w
    if slots.slot_T == 0 or slots.next_bytes == 0:
        return 0
    expand_S, panel = slots.expand_S, index + 2
    if panel >= num_panels:
        expand_S, panel = slots.next_expand_S, panel - num_panels
    while row < stop:
        slot = int_at(slots.slot_T, row)
        if slot >= 0:
            rank = int_at(slots.rank_S, slot)
            start, size = int_at(expand_S, slot), 2 * rank * PANEL
            count = _list_lines(lines_N, count, start, panel * size, size)
            start, size = int_at(slots.next_shrink_S, slot), rank * slots.next_bytes
            count = _list_lines(lines_N, count, start, index * size, size + 64)
        row += _alike(slots.slot_T, row, stop)
    # A tile doesn't look where the list ends.
    lines_N[count : count + weights.num_in // 2] = w
    return count


@piece
def _list_lines(lines_N: Any, count: Any, tiles: Any, skipped: Any, size: Any) -> Any:
    """Add `size` bytes of an adapter's tiles, if it has them and there is room; the new count."""
    num_lines = size // 64
    if tiles == 0 or count + num_lines > len(lines_N):
        return count
    for n in range(num_lines):
        lines_N[count + n] = tiles + skipped + 64 * n
    return count + num_lines


@piece
def write(rows: Any, sums: Any, y: Any, y_stride: Any, width: Any, adds: Any) -> None:
    """The sums to y, or added to what is there; addresses, as arrays would be counted."""
    for i in range(rows):
        from_N, to_W = sums + 4 * PANEL * i, y + y_stride * i
        if width < PANEL:
            _write_few(floats(from_N, PANEL), halves(to_W, width), adds)
        elif adds:
            finish_adding(from_N, to_W)
        else:
            finish(from_N, to_W)


@piece
def _write_few(sums_N: Any, y_W: Any, adds: Any) -> None:
    for n in range(len(y_W)):
        value = rounded(sums_N[n], y_W)
        y_W[n] = rounded(load(y_W[n]) + load(value), y_W) if adds else value


@piece
def _scaled(rows: Any, sums: Any, scale: Any, width: Any) -> None:
    """The sums of int8 panels times their outputs' scales."""
    for i in range(rows):
        sums_W, scale_W = floats(sums + 4 * PANEL * i, width), floats(scale, width)
        for n in range(width):
            sums_W[n] *= scale_W[n]


@piece
def _shifted(rows: Any, sums: Any, bias: Any, width: Any) -> None:
    for i in range(rows):
        sums_W, bias_W = floats(sums + 4 * PANEL * i, width), floats(bias, width)
        for n in range(width):
            sums_W[n] += bias_W[n]


@piece
def panel(
    x: Any,
    x_stride: Any,
    first: Any,
    stop: Any,
    weights: Any,
    index: Any,
    part: Any,
    slots: Any,
    h_TR: Any,
    y_TO: Any,
    adds: Any,
) -> None:
    """Columns of one panel of y, rows `first..stop`, MANY at most; to what is there, if `adds`."""
    all_sums, pairs, is_int8 = _panel_sums(), weights.num_in // 2, len(weights.scale_O) > 0
    column, width = weights.panels_P3[index, COLUMN], weights.panels_P3[index, WIDTH]
    y_stride, h = 2 * y_TO.shape[1], (address(h_TR), 2 * h_TR.shape[1])
    y, bias = address(y_TO) + 2 * column, address(weights.bias_O) + 4 * column
    scale = address(weights.scale_O) + 4 * column
    stride = 2 * PANEL if is_int8 else 4 * PANEL
    w = weights.address + index * pairs * stride
    has_adapters, has_bias = slots.slot_T != 0, len(weights.bias_O) > 0
    tiles = (stop - first + MOST_ROWS - 1) // MOST_ROWS
    deep = pairs if is_int8 else DEEP
    lines = _lines()
    num_lines = _list_ahead(lines, w, first, stop, index, weights, slots)
    for start in range(0, pairs, deep):
        row, depth, here = first, min(deep, pairs - start), w + start * stride
        for t in range(tiles):
            rows = (stop - row + tiles - t - 1) // (tiles - t)
            # The panel after the next, as a team of two takes turns, while this one is multiplied.
            ahead = here + (2 * stride + min(t, 3) * 64) * pairs
            own, sums = x + row * x_stride + 4 * start, all_sums + (row - first) * 4 * PANEL
            if start > 0:
                add_tile(rows, own, x_stride, here, stride, depth, sums, 4 * PANEL)
            else:
                is_listed = t * depth < num_lines and (t + 1) * depth <= LIST
                near = (ahead, lines + 8 * t * depth, 8) if is_listed else (ahead, lines, 0)
                if is_int8:
                    byte_tile(rows, own, x_stride, here, stride, depth, sums, 4 * PANEL, near)
                    _scaled(rows, sums, scale, width)
                else:
                    tile(rows, own, x_stride, here, stride, depth, sums, 4 * PANEL, near)
            if start + depth == pairs:
                if has_adapters:
                    expand(sums, row, rows, index, part, slots, h)
                if has_bias:
                    _shifted(rows, sums, bias, width)
                write(rows, sums, y + row * y_stride, y_stride, width, adds)
            row += rows


@piece
def shrink_few(i: Any, x_TI: Any, slots: Any, h_TR: Any) -> None:
    """A team's piece of work: `shrink` a few rows for all targets."""
    if slots.slot_T != 0:
        first, stop = i * FEW, min((i + 1) * FEW, len(x_TI))
        num_in = x_TI.shape[1]
        shrink(address(x_TI), 2 * num_in, num_in // 2, first, stop, slots, h_TR, -1, 0)


@piece
def num_products(x_TI: Any, weights: Any) -> Any:
    """Pieces of work in `multiply`."""
    return len(weights.panels_P3) * ((len(x_TI) + MANY - 1) // MANY)


@piece
def multiply(i: Any, x_TI: Any, weights: Any, slots: Any, h_TR: Any, y_TO: Any, adds: Any) -> None:
    """A team's piece of work: many rows of one panel of y."""
    num_panels = len(weights.panels_P3)
    index, first = i % num_panels, i // num_panels * MANY
    stop, part = min(first + MANY, len(x_TI)), weights.panels_P3[index, PART]
    x, x_stride = address(x_TI), 2 * x_TI.shape[1]
    panel(x, x_stride, first, stop, weights, index, part, slots, h_TR, y_TO, adds)


@kernel
def _forward(team: Any, x_TI: Any, weights: Any, slots: Any, y_TO: Any, h_TR: Any) -> None:
    share(team, 0, (len(x_TI) + FEW - 1) // FEW, shrink_few, (x_TI, slots, h_TR))
    pieces = num_products(x_TI, weights)
    share(team, 1, pieces, multiply, (x_TI, weights, slots, h_TR, y_TO, False))


@piece
def product(x_TI: Any, weights: Any, slots: Any, h_TR: Any, y_TO: Any, adds: Any) -> None:
    """The whole of one thread's `y = x @ W + (scale * x @ A) @ B`, or `y +=`, if `adds`."""
    x, num_tokens, num_in = address(x_TI), x_TI.shape[0], x_TI.shape[1]
    if slots.slot_T != 0:
        shrink(x, 2 * num_in, num_in // 2, 0, num_tokens, slots, h_TR, -1, 0)
    for first in range(0, num_tokens, MANY):
        stop = min(first + MANY, num_tokens)
        for p in range(len(weights.panels_P3)):
            part = weights.panels_P3[p, PART]
            panel(x, 2 * num_in, first, stop, weights, p, part, slots, h_TR, y_TO, adds)


@piece
def shrink_back(grad_TO: Any, ends_N: Any, slots: Any, grad_h_TR: Any) -> None:
    """The adapters' part of `product_back`: `grad_h = scale * dL/dy @ B.T`, part by part."""
    x, x_stride, start = address(grad_TO), 2 * grad_TO.shape[1], 0
    if slots.slot_T != 0:
        for n in range(len(ends_N)):
            own, pairs = x + 2 * start, (ends_N[n] - start) // 2
            shrink(own, x_stride, pairs, 0, len(grad_TO), slots, grad_h_TR, n, start)
            start = ends_N[n]


@piece
def product_back(
    grad_TO: Any, ends_N: Any, weights: Any, slots: Any, grad_h_TR: Any, grad_x_TI: Any
) -> None:
    """dL/dx of `product`. `ends_N` are the columns of y where its parts end."""
    shrink_back(grad_TO, ends_N, slots, grad_h_TR)
    x, x_stride, num_tokens = address(grad_TO), 2 * grad_TO.shape[1], len(grad_TO)
    for first in range(0, num_tokens, MANY):
        stop = min(first + MANY, num_tokens)
        for p in range(len(weights.panels_P3)):
            panel(x, x_stride, first, stop, weights, p, -1, slots, grad_h_TR, grad_x_TI, False)


@kernel
def _backward(
    grad_TO: Any, ends_N: Any, weights: Any, slots: Any, grad_h_TR: Any, grad_x_TI: Any
) -> None:
    product_back(grad_TO, ends_N, weights, slots, grad_h_TR, grad_x_TI)


@piece
def add_outer(
    h_TR: Any,
    row: Any,
    rank: Any,
    x_TI: Any,
    column: Any,
    width: Any,
    first: Any,
    stop: Any,
    out: Any,
) -> None:
    """`out += h.T @ x` in float32 over the tokens `first..stop`, of `rank` columns of h from `row`
    on, padded to whole strips, and `width` columns of x. `out` is the address of `[rank, width]`.
    """
    pairs = (stop - first + 1) // 2
    pairs_P8, sums_8N = np.empty((pairs, STRIP), np.uint32), np.empty((STRIP, OUTER), np.float32)
    x_stride, whole = 2 * x_TI.shape[1], width - width % OUTER
    x, h, sums = address(x_TI) + first * x_stride + 2 * column, address(pairs_P8), address(sums_8N)
    for r in range(0, rank, STRIP):
        _pair(h_TR, row + r, first, stop, pairs_P8)
        here = out + 4 * width * r
        for i in range(0, whole, OUTER):
            if rank - r >= STRIP:
                _outer(h, x + 2 * i, x_stride, stop - first, here + 4 * i, 4 * width)
            else:
                sums_8N[:] = F32(0.0)
                _outer(h, x + 2 * i, x_stride, stop - first, sums, 4 * OUTER)
                for j in range(rank - r):
                    for n in range(OUTER):
                        add_float(here, j * width + i + n, sums_8N[j, n])
        for j in range(min(STRIP, rank - r)):
            for i in range(whole, width):
                total = F32(0.0)
                for t in range(first, stop):
                    total += load(h_TR[t, row + r + j]) * load(x_TI[t, column + i])
                add_float(here, j * width + i, total)


@inlined
def _outer(h: Any, x: Any, x_stride: Any, tokens: Any, out: Any, stride: Any) -> None:
    """A last token without a partner is its own: its partner in h is zero."""
    if tokens >= 2:
        outer(h, 4 * STRIP, x, x_stride, tokens // 2, out, stride)
    if tokens % 2 == 1:
        last = tokens - 1
        outer(h + last * 2 * STRIP, 4 * STRIP, x + last * x_stride, 0, 1, out, stride)


@piece
def _pair(h_TR: Any, row: Any, first: Any, stop: Any, pairs_P8: Any) -> None:
    """A strip of h with its tokens in pairs."""
    for p in range(len(pairs_P8)):
        t, to_8 = first + 2 * p, pairs_P8[p]
        for r in range(STRIP):
            to_8[r] = np.uint32(h_TR[t, row + r])
        if t + 1 < stop:
            for r in range(STRIP):
                to_8[r] |= np.uint32(h_TR[t + 1, row + r]) << np.uint32(16)


@kernel
def _add_outer(
    h_TR: Any, row: Any, x_TI: Any, column: Any, first: Any, stop: Any, grad_RI: Any
) -> None:
    rank, width = grad_RI.shape
    add_outer(h_TR, row, rank, x_TI, column, width, first, stop, address(grad_RI))


def add_outer_(
    grad_RI: AnyArray, h_TR: AnyArray, row: int, x_TI: AnyArray, column: int, tokens: slice
) -> None:
    """`grad_RI += h.T @ x` in float32 over some tokens, of the rows and columns that begin where
    said; rows are padded to whole strips in h."""
    assert grad_RI.dtype == np.float32
    _add_outer(h_TR, row, x_TI, column, tokens.start, tokens.stop, grad_RI)


def forward(
    x_TI: Tensor,
    y_TO: Tensor,
    weights: Weights,
    slots: Slots,
    num_rows: int,
    together: Together = alone,
) -> Tensor:
    """Writes `y_TO`. The adapters' `h_TR`, R being `num_rows`, is what backward wants again."""
    h_TR = x_TI.new_zeros(len(x_TI), num_rows)
    counters, arrays = team(2), (as_array(x_TI), as_array(y_TO), as_array(h_TR))
    x, y, h = arrays
    together(lambda: _forward(counters, x, weights, slots, y, h))
    return h_TR


def backward(
    grad_TO: Tensor, ends_N: Any, num_in: int, weights: Weights, slots: Slots, num_rows: int
) -> tuple[Tensor, Tensor]:
    """`grad_x_TI` and `grad_h_TR`. `weights` are W the other way round; of `slots`, `shrink_S` are
    the strips of each part's B, `expand_S` the panels of A."""
    grad_x_TI = grad_TO.new_empty(len(grad_TO), num_in)
    grad_h_TR = grad_TO.new_zeros(len(grad_TO), num_rows)
    _backward(as_array(grad_TO), ends_N, weights, slots, as_array(grad_h_TR), as_array(grad_x_TI))
    return grad_x_TI, grad_h_TR


NO_ADAPTERS = Slots(0, 0, 0, 0, 0, 1)
"""A batch of the bare base."""
