"""Compile every kernel before it is needed: `python -m openmint.kernels.compile`.

It takes some seconds once per machine; afterwards the machine code is read from its cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from openmint.kernels import (
    attend,
    dense_step,
    linear,
    logprobs,
    norm,
    paged,
    rotary,
    softmax,
    swiglu,
)
from openmint.kernels.team import team
from openmint.kernels.tile import IS_AVAILABLE


def compile_kernels(dtype: torch.dtype) -> None:
    """Have every kernel ready for tensors of this dtype."""
    x_TW = torch.ones(2, 8, dtype=dtype, requires_grad=True)
    ones_W, angles_TD = torch.ones(8, dtype=dtype), torch.ones(2, 4, dtype=dtype)
    normed_TW = norm.FusedRMSNorm.apply(x_TW, ones_W, 1e-5)
    turned_TR, rest = rotary.FusedRotary.apply(normed_TW, angles_TD, angles_TD, 1)
    swiglu.FusedSwiGLU.apply(torch.cat((turned_TR, rest), dim=1)).sum().backward()
    scores_SGQK, at_SL = torch.ones(1, 1, 2, 2, dtype=dtype), np.arange(2)[None]
    probs_SGQK = softmax.softmax_(scores_SGQK, at_SL, 2, 1.0)
    softmax.softmax_backward_(torch.ones_like(probs_SGQK), probs_SGQK, at_SL, 2, 1.0)
    cache_PTGD, pages_SP = torch.ones(1, 2, 1, 4, dtype=dtype), np.zeros((1, 1), np.int64)
    paged.write(cache_PTGD[0], np.arange(2), cache_PTGD)
    paged.gather(cache_PTGD, pages_SP)
    logits_RV, rows_R = torch.ones(2, 4, dtype=dtype), np.arange(2)
    slopes_RK = np.ones((2, 1), np.float32)
    norms_R = logprobs.norms(logits_RV)
    logprobs.draw(logits_RV, slopes_RK[:, 0], slopes_RK[:, 0])
    logprobs.gradient_(logits_RV, norms_R, rows_R, rows_R[:, None], slopes_RK)
    if IS_AVAILABLE and dtype == torch.bfloat16:
        _compile_tiles()


def _compile_tiles() -> None:
    x_TI = torch.ones(1, 16, dtype=torch.bfloat16)
    memory, panels_P3 = linear.pack([torch.ones(48, 16, dtype=torch.bfloat16)])
    nothing = np.empty(0, np.float32)
    weights = linear.Weights(memory.data_ptr(), panels_P3, nothing, nothing, 16)
    y_TO, _ = linear.forward(x_TI, 48, weights, linear.NO_ADAPTERS, 0)
    linear.backward(x_TI, np.array([16]), 48, weights, linear.NO_ADAPTERS, 0)
    h_TR = torch.ones(1, 8, dtype=torch.bfloat16)
    linear.add_outer(torch.zeros(8, 32), h_TR, 0, y_TO, 0, slice(0, 1))
    heads_SLHD = y_TO.view(1, 1, 3, 16)
    q_SLHD, k_SLGD, v_SLGD = (heads_SLHD[:, :, i : i + 1] for i in range(3))
    attend.forward(q_SLHD, k_SLGD, v_SLGD, np.zeros((1, 1), np.int64), 1)
    _compile_step(memory, panels_P3)


def _compile_step(memory: torch.Tensor, panels_P3: Any) -> None:
    """One token through a layer of width 16; its numbers are nobody's."""

    def room(*shape: int) -> Any:
        return np.zeros(shape, np.uint16)

    nothing_LO = np.empty((1, 0), np.float32)
    address_L = np.array([memory.data_ptr()])
    each = dense_step.Linear(address_L, panels_P3, nothing_LO, nothing_LO, 16)
    narrow = dense_step.Linear(address_L, panels_P3[:0], nothing_LO, nothing_LO, 16)
    norms_LD, heads_LD = room(1, 16), room(0, 1)
    stack = dense_step.Stack(
        *(each, narrow, narrow, narrow, norms_LD, norms_LD, heads_LD, heads_LD, room(16)),
        *(np.float32(1e-5), 1, 1, 1),
    )
    key_shape, value_shape = attend.block_shapes(1, 16)
    one_T = np.zeros(1, np.int64)
    tokens = dense_step.Tokens(one_T, one_T, one_T[None], room(1, 16), room(1, 16))
    adapters = dense_step.Adapters(0, 0, 0, 0, 0, 0)
    attended_TW, scale_T = room(1, 16), np.zeros(1, np.float32)
    rooms = dense_step.Rooms(
        *(room(1, 16), room(1, 16), scale_T, room(1, 48), room(1, 2, 16)),
        *(attended_TW.reshape(1, 1, 16), attended_TW, room(1, 32), room(1, 16), room(1, 0)),
    )
    caches = room(1, 1, *key_shape), room(1, 1, *value_shape)
    dense_step.step(team(dense_step.PHASES + 1), stack, *caches, tokens, adapters, rooms)


if __name__ == "__main__":
    for dtype in (torch.bfloat16, torch.float32):
        compile_kernels(dtype)
