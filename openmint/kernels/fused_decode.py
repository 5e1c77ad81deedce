"""The small operations between a decode step's products, one kernel each: for GPUs, in Triton.

T tokens, D columns, F columns of the gate, W values of a row (all heads), H rotated heads. Forward
only: training's gradients run through the references, `reference` of `norm`, `swiglu` and `rotary`.

Never ran on a GPU: checked on CPUs by Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024
"""Columns of the gate that a program takes."""


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)`, summed in float32 and rounded, times the weight; last axis."""
    rows, width = x.contiguous(), len(weight_D)
    y = rows.new_empty(rows.shape)
    num_rows = rows.numel() // width
    _rms_norm[(num_rows,)](rows, weight_D, y, width, eps, BLOCK=triton.next_power_of_2(width))
    return y


def silu_gate(gate_up_TW: Tensor) -> Tensor:
    """`silu(gate) * up`, the silu rounded first, as two operations would."""
    num_tokens, width = gate_up_TW.shape[0], gate_up_TW.shape[1] // 2
    y_TF = gate_up_TW.new_empty(num_tokens, width)
    grid = (num_tokens, triton.cdiv(width, COLUMNS))
    _silu_gate[grid](gate_up_TW, gate_up_TW.stride(0), y_TF, width, COLUMNS=COLUMNS)
    return y_TF


def rotate(heads_TW: Tensor, cos_TD: Tensor, sin_TD: Tensor, num_rotated: int) -> Tensor:
    """The first heads of each row, each turned by its token's angles, `[T, H, D]`."""
    num_tokens, width = cos_TD.shape
    turned_THD = heads_TW.new_empty(num_tokens, num_rotated, width)
    _rotate[(num_tokens, num_rotated)](
        heads_TW,
        heads_TW.stride(0),
        cos_TD,
        sin_TD,
        turned_THD,
        HALF=width // 2,
        BLOCK=triton.next_power_of_2(width // 2),
    )
    return turned_THD


@triton.jit
def _rms_norm(x_TD, weight_D, y_TD, width, eps, BLOCK: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    is_column = d < width
    x = tl.load(x_TD + row * width + d, mask=is_column, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    normed = (x * scale).to(y_TD.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_D + d, mask=is_column, other=0.0).to(tl.float32)
    tl.store(y_TD + row * width + d, (normed * weight).to(y_TD.dtype.element_ty), mask=is_column)


@triton.jit
def _silu_gate(x_TW, x_stride, y_TF, width, COLUMNS: tl.constexpr):
    row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = f < width
    gate = tl.load(x_TW + row * x_stride + f, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(x_TW + row * x_stride + width + f, mask=is_column, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(y_TF.dtype.element_ty).to(tl.float32)
    tl.store(y_TF + row * width + f, (silu * up).to(y_TF.dtype.element_ty), mask=is_column)


@triton.jit
def _rotate(x_TW, x_stride, cos_TD, sin_TD, y_THD, HALF: tl.constexpr, BLOCK: tl.constexpr):
    row, head, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    d = tl.arange(0, BLOCK)
    is_value = d < HALF
    width = 2 * HALF
    cos = tl.load(cos_TD + row * width + d, mask=is_value, other=0.0).to(tl.float32)
    sin = tl.load(sin_TD + row * width + d, mask=is_value, other=0.0).to(tl.float32)
    x = x_TW + row * x_stride + head * width + d
    left = tl.load(x, mask=is_value, other=0.0).to(tl.float32)
    right = tl.load(x + HALF, mask=is_value, other=0.0).to(tl.float32)
    y = y_THD + (row * num_heads + head) * width + d
    dtype = y_THD.dtype.element_ty
    tl.store(y, (left * cos - right * sin).to(dtype), mask=is_value)
    tl.store(y + HALF, (right * cos + left * sin).to(dtype), mask=is_value)
