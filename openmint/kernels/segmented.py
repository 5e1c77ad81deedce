"""Low-rank products of many adapters in one batch, each token with its own: for GPUs, in Triton.

Shapes: T tokens, C columns of a matrix, K target modules with one input, L slots, R rank rounded up
to a power of two, B blocks of rows, N tiles of columns.

Nothing is stacked or copied: a slot is the address of an adapter's flat vector, and a target is an
offset into it. Tokens are ordered by slot; a block is up to `BLOCK_ROWS` of them that share one.
Base tokens and slots without the target have no block, so the cost follows the adapters that are
there, and no other adapter's value ever meets a token's. Every output tile belongs to one program:
sums have one order, and nothing is atomic. Source: SGMV, Punica (arXiv:2310.18547).
The reference is `LoraDelta` (`layers/adapters.py`) in `LoraLinear`.

Never ran on a GPU: checked on CPUs by Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 16
"""The fewest rows that tensor cores take."""
BLOCK_COLUMNS = 128


@dataclass(frozen=True, slots=True)
class Segments:
    """A batch's tokens by slot. All of it is made on the device, with shapes that depend on T and L
    alone, so that a CUDA graph can make it again."""

    rows_T: Tensor
    """Token indices in the order of their slots, base tokens first."""
    blocks_B3: Tensor
    """`(first, stop, slot)` into `rows_T`; empty ones at the end."""
    spans_L2: Tensor
    """`(first, stop)` of each slot."""


def segments(slot_T: Tensor, num_slots: int) -> Segments:
    """The segments of tokens whose slots these are; -1 is the bare base."""
    slot_T, rows_T = slot_T.sort(stable=True)
    slots_L = torch.arange(num_slots, device=slot_T.device)
    first_L = torch.searchsorted(slot_T, slots_L)
    return segments_between(rows_T, first_L, torch.searchsorted(slot_T, slots_L, right=True))


def segments_between(rows_T: Tensor, first_L: Tensor, stop_L: Tensor) -> Segments:
    """The segments of tokens in this order, of which each slot has those from its first on."""
    num_tokens, num_slots = len(rows_T), len(first_L)
    blocks_L = (stop_L - first_L + BLOCK_ROWS - 1) // BLOCK_ROWS
    ends_L = blocks_L.cumsum(0)
    num_blocks = min(num_tokens, num_tokens // BLOCK_ROWS + num_slots)
    block_B = torch.arange(num_blocks, device=rows_T.device)
    slot_B = torch.searchsorted(ends_L, block_B, right=True).clamp(max=num_slots - 1)
    within_B = block_B - (ends_L - blocks_L)[slot_B]
    first_B = first_L[slot_B] + within_B * BLOCK_ROWS
    stop_B = torch.minimum(first_B + BLOCK_ROWS, stop_L[slot_B])
    stop_B = torch.where(block_B < ends_L[-1], stop_B, first_B)
    return Segments(
        rows_T=rows_T.int(),
        blocks_B3=torch.stack((first_B, stop_B, slot_B), dim=1).int(),
        spans_L2=torch.stack((first_L, stop_L), dim=1).int(),
    )


@dataclass(frozen=True, slots=True)
class Matrices:
    """One matrix `[R, C_k]` per slot and target: where it lies, and which columns it stands for."""

    address_L: Tensor
    """int64: where each slot's flat vector begins."""
    offset_LK: Tensor
    """int64: elements from there to the matrix."""
    rank_L: Tensor
    """int32; 0 for a slot without these targets."""
    starts_K2: Tensor
    """int32 `(first column in the batch's tensor, width)` of each target."""
    tiles_N4: Tensor
    """int32 `(target, width, column in the matrix, column in the batch's tensor)` of each tile."""
    rank: int
    """R: no slot's rank is larger."""
    is_shared: bool
    """All targets stand for the same columns, as the A's of one input do."""
    is_aligned: bool
    """Every address, offset and width is a multiple of 16, in bytes at least: wide loads."""

    @property
    def num_targets(self) -> int:
        return len(self.starts_K2)


