"""A training step of a dense model on AVX512-BF16: the whole stack forth, and the whole stack back.

One thread runs it on whole sequences; it holds no lock and waits for nobody. T tokens, D hidden
size, W values of all heads, F feed-forward size, R rows of adapters, L layers, S slots, M targets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from openmint.kernels import causal, norm, rotary, swiglu
from openmint.kernels.dense import (
    DOWN,
    FIRST_TARGET,
    GATE_UP,
    OUT,
    QKV,
    TARGETS,
    norm_heads,
    norm_heads_back,
    slots_of,
    weights_of,
)
from openmint.kernels.jit import F32, kernel, piece
from openmint.kernels.linear import add_outer, product, product_back, shrink_back
from openmint.kernels.tile import STRIP


class Tokens(NamedTuple):
    starts_S: Any
    """Where each sequence begins, and the last one ends."""
    cos_TD: Any
    sin_TD: Any


class Tape(NamedTuple):
    """What the way back reads. Where nothing goes back each array has room for one layer (x for
    two), which all layers share."""

    x_LTD: Any
    """What each layer gets, and what the last one leaves."""
    middle_LTD: Any
    """Between attention and feed-forward."""
    normed_LTD: Any
    """Two for each layer."""
    scale_LT: Any
    """Two for each layer, and one of the last norm."""
    heads_LTW: Any
    """Before their norm; one room for all layers that don't normalise heads."""
    turned_LTW: Any
    attended_LTV: Any
    top_LHT: Any
    share_LHT: Any
    gate_up_LTF: Any
    h_LTR: Any
    """Of each linear layer."""


class Room(NamedTuple):
    """Where gradients stand for the length of a layer."""

    active_TF: Any
    """Forth, too."""
    grad_active_TF: Any
    grad_gate_up_TF: Any
    grad_normed_TD: Any
    grad_attended_TV: Any
    grad_turned_TW: Any
    grad_heads_TW: Any
    grad_raw_TW: Any
    """Empty where heads are not normalised."""
    grad_h_TR: Any


class Sink(NamedTuple):
    """Where the gradients of A and B go: addresses of float32 arrays, 0 where a slot has none."""

    a_MS: Any
    b_MS: Any
    rank_S: Any
    runs_N3: Any
    """Slot, first token and last but one of tokens that stand together."""
    ends_4P: Any
    """The columns where the parts of each linear layer end."""


@kernel
def forward(
    linears: Any, stack: Any, adapters: Any, tokens: Any, tape: Any, room: Any, normed_TD: Any
) -> None:
    """Final hidden states of the embeddings `tape.x_LTD[0]`."""
    heads = _heads(stack, tokens)
    num_layers = len(stack.input_norm_LD)
    for layer in range(num_layers):
        qkv, out, gate_up, down = weights_of(linears, layer)
        to_qkv, to_out, to_gate_up, to_down = slots_of(adapters, layer)
        x_TD, middle_TD = _of(tape.x_LTD, layer), _of(tape.middle_LTD, layer)
        heads_TW, turned_TW = _of(tape.heads_LTW, layer), _of(tape.turned_LTW, layer)
        attended_TV, gate_up_TF = _of(tape.attended_LTV, layer), _of(tape.gate_up_LTF, layer)
        h_LTR, kept = tape.h_LTR, _kept(tape, layer)

        given_TD, scale_T = _of(tape.normed_LTD, 2 * layer), _of(tape.scale_LT, 2 * layer)
        norm._forward(x_TD, stack.input_norm_LD[layer], stack.eps, given_TD, scale_T)
        product(given_TD, qkv, to_qkv, _of(h_LTR, 4 * layer + QKV), heads_TW, False)
        _turn(heads_TW, tokens, stack, layer, room.grad_heads_TW, turned_TW)
        for s in range(len(tokens.starts_S) - 1):
            first, stop = tokens.starts_S[s], tokens.starts_S[s + 1]
            causal.forward(turned_TW, first, stop, heads, kept, attended_TV)
        middle_TD[:] = x_TD
        product(attended_TV, out, to_out, _of(h_LTR, 4 * layer + OUT), middle_TD, True)

        given_TD, scale_T = _of(tape.normed_LTD, 2 * layer + 1), _of(tape.scale_LT, 2 * layer + 1)
        norm._forward(middle_TD, stack.mlp_norm_LD[layer], stack.eps, given_TD, scale_T)
        product(given_TD, gate_up, to_gate_up, _of(h_LTR, 4 * layer + GATE_UP), gate_up_TF, False)
        swiglu._forward(gate_up_TF, room.active_TF)
        next_TD = _of(tape.x_LTD, layer + 1)
        next_TD[:] = middle_TD
        product(room.active_TF, down, to_down, _of(h_LTR, 4 * layer + DOWN), next_TD, True)
    last_TD, scale_T = _of(tape.x_LTD, num_layers), _of(tape.scale_LT, 2 * num_layers)
    norm._forward(last_TD, stack.final_norm_D, stack.eps, normed_TD, scale_T)


