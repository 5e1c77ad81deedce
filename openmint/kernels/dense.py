"""What the kernels of a dense model's sampling and training steps share: its frozen parts layer by
layer, and the adapters of a batch. L layers, N linear layers (four of each layer), S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from openmint.kernels import norm
from openmint.kernels.jit import piece
from openmint.kernels.linear import Slots, Weights

QKV, OUT, GATE_UP, DOWN = range(4)
FIRST_TARGET = (0, 3, 4, 6)
"""Of each linear layer: q, k, v; o; gate, up; down."""
TARGETS = 7


class Linear(NamedTuple):
    """One linear layer of all layers."""

    address_L: Any
    panels_P3: Any
    bias_LO: Any
    scale_LO: Any
    num_in: int


def of_all(weights: Sequence[Weights]) -> Linear:
    """One linear layer of all layers, which are alike."""
    addresses_L = np.array([each.address for each in weights])
    biases_LO = np.stack([each.bias_O for each in weights])
    scales_LO = np.stack([each.scale_O for each in weights])
    return Linear(addresses_L, weights[0].panels_P3, biases_LO, scales_LO, weights[0].num_in)


class Linears(NamedTuple):
    """The linear layers of all layers, in one direction."""

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear


class Stack(NamedTuple):
    """The other frozen parts of a dense model."""

    input_norm_LD: Any
    mlp_norm_LD: Any
    q_norm_LD: Any
    """Empty where the model doesn't normalise queries and keys."""
    k_norm_LD: Any
    final_norm_D: Any
    eps: Any
    num_q: int
    num_kv: int
    window: int


class Adapters(NamedTuple):
    """The adapters of a batch for every linear layer: as `linear.Slots`, with a leading N."""

    slot_T: int
    shrink_NS: int
    expand_NS: int
    rank_S: int
    scale_S: int
    num_slots: int


@piece
def weights_of(linears: Any, layer: Any) -> Any:
    return (
        weight_of(linears.qkv, layer),
        weight_of(linears.out, layer),
        weight_of(linears.gate_up, layer),
        weight_of(linears.down, layer),
    )


@piece
def weight_of(linear: Any, layer: Any) -> Any:
    bias_O, scale_O = linear.bias_LO[layer], linear.scale_LO[layer]
    return Weights(linear.address_L[layer], linear.panels_P3, bias_O, scale_O, linear.num_in)


@piece
def slots_of(adapters: Any, layer: Any) -> Any:
    return (
        slots_at(adapters, 4 * layer + QKV, 3, adapters.slot_T),
        slots_at(adapters, 4 * layer + OUT, 1, adapters.slot_T),
        slots_at(adapters, 4 * layer + GATE_UP, 2, adapters.slot_T),
        slots_at(adapters, 4 * layer + DOWN, 1, adapters.slot_T),
    )


@piece
def slots_at(adapters: Any, n: Any, num_parts: Any, slot_T: Any) -> Any:
    """The adapters of the `n`-th linear layer; `slot_T` is where the slots of its rows are, 0 if no
    row has one."""
    a, skipped = adapters, 8 * n * adapters.num_slots
    shrink_S, expand_S = a.shrink_NS + skipped, a.expand_NS + skipped
    return Slots(slot_T, shrink_S, expand_S, a.rank_S, a.scale_S, num_parts, 0, 0, 0)


@piece
def norm_heads(from_TW: Any, to_TW: Any, stack: Any, layer: Any, width: Any) -> None:
    """Queries and keys normalised head by head; both may be the same memory."""
    num_q, num_kv = stack.num_q, stack.num_kv
    middle, stop, scale_H = num_q * width, (num_q + num_kv) * width, np.empty(num_q, np.float32)
    for t in range(len(from_TW)):
        q_HD = from_TW[t, :middle].reshape(num_q, width)
        k_GD = from_TW[t, middle:stop].reshape(num_kv, width)
        out_HD = to_TW[t, :middle].reshape(num_q, width)
        norm._forward(q_HD, stack.q_norm_LD[layer], stack.eps, out_HD, scale_H)
        out_GD = to_TW[t, middle:stop].reshape(num_kv, width)
        norm._forward(k_GD, stack.k_norm_LD[layer], stack.eps, out_GD, scale_H)


@piece
def norm_heads_back(
    grad_TW: Any, heads_TW: Any, to_TW: Any, stack: Any, layer: Any, width: Any
) -> None:
    """The gradient of what `norm_heads` got, of queries and keys."""
    middle, stop = stack.num_q * width, (stack.num_q + stack.num_kv) * width
    spans = ((0, middle, stack.q_norm_LD[layer]), (middle, stop, stack.k_norm_LD[layer]))
    for t in range(len(grad_TW)):
        for start, end, weight_D in spans:
            count = (end - start) // width
            scale_H, normed_HD = np.empty(count, np.float32), np.empty((count, width), np.uint16)
            x_HD = heads_TW[t, start:end].reshape(count, width)
            norm._forward(x_HD, weight_D, stack.eps, normed_HD, scale_H)
            grad_HD = grad_TW[t, start:end].reshape(count, width)
            out_HD = to_TW[t, start:end].reshape(count, width)
            norm._backward(grad_HD, x_HD, weight_D, scale_H, out_HD)
