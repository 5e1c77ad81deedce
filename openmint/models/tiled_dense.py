"""The sampling forward of the dense family on AVX512-BF16: one kernel for the whole stack.

It reads the weights of the layers that training runs one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from openmint.kernels import dense, dense_step
from openmint.kernels import linear as tiled
from openmint.kernels.jit import F32, as_array
from openmint.kernels.team import team
from openmint.layers.adapters import AdapterBatch, adapters_of
from openmint.layers.attention import TiledPages
from openmint.layers.linear import LoraLinear, TiledLinear
from openmint.types import AnyArray

if TYPE_CHECKING:
    from openmint.models.dense import DenseModel

WIDEST_FUSION = 3
"""Targets of the widest fused layer: q, k and v."""


class TiledDense:
    """A dense model's frozen parts as the step kernel reads them."""

    def __init__(self, model: DenseModel) -> None:
        layers = model.layers
        self._linears = model.linears
        self._rotary = model.rotary
        self._num_heads = layers[0].attention.num_heads
        self._head_dim = layers[0].attention.head_dim
        self._stack = stack_of(model)
        self._weights = linears_of(self._linears, lambda linear: linear.serving)

    @staticmethod
    def suits(model: DenseModel) -> bool:
        """Whether all parts of the model can be computed in tiles."""
        linears = (*model.linears, model.head)
        are_tiled = all(isinstance(linear, TiledLinear) for linear in linears)
        return are_tiled and model.cache_shape.key_width % 16 == 0

    def forward(
        self, x_TD: Tensor, positions_T: Tensor, pages: TiledPages, adapters: AdapterBatch | None
    ) -> Tensor:
        """Final hidden states `[T, D]` of embeddings, which it uses up."""
        cos_TD, sin_TD = self._rotary.at(positions_T, x_TD.dtype)
        angles = as_array(cos_TD), as_array(sin_TD)
        seen = pages.sequence_T, pages.blocks_SB
        tokens = dense_step.Tokens(positions_T.numpy(), *seen, *angles)
        normed_TD = torch.empty_like(x_TD)
        hidden_width = WIDEST_FUSION * adapters.stack.widest if adapters else 0
        rooms = self._rooms(x_TD, normed_TD, hidden_width)
        batch = adapters_of(adapters, self._linears, "forth")
        cache, stack, weights = pages.cache, self._stack, self._weights
        counters = team(len(cache.keys_LB) * dense_step.PHASES + 1)
        keys_LB, values_LB = cache.keys_LB, cache.values_LB
        pages.together(
            lambda: dense_step.step(
                counters, weights, stack, keys_LB, values_LB, tokens, batch, rooms
            )
        )
        return normed_TD

    def _rooms(self, x_TD: Tensor, normed_TD: Tensor, hidden_width: int) -> dense_step.Rooms:
        qkv, out, gate_up, down = self._linears[:4]
        num_tokens, (num_q, num_kv), width = len(x_TD), self._num_heads, self._head_dim

        def room(*shape: int) -> AnyArray:
            return np.empty((num_tokens, *shape), np.uint16)

        attended_TW = room(out.num_in)
        return dense_step.Rooms(
            x_TD=as_array(x_TD),
            normed_TD=as_array(normed_TD),
            scale_T=np.empty(num_tokens, np.float32),
            qkv_TW=room(qkv.num_out),
            turned_THD=room(num_q + num_kv, width),
            attended_THD=attended_TW.reshape(num_tokens, num_q, width),
            attended_TW=attended_TW,
            gate_up_TF=room(gate_up.num_out),
            active_TF=room(down.num_in),
            h_TR=room(hidden_width),
        )


def stack_of(model: DenseModel) -> dense.Stack:
    """What of the model isn't a linear layer."""
    layers = model.layers
    attentions = [layer.attention for layer in layers]
    num_q, num_kv = attentions[0].num_heads
    return dense.Stack(
        input_norm_LD=_stacked([layer.input_norm_D for layer in layers]),
        mlp_norm_LD=_stacked([layer.feed_forward_norm_D for layer in layers]),
        q_norm_LD=_stacked([attention.q_norm_D for attention in attentions]),
        k_norm_LD=_stacked([attention.k_norm_D for attention in attentions]),
        final_norm_D=as_array(model.final_norm_D),
        eps=F32(model.eps),
        num_q=num_q,
        num_kv=num_kv,
        window=attentions[0].heads.window,
    )


def linears_of(
    linears: Sequence[LoraLinear], which: Callable[[TiledLinear], tiled.Weights]
) -> dense.Linears:
    """One kind of weights of all linear layers."""
    weights = [which(linear) for linear in linears if isinstance(linear, TiledLinear)]
    return dense.Linears(
        qkv=dense.of_all(weights[dense.QKV :: 4]),
        out=dense.of_all(weights[dense.OUT :: 4]),
        gate_up=dense.of_all(weights[dense.GATE_UP :: 4]),
        down=dense.of_all(weights[dense.DOWN :: 4]),
    )


def _stacked(rows_D: Sequence[Tensor | None]) -> AnyArray:
    """One row per layer; none at all where the layers have none."""
    present = [row_D for row_D in rows_D if row_D is not None]
    if not present:
        return np.empty((0, 1), np.uint16)
    return as_array(torch.stack(present)).copy()
