"""A sampling step of a dense model on AVX512-BF16: the whole stack in one kernel for a team.

The same sums, in the same order, as the training step (`dense_train.py`); tests hold the two
together to the bit. T tokens, D hidden size, W values of all heads, F feed-forward size, L layers,
B blocks, S sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from openmint.kernels import norm, rotary, swiglu
from openmint.kernels.attend import BLOCK, attend, place
from openmint.kernels.dense import norm_heads, slots_of, weights_of
from openmint.kernels.jit import F32, kernel, piece, rounded
from openmint.kernels.linear import FEW, followed, multiply, num_products, shrink_few
from openmint.kernels.team import share

PHASES = 10
"""Phases of a layer."""
QUERY_PIECES = 16
"""Pieces of work that attention is cut into: each costs two counters that threads pass around."""


class Tokens(NamedTuple):
    """Who the tokens are and what they see."""

    at_T: Any
    """Position in the sequence."""
    sequence_T: Any
    blocks_SB: Any
    cos_TD: Any
    sin_TD: Any


class Rooms(NamedTuple):
    """What the phases leave for each other. `x_TD` comes in as embeddings; the final
    hidden states go out in `normed_TD`."""

    x_TD: Any
    normed_TD: Any
    scale_T: Any
    qkv_TW: Any
    turned_THD: Any
    attended_THD: Any
    attended_TW: Any
    """The same memory."""
    gate_up_TF: Any
    active_TF: Any
    h_TR: Any


@kernel
def step(
    team: Any,
    linears: Any,
    stack: Any,
    keys_LB: Any,
    values_LB: Any,
    tokens: Any,
    adapters: Any,
    room: Any,
) -> None:
    """What each thread of the team runs."""
    x_TD, h_TR, few = room.x_TD, room.h_TR, (len(room.x_TD) + FEW - 1) // FEW
    queries, scratch = len(x_TD) * stack.num_kv, _scratch(stack, tokens)
    each = max(1, queries // QUERY_PIECES)
    query_pieces = (queries + each - 1) // each
    for layer in range(len(keys_LB)):
        phase, cache = layer * PHASES, (keys_LB[layer], values_LB[layer])
        qkv, out, gate_up, down = weights_of(linears, layer)
        to_qkv, to_out, to_gate_up, to_down = slots_of(adapters, layer)
        following = (layer + 1) % len(keys_LB)
        next_qkv, to_next_qkv = weights_of(linears, following)[0], slots_of(adapters, following)[0]
        to_qkv = followed(to_qkv, qkv, to_out, out)
        to_out = followed(to_out, out, to_gate_up, gate_up)
        to_gate_up = followed(to_gate_up, gate_up, to_down, down)
        to_down = followed(to_down, down, to_next_qkv, next_qkv)

        before = (room, stack.input_norm_LD[layer], stack.eps, to_qkv)
        share(team, phase, few, _norm_and_shrink, before)
        product = (room.normed_TD, qkv, to_qkv, h_TR, room.qkv_TW, False)
        share(team, phase + 1, num_products(x_TD, qkv), multiply, product)
        share(team, phase + 2, few, _place, (room, tokens, stack, layer, cache))
        share(team, phase + 3, query_pieces, _attend, (room, tokens, stack, cache, scratch, each))
        share(team, phase + 4, few, shrink_few, (room.attended_TW, to_out, h_TR))
        product = (room.attended_TW, out, to_out, h_TR, x_TD, True)
        share(team, phase + 5, num_products(x_TD, out), multiply, product)

        before = (room, stack.mlp_norm_LD[layer], stack.eps, to_gate_up)
        share(team, phase + 6, few, _norm_and_shrink, before)
        product = (room.normed_TD, gate_up, to_gate_up, h_TR, room.gate_up_TF, False)
        share(team, phase + 7, num_products(x_TD, gate_up), multiply, product)
        share(team, phase + 8, few, _activate, (room, to_down))
        product = (room.active_TF, down, to_down, h_TR, x_TD, True)
        share(team, phase + 9, num_products(x_TD, down), multiply, product)
    share(team, len(keys_LB) * PHASES, few, _norm, (room, stack.final_norm_D, stack.eps))


@piece
def _span(i: Any, num_rows: Any) -> Any:
    return i * FEW, min((i + 1) * FEW, num_rows)


@piece
def _norm(i: Any, room: Any, weight_D: Any, eps: Any) -> None:
    first, stop = _span(i, len(room.x_TD))
    normed_TD, scale_T = room.normed_TD[first:stop], room.scale_T[first:stop]
    norm._forward(room.x_TD[first:stop], weight_D, eps, normed_TD, scale_T)


@piece
def _norm_and_shrink(i: Any, room: Any, weight_D: Any, eps: Any, slots: Any) -> None:
    _norm(i, room, weight_D, eps)
    shrink_few(i, room.normed_TD, slots, room.h_TR)


@piece
def _place(i: Any, room: Any, tokens: Any, stack: Any, layer: Any, cache: Any) -> None:
    """Turn queries and keys by their positions, and put keys and values into the cache."""
    first, stop = _span(i, len(room.x_TD))
    num_q, num_kv, width = stack.num_q, stack.num_kv, tokens.cos_TD.shape[1]
    qkv_TW, turned_THD = room.qkv_TW[first:stop], room.turned_THD[first:stop]
    if len(stack.q_norm_LD):
        norm_heads(qkv_TW, qkv_TW, stack, layer, width)
    angles = tokens.cos_TD[first:stop], tokens.sin_TD[first:stop]
    turned_TW = turned_THD.reshape(stop - first, (num_q + num_kv) * width)
    rotary._rotate(qkv_TW, angles[0], angles[1], F32(1.0), turned_TW, num_q + num_kv)
    keys_B, values_B = cache
    for t in range(len(qkv_TW)):
        at = tokens.at_T[first + t]
        block = tokens.blocks_SB[tokens.sequence_T[first + t], at // BLOCK]
        v_GD = qkv_TW[t, (num_q + num_kv) * width :].reshape(num_kv, width)
        place(turned_THD[t, num_q:], v_GD, block * BLOCK + at % BLOCK, keys_B, values_B)


@piece
def _scratch(stack: Any, tokens: Any) -> Any:
    """A thread's own room for one query's scores, probabilities and output."""
    num_keys = tokens.blocks_SB.shape[1] * BLOCK
    shared, width = stack.num_q // stack.num_kv, tokens.cos_TD.shape[1]
    scores_IN = np.empty((shared, num_keys), np.float32)
    return scores_IN, np.empty((shared, num_keys), np.uint16), np.empty((shared, width), np.float32)


@piece
def _attend(
    i: Any, room: Any, tokens: Any, stack: Any, cache: Any, scratch: Any, each: Any
) -> None:
    """`each` pairs of a token and a key head."""
    shared = stack.num_q // stack.num_kv
    keys_B, values_B = cache
    scores_IN, probs_IN, out_ID = scratch
    for pair in range(i * each, min((i + 1) * each, len(room.x_TD) * stack.num_kv)):
        t, g = pair // stack.num_kv, pair % stack.num_kv
        at, blocks_B = tokens.at_T[t], tokens.blocks_SB[tokens.sequence_T[t]]
        q_ID = room.turned_THD[t, g * shared : (g + 1) * shared]
        attend(q_ID, at, stack.window, keys_B, values_B, blocks_B, g, scores_IN, probs_IN, out_ID)
        for j in range(shared):
            to_D, out_D = room.attended_THD[t, g * shared + j], out_ID[j]
            for d in range(len(to_D)):
                to_D[d] = rounded(out_D[d], to_D)


@piece
def _activate(i: Any, room: Any, slots: Any) -> None:
    first, stop = _span(i, len(room.x_TD))
    swiglu._forward(room.gate_up_TF[first:stop], room.active_TF[first:stop])
    shrink_few(i, room.active_TF, slots, room.h_TR)