@cache
def layout_of(
    starts: tuple[int, ...], widths: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """`starts_K2` and `tiles_N4` of targets that begin at these columns; few models have more than
    five of them."""
    pairs = list(zip(starts, widths, strict=True))
    rows = [
        (target, width, column, start + column)
        for target, (start, width) in enumerate(pairs)
        for column in range(0, width, BLOCK_COLUMNS)
    ]
    starts_K2, tiles_N4 = (torch.tensor(x, dtype=torch.int32).to(device) for x in (pairs, rows))
    return starts_K2, tiles_N4


def shrink(x_TC: Tensor, by: Segments, to: Matrices, scale_L: Tensor) -> Tensor:
    """`h_TKR = scale * x @ M_k.T` by each token's own M; rows without a block hold anything."""
    h_TKR = torch.empty(len(x_TC), to.num_targets, to.rank, dtype=x_TC.dtype, device=x_TC.device)
    _shrink[(len(by.blocks_B3), to.num_targets)](
        x_TC,
        x_TC.stride(0),
        by.rows_T,
        by.blocks_B3,
        to.address_L,
        to.offset_LK,
        to.offset_LK.stride(0),
        to.rank_L,
        to.starts_K2,
        scale_L,
        h_TKR,
        RANK=to.rank,
        ROWS=BLOCK_ROWS,
        COLUMNS=BLOCK_COLUMNS,
        ALIGNED=to.is_aligned,
    )
    return h_TKR


def expand_(y_TC: Tensor, h_TKR: Tensor, by: Segments, of: Matrices) -> None:
    """`y += h_k @ M_k` in each target's columns, the sum over targets where they share them."""
    num_summed = of.num_targets if of.is_shared else 1
    _expand[(len(by.blocks_B3), len(of.tiles_N4) // num_summed)](
        y_TC,
        y_TC.stride(0),
        by.rows_T,
        by.blocks_B3,
        of.address_L,
        of.offset_LK,
        of.offset_LK.stride(0),
        of.rank_L,
        of.tiles_N4,
        h_TKR,
        of.num_targets,
        num_summed,
        RANK=of.rank,
        ROWS=BLOCK_ROWS,
        COLUMNS=BLOCK_COLUMNS,
        ALIGNED=of.is_aligned,
    )


def accumulate_(sink_L: Tensor, h_TKR: Tensor, x_TC: Tensor, by: Segments, like: Matrices) -> None:
    """`dM_k += h_k.T @ x` over each slot's own tokens, in fp32 vectors laid out as the adapters';
    `sink_L` holds their addresses."""
    _accumulate[(len(by.spans_L2), len(like.tiles_N4))](
        sink_L,
        h_TKR,
        x_TC,
        x_TC.stride(0),
        by.rows_T,
        by.spans_L2,
        like.offset_LK,
        like.offset_LK.stride(0),
        like.rank_L,
        like.tiles_N4,
        like.num_targets,
        RANK=like.rank,
        ROWS=2 * BLOCK_ROWS,
        COLUMNS=BLOCK_COLUMNS,
        ALIGNED=like.is_aligned,
    )


@triton.jit
def _shrink(
    x_TC,
    x_stride,
    rows_T,
    blocks_B3,
    address_L,
    offset_LK,
    offset_stride,
    rank_L,
    starts_K2,
    scale_L,
    h_TKR,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    block, target, num_targets = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first, stop = tl.load(blocks_B3 + 3 * block), tl.load(blocks_B3 + 3 * block + 1)
    slot = tl.load(blocks_B3 + 3 * block + 2)
    rank = tl.load(rank_L + slot)
    if first >= stop or rank == 0:
        return
    start, width = tl.load(starts_K2 + 2 * target), tl.load(starts_K2 + 2 * target + 1)
    flat = tl.load(address_L + slot).to(tl.pointer_type(x_TC.dtype.element_ty))
    matrix_RC = flat + tl.load(offset_LK + slot * offset_stride + target)
    if ALIGNED:
        width, matrix_RC = tl.multiple_of(width, 16), tl.multiple_of(matrix_RC, 16)
        start = tl.multiple_of(start, 16)
    place = first + tl.arange(0, ROWS)
    is_row, r = place < stop, tl.arange(0, RANK)
    row = tl.load(rows_T + place, mask=is_row, other=0).to(tl.int64)
    h = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for begin in range(0, width, COLUMNS):
        c = begin + tl.arange(0, COLUMNS)
        is_column = c < width
        x = tl.load(
            x_TC + row[:, None] * x_stride + start + c[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        m = tl.load(
            matrix_RC + r[:, None] * width + c[None, :],
            mask=(r < rank)[:, None] & is_column[None, :],
            other=0.0,
        )
        h = tl.dot(x, tl.trans(m), h, input_precision="ieee")
    h = h * tl.load(scale_L + slot)
    tl.store(
        h_TKR + row[:, None] * (num_targets * RANK) + target * RANK + r[None, :],
        h.to(h_TKR.dtype.element_ty),
        mask=is_row[:, None],
    )


@triton.jit
def _expand(
    y_TC,
    y_stride,
    rows_T,
    blocks_B3,
    address_L,
    offset_LK,
    offset_stride,
    rank_L,
    tiles_N4,
    h_TKR,
    num_targets,
    num_summed,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    block, tile = tl.program_id(0), tl.program_id(1)
    first, stop = tl.load(blocks_B3 + 3 * block), tl.load(blocks_B3 + 3 * block + 1)
    slot = tl.load(blocks_B3 + 3 * block + 2)
    rank = tl.load(rank_L + slot)
    if first >= stop or rank == 0:
        return
    first_target, width = tl.load(tiles_N4 + 4 * tile), tl.load(tiles_N4 + 4 * tile + 1)
    begin, y_begin = tl.load(tiles_N4 + 4 * tile + 2), tl.load(tiles_N4 + 4 * tile + 3)
    if ALIGNED:
        width, begin = tl.multiple_of(width, 16), tl.multiple_of(begin, 16)
        y_begin = tl.multiple_of(y_begin, 16)
    c, y_column = begin + tl.arange(0, COLUMNS), y_begin + tl.arange(0, COLUMNS)
    flat = tl.load(address_L + slot).to(tl.pointer_type(h_TKR.dtype.element_ty))
    place = first + tl.arange(0, ROWS)
    is_row, is_column, r = place < stop, c < width, tl.arange(0, RANK)
    row = tl.load(rows_T + place, mask=is_row, other=0).to(tl.int64)
    y = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for target in range(first_target, first_target + num_summed):
        h = tl.load(
            h_TKR + row[:, None] * (num_targets * RANK) + target * RANK + r[None, :],
            mask=is_row[:, None],
            other=0.0,
        )
        matrix_RC = flat + tl.load(offset_LK + slot * offset_stride + target)
        if ALIGNED:
            matrix_RC = tl.multiple_of(matrix_RC, 16)
        m = tl.load(
            matrix_RC + r[:, None] * width + c[None, :],
            mask=(r < rank)[:, None] & is_column[None, :],
            other=0.0,
        )
        y = tl.dot(h, m, y, input_precision="ieee")
    out = y_TC + row[:, None] * y_stride + y_column[None, :]
    mask = is_row[:, None] & is_column[None, :]
    y = y + tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, y.to(y_TC.dtype.element_ty), mask=mask)


@triton.jit
def _accumulate(
    sink_L,
    h_TKR,
    x_TC,
    x_stride,
    rows_T,
    spans_L2,
    offset_LK,
    offset_stride,
    rank_L,
    tiles_N4,
    num_targets,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    slot, tile = tl.program_id(0), tl.program_id(1)
    first, stop = tl.load(spans_L2 + 2 * slot), tl.load(spans_L2 + 2 * slot + 1)
    rank = tl.load(rank_L + slot)
    if first >= stop or rank == 0:
        return
    target, width = tl.load(tiles_N4 + 4 * tile), tl.load(tiles_N4 + 4 * tile + 1)
    column, x_begin = tl.load(tiles_N4 + 4 * tile + 2), tl.load(tiles_N4 + 4 * tile + 3)
    if ALIGNED:
        width, column = tl.multiple_of(width, 16), tl.multiple_of(column, 16)
        x_begin = tl.multiple_of(x_begin, 16)
    c, x_column = column + tl.arange(0, COLUMNS), x_begin + tl.arange(0, COLUMNS)
    is_column, r = c < width, tl.arange(0, RANK)
    total = tl.zeros([RANK, COLUMNS], dtype=tl.float32)
    for begin in range(first, stop, ROWS):
        place = begin + tl.arange(0, ROWS)
        is_row = place < stop
        row = tl.load(rows_T + place, mask=is_row, other=0).to(tl.int64)
        h = tl.load(
            h_TKR + row[:, None] * (num_targets * RANK) + target * RANK + r[None, :],
            mask=is_row[:, None],
            other=0.0,
        )
        x = tl.load(
            x_TC + row[:, None] * x_stride + x_column[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(h), x, total, input_precision="ieee")
    flat = tl.load(sink_L + slot).to(tl.pointer_type(tl.float32))
    out = flat + tl.load(offset_LK + slot * offset_stride + target)
    if ALIGNED:
        out = tl.multiple_of(out, 16)
    out = out + r[:, None] * width + c[None, :]
    mask = (r < rank)[:, None] & is_column[None, :]
    tl.store(out, tl.load(out, mask=mask, other=0.0) + total, mask=mask)