@kernel
def backward(
    linears: Any,
    stack: Any,
    adapters: Any,
    sink: Any,
    tokens: Any,
    tape: Any,
    room: Any,
    grad_normed_TD: Any,
    grad_TD: Any,
) -> None:
    """Adds the adapters' gradients to the sink. `linears` and `adapters` are those of the way back;
    `grad_TD` comes in as zeros."""
    heads, num_layers = _heads(stack, tokens), len(stack.input_norm_LD)
    last_TD, scale_T = tape.x_LTD[num_layers], tape.scale_LT[2 * num_layers]
    norm.add_backward(grad_normed_TD, last_TD, stack.final_norm_D, scale_T, grad_TD)
    for layer in range(num_layers - 1, -1, -1):
        qkv, out, gate_up, down = weights_of(linears, layer)
        to_qkv, to_out, to_gate_up, to_down = slots_of(adapters, layer)
        ends_4P, given_TD, scale_T = sink.ends_4P, tape.normed_LTD, tape.scale_LT

        grads = (grad_TD, room.grad_h_TR)
        product_back(grad_TD, ends_4P[DOWN, :1], down, to_down, room.grad_h_TR, room.grad_active_TF)
        swiglu._backward(
            room.grad_active_TF, tape.gate_up_LTF[layer], room.grad_gate_up_TF, room.active_TF
        )
        _add_gradients(sink, layer, DOWN, room.active_TF, tape.h_LTR, grads)
        grads = (room.grad_gate_up_TF, room.grad_h_TR)
        back = (ends_4P[GATE_UP, :2], gate_up, to_gate_up, room.grad_h_TR, room.grad_normed_TD)
        product_back(room.grad_gate_up_TF, *back)
        _add_gradients(sink, layer, GATE_UP, given_TD[2 * layer + 1], tape.h_LTR, grads)
        before = (tape.middle_LTD[layer], stack.mlp_norm_LD[layer], scale_T[2 * layer + 1])
        norm.add_backward(room.grad_normed_TD, *before, grad_TD)

        grads = (grad_TD, room.grad_h_TR)
        product_back(grad_TD, ends_4P[OUT, :1], out, to_out, room.grad_h_TR, room.grad_attended_TV)
        _add_gradients(sink, layer, OUT, tape.attended_LTV[layer], tape.h_LTR, grads)
        for s in range(len(tokens.starts_S) - 1):
            first, stop = tokens.starts_S[s], tokens.starts_S[s + 1]
            turned_TW, attended_TV = tape.turned_LTW[layer], tape.attended_LTV[layer]
            span = (first, stop, heads, _kept(tape, layer), room.grad_turned_TW)
            causal.backward(turned_TW, attended_TV, room.grad_attended_TV, *span)
        _turn_back(tape, tokens, stack, layer, room)
        grad_heads_TW = room.grad_raw_TW if len(stack.q_norm_LD) else room.grad_heads_TW
        grads = (grad_heads_TW, room.grad_h_TR)
        if layer == 0:  # nothing below is trained
            shrink_back(grad_heads_TW, ends_4P[QKV], to_qkv, room.grad_h_TR)
        else:
            back = (ends_4P[QKV], qkv, to_qkv, room.grad_h_TR, room.grad_normed_TD)
            product_back(grad_heads_TW, *back)
            before = (tape.x_LTD[layer], stack.input_norm_LD[layer], scale_T[2 * layer])
            norm.add_backward(room.grad_normed_TD, *before, grad_TD)
        _add_gradients(sink, layer, QKV, given_TD[2 * layer], tape.h_LTR, grads)


