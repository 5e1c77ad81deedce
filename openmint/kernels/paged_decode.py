"""One new token per sequence over its pages of keys and values: for GPUs, in Triton.

S sequences, H query heads, G key heads, D head size, P pages, T tokens of a page. A sequence's key
k is token `k % T` of its page `k // T`; what is read is what is there, nothing is gathered first.
The reference is `PagedAttention` (`layers/attention.py`).

Never ran on a GPU: checked on CPUs by Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from openmint.kernels.paged import LARGEST

LEAST = 16
"""The fewest rows and columns that tensor cores take."""
KEYS = 64
"""Keys that a program reads at once."""


def write(
    k_SGD: Tensor, v_SGD: Tensor, place_S: Tensor, keys_PTGD: Tensor, values_PTGD: Tensor
) -> None:
    """Put new keys and values into their places, `page * T + offset`, finite ones only; a sequence
    whose place is negative writes nothing."""
    width = k_SGD.shape[1] * k_SGD.shape[2]
    _write[(len(k_SGD),)](
        k_SGD,
        k_SGD.stride(0),
        v_SGD,
        v_SGD.stride(0),
        place_S,
        keys_PTGD,
        values_PTGD,
        width,
        LARGEST,
        BLOCK=triton.next_power_of_2(width),
    )


def attend(
    q_SHD: Tensor,
    keys_PTGD: Tensor,
    values_PTGD: Tensor,
    pages_SP: Tensor,
    length_S: Tensor,
    window: int,
    scale: float,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention output `[S, H, D]` of each sequence's newest token, which sees the last `window` of
    its `length` keys, its own among them. A head's sink takes its share and gives nothing."""
    num_seqs, num_heads, head_dim = q_SHD.shape
    _, page_tokens, num_groups, _ = keys_PTGD.shape
    shared = num_heads // num_groups
    out_SHD = q_SHD.new_empty(q_SHD.shape)
    _attend[(num_seqs, num_groups)](
        q_SHD,
        q_SHD.stride(0),
        keys_PTGD,
        values_PTGD,
        pages_SP,
        pages_SP.stride(0),
        length_S,
        out_SHD,
        window,
        scale,
        length_S if sinks_H is None else sinks_H,
        SINKS=sinks_H is not None,
        PAGE=page_tokens,
        SHARED=shared,
        HEADS=max(LEAST, triton.next_power_of_2(shared)),
        WIDTH=head_dim,
        COLUMNS=max(LEAST, triton.next_power_of_2(head_dim)),
        KEYS=KEYS,
    )
    return out_SHD


@triton.jit
def _write(
    k_SGD,
    k_stride,
    v_SGD,
    v_stride,
    place_S,
    keys_PTGD,
    values_PTGD,
    width,
    largest,
    BLOCK: tl.constexpr,
):
    """NaN becomes 0: pages are shared, padded and handed on, and 0 x NaN is NaN."""
    seq = tl.program_id(0)
    place = tl.load(place_S + seq).to(tl.int64)
    if place < 0:
        return
    c = tl.arange(0, BLOCK)
    is_column = c < width
    k = tl.load(k_SGD + seq * k_stride + c, mask=is_column, other=0.0).to(tl.float32)
    v = tl.load(v_SGD + seq * v_stride + c, mask=is_column, other=0.0).to(tl.float32)
    k = tl.minimum(tl.maximum(tl.where(k == k, k, 0.0), -largest), largest)
    v = tl.minimum(tl.maximum(tl.where(v == v, v, 0.0), -largest), largest)
    at = place * width + c
    tl.store(keys_PTGD + at, k.to(keys_PTGD.dtype.element_ty), mask=is_column)
    tl.store(values_PTGD + at, v.to(values_PTGD.dtype.element_ty), mask=is_column)


@triton.jit
def _attend(
    q_SHD,
    q_stride,
    keys_PTGD,
    values_PTGD,
    pages_SP,
    pages_stride,
    length_S,
    out_SHD,
    window,
    scale,
    sinks_H,
    SINKS: tl.constexpr,
    PAGE: tl.constexpr,
    SHARED: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Softmax over blocks of keys as they come (arXiv:2205.14135), fp32 sums."""
    seq, group, num_groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    length = tl.load(length_S + seq)
    h, d = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    is_value = (h < SHARED)[:, None] & (d < WIDTH)[None, :]
    head = (group * SHARED + h)[:, None] * WIDTH + d[None, :]
    q = tl.load(q_SHD + seq * q_stride + head, mask=is_value, other=0.0)
    top = tl.full([HEADS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([HEADS], dtype=tl.float32)
    if SINKS:
        sink = tl.load(sinks_H + group * SHARED + h, mask=h < SHARED, other=0.0)
        top, total = sink.to(tl.float32), total + 1.0
    out = tl.zeros([HEADS, COLUMNS], dtype=tl.float32)
    for begin in range(tl.maximum(length - window, 0), length, KEYS):
        key = begin + tl.arange(0, KEYS)
        is_key = key < length
        page = tl.load(pages_SP + seq * pages_stride + key // PAGE, mask=is_key, other=0)
        place = page.to(tl.int64) * PAGE + key % PAGE
        at = (place * num_groups + group)[:, None] * WIDTH + d[None, :]
        is_there = is_key[:, None] & (d < WIDTH)[None, :]
        k = tl.load(keys_PTGD + at, mask=is_there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        powers = tl.exp(scores - higher[:, None])
        faded = tl.exp(top - higher)
        total = total * faded + tl.sum(powers, axis=1)
        v = tl.load(values_PTGD + at, mask=is_there, other=0.0)
        out = out * faded[:, None]
        out = tl.dot(powers.to(v.dtype), v, out, input_precision="ieee")
        top = higher
    out = out / total[:, None]
    heads = num_groups * SHARED * WIDTH
    tl.store(out_SHD + seq * heads + head, out.to(out_SHD.dtype.element_ty), mask=is_value)
