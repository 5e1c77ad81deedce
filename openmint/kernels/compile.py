"""Compile every kernel before it is needed: `python -m openmint.kernels.compile`.

It takes about a minute once per machine; afterwards the machine code is read from its cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from openmint.kernels import (
    adamw,
    adapter_tiles,
    attend,
    dense,
    dense_step,
    dense_train,
    experts,
    linear,
    logprobs,
    norm,
    paged,
    rotary,
    routed,
    softmax,
    swiglu,
)
from openmint.kernels.jit import as_array
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
    ones_P = torch.ones(2)
    adamw.update((ones_P, ones_P, ones_P), ones_P, adamw.Rates(*[0.5] * 8))
    if IS_AVAILABLE and dtype == torch.bfloat16:
        _compile_tiles()


def _compile_tiles() -> None:
    x_TI = torch.ones(1, 16, dtype=torch.bfloat16)
    memory, panels_P3 = linear.pack([torch.ones(48, 16, dtype=torch.bfloat16)])
    nothing = np.empty(0, np.float32)
    weights = linear.Weights(memory.data_ptr(), panels_P3, nothing, nothing, 16)
    y_TO = torch.empty(1, 48, dtype=torch.bfloat16)
    linear.forward(x_TI, y_TO, weights, linear.NO_ADAPTERS, 0)
    linear.backward(x_TI, np.array([16]), 48, weights, linear.NO_ADAPTERS, 0)
    h_TR = torch.ones(1, 8, dtype=torch.bfloat16)
    linear.add_outer_(
        np.zeros((8, 32), np.float32), as_array(h_TR), 0, as_array(y_TO), 0, slice(0, 1)
    )
    adapter = adapter_tiles.plan(1, [[adapter_tiles.Target(0, 16, 16, 16)]], "forth")
    adapter_tiles.lay_out(torch.ones(32, dtype=torch.bfloat16), adapter)
    _compile_steps(memory, panels_P3)


def _compile_steps(memory: torch.Tensor, panels_P3: Any) -> None:
    """No token through a layer of width 16."""

    def room(*shape: int) -> Any:
        return np.zeros(shape, np.uint16)

    def singles(*shape: int) -> Any:
        return np.zeros(shape, np.float32)

    nothing_LO, no_T = singles(1, 0), np.zeros(0, np.int64)
    each = dense.Linear(np.array([memory.data_ptr()]), panels_P3, nothing_LO, nothing_LO, 16)
    linears = dense.Linears(each, each, each, each)
    norms_LD, heads_LD, rows_TD = room(1, 16), room(0, 1), room(0, 16)
    norms = (norms_LD, norms_LD, heads_LD, heads_LD, room(16))
    stack = dense.Stack(*norms, np.float32(1e-5), 1, 1, 1)
    adapters = dense.Adapters(0, 0, 0, 0, 0, 0)

    tokens = dense_step.Tokens(no_T, no_T, no_T[None], rows_TD, rows_TD)
    rooms = dense_step.Rooms(
        *(rows_TD, rows_TD, singles(0), room(0, 48), room(0, 2, 16), room(0, 1, 16), rows_TD),
        *(room(0, 32), rows_TD, room(0, 0)),
    )
    caches = (room(1, 1, *shape) for shape in attend.block_shapes(1, 16))
    dense_step.step(team(dense_step.PHASES + 1), linears, stack, *caches, tokens, adapters, rooms)

    whole = dense_train.Tokens(np.zeros(1, np.int64), rows_TD, rows_TD)
    layer_TD, heads_TW = room(2, 0, 16), room(1, 0, 48)
    tape = dense_train.Tape(
        *(layer_TD, layer_TD, layer_TD, singles(3, 0), heads_TW, heads_TW, layer_TD),
        *(singles(1, 1, 0), singles(1, 1, 0), room(1, 0, 32), room(4, 0, 0)),
    )
    back = dense_train.Room(
        *(rows_TD, rows_TD, room(0, 32), rows_TD, rows_TD),
        *(room(0, 48), room(0, 48), room(0, 48), room(0, 0)),
    )
    dense_train.forward(linears, stack, adapters, whole, tape, back, rows_TD)
    none_MS = np.zeros((0, 0), np.int64)
    sink = dense_train.Sink(none_MS, none_MS, no_T, none_MS, np.zeros((4, 3), np.int64))
    dense_train.backward(linears, stack, adapters, sink, whole, tape, back, rows_TD, rows_TD)

    both = experts.Experts(each, each)
    rows = experts.Rows(np.zeros(1, np.int64), no_T)
    kept = experts.Tape(rows_TD, room(0, 32), room(2, 0, 0))
    experts.forward(both, adapters, rows, kept, rows_TD, rows_TD)
    no_TK, one_E, weight_TK = np.zeros((0, 1), np.int64), np.zeros(1, np.int64), singles(0, 1)
    chosen = routed.Chosen(no_TK, weight_TK, 0, no_TK, no_T, no_T, one_E, one_E, one_E)
    apart = routed.Room(rows_TD, room(0, 32), rows_TD, rows_TD, room(0, 0))
    routed.forward(team(routed.PHASES), both, adapters, chosen, apart, rows_TD, rows_TD)
    between = experts.Room(rows_TD, rows_TD, room(0, 32), room(0, 0))
    to = experts.Sink(none_MS, none_MS, no_T)
    ends = np.array([16, 32]), np.array([16])
    experts.backward(both, adapters, rows, to, ends, kept, between, rows_TD, rows_TD)


if __name__ == "__main__":
    for dtype in (torch.bfloat16, torch.float32):
        compile_kernels(dtype)