@piece
def _heads(stack: Any, tokens: Any) -> Any:
    return causal.Heads(stack.num_q, stack.num_kv, tokens.cos_TD.shape[1], stack.window)


@piece
def _of(rooms_L: Any, index: Any) -> Any:
    """The room of one layer; of the one that all share, where there is but one."""
    return rooms_L[index % len(rooms_L)]


@piece
def _kept(tape: Any, layer: Any) -> Any:
    return causal.Softened(_of(tape.top_LHT, layer), _of(tape.share_LHT, layer))


@piece
def _turn(
    heads_TW: Any, tokens: Any, stack: Any, layer: Any, normed_TW: Any, turned_TW: Any
) -> None:
    """Queries and keys normalised, where the model does so, and turned by their positions; values
    as they are."""
    rotated = stack.num_q + stack.num_kv
    if len(stack.q_norm_LD):
        norm_heads(heads_TW, normed_TW, stack, layer, tokens.cos_TD.shape[1])
        rotary._rotate(normed_TW, tokens.cos_TD, tokens.sin_TD, F32(1.0), turned_TW, rotated)
    else:
        rotary._rotate(heads_TW, tokens.cos_TD, tokens.sin_TD, F32(1.0), turned_TW, rotated)
    values = rotated * tokens.cos_TD.shape[1]
    turned_TW[:, values:] = heads_TW[:, values:]


@piece
def _turn_back(tape: Any, tokens: Any, stack: Any, layer: Any, room: Any) -> None:
    """The gradient of what `_turn` got."""
    rotated, width = stack.num_q + stack.num_kv, tokens.cos_TD.shape[1]
    grad_TW, to_TW, values = room.grad_turned_TW, room.grad_heads_TW, rotated * width
    rotary._rotate(grad_TW, tokens.cos_TD, tokens.sin_TD, F32(-1.0), to_TW, rotated)
    to_TW[:, values:] = grad_TW[:, values:]
    if len(stack.q_norm_LD):
        raw_TW = room.grad_raw_TW
        raw_TW[:, values:] = to_TW[:, values:]
        norm_heads_back(to_TW, tape.heads_LTW[layer], raw_TW, stack, layer, width)


@piece
def _add_gradients(sink: Any, layer: Any, which: Any, x_TI: Any, h_LTR: Any, grads: Any) -> None:
    """`grads` are those of y and of the adapters' hidden values of one linear layer."""
    grad_TO, grad_h_TR = grads
    h_TR, start = h_LTR[4 * layer + which], 0
    num_parts = 3 if which == QKV else 2 if which == GATE_UP else 1
    for part in range(num_parts):
        target, end = TARGETS * layer + FIRST_TARGET[which] + part, sink.ends_4P[which, part]
        for n in range(len(sink.runs_N3)):
            slot, first, stop = sink.runs_N3[n, 0], sink.runs_N3[n, 1], sink.runs_N3[n, 2]
            rank, to_a, to_b = sink.rank_S[slot], sink.a_MS[target, slot], sink.b_MS[target, slot]
            if to_a != 0:
                row, num_in = part * ((rank + STRIP - 1) // STRIP * STRIP), x_TI.shape[1]
                add_outer(grad_h_TR, row, rank, x_TI, 0, num_in, first, stop, to_a)
                add_outer(h_TR, row, rank, grad_TO, start, end - start, first, stop, to_b)
        start = end
