"""Rotary position embedding on the leading heads of fused q, k, v rows.

T tokens, W values of a row (all heads), R rotated values, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmint.kernels.jit import F32, as_array, kernel, load, rounded


def reference(heads_TW: Tensor, cos_TD: Tensor, sin_TD: Tensor, num_rotated: int) -> Tensor:
    """The first `num_rotated` heads, each turned by its token's angles, `[T, num_rotated, D]`."""
    x_THD = heads_TW.view(len(heads_TW), -1, cos_TD.shape[1])[:, :num_rotated]
    left, right = x_THD.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return x_THD * cos_TD[:, None] + turned * sin_TD[:, None]


@kernel
def _rotate(
    x_TW: Any, cos_TD: Any, sin_TD: Any, direction: Any, y_TW: Any, num_rotated: Any
) -> None:
    """Turn by the angles, or with `direction` -1 back; rows of x and y may be longer."""
    num_tokens, width = cos_TD.shape
    half = width // 2
    for t in range(num_tokens):
        cos_D, sin_D = cos_TD[t, :half], sin_TD[t, :half]
        for start in range(0, num_rotated * width, width):
            left_D, right_D = x_TW[t, start : start + half], x_TW[t, start + half : start + width]
            out_D = y_TW[t, start : start + half]
            for d in range(half):
                turned = load(right_D[d]) * load(sin_D[d]) * direction
                out_D[d] = rounded(load(left_D[d]) * load(cos_D[d]) - turned, out_D)
            out_D = y_TW[t, start + half : start + width]
            for d in range(half):
                turned = load(left_D[d]) * load(sin_D[d]) * direction
                out_D[d] = rounded(load(right_D[d]) * load(cos_D[d]) + turned, out_D)


def forward(
    heads_TW: Tensor, cos_TD: Tensor, sin_TD: Tensor, num_rotated: int
) -> tuple[Tensor, Tensor]:
    """`reference`, and the other heads as they are: `([T, R], [T, W - R])`, on CPUs."""
    num_values = num_rotated * cos_TD.shape[1]
    turned_TR = heads_TW.new_empty(len(heads_TW), num_values)
    angles = as_array(cos_TD), as_array(sin_TD)
    _rotate(as_array(heads_TW), *angles, F32(1.0), as_array(turned_TR), num_rotated)
    return turned_TR, heads_TW[:, num_values:].contiguous()


class FusedRotary(torch.autograd.Function):
    """`forward`, differentiable in the heads."""

    @staticmethod
    def forward(
        ctx: Any, heads_TW: Tensor, cos_TD: Tensor, sin_TD: Tensor, num_rotated: int
    ) -> tuple[Tensor, Tensor]:
        ctx.call = (cos_TD, sin_TD, num_rotated)
        return forward(heads_TW, cos_TD, sin_TD, num_rotated)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos_TD, sin_TD, num_rotated = ctx.call
        turned_TR, rest = grads
        out_TW = turned_TR.new_empty(len(turned_TR), turned_TR.shape[1] + rest.shape[1])
        angles = as_array(cos_TD), as_array(sin_TD)
        _rotate(as_array(turned_TR.contiguous()), *angles, F32(-1.0), as_array(out_TW), num_rotated)
        out_TW[:, turned_TR.shape[1] :] = rest
        return out_TW, None, None, None
