"""The routed experts of one layer on AVX512-BF16: all rows of a batch forth, and all back.

Rows stand expert by expert. One thread runs it; it holds no lock and waits for nobody. N rows, E
experts, D hidden size, F feed-forward size, R rows of adapters, S slots, M targets: gate, up and
down of each expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from openmint.kernels import swiglu
from openmint.kernels.dense import Linear, slots_at, weight_of
from openmint.kernels.jit import kernel, piece
from openmint.kernels.linear import add_outer, product, product_back
from openmint.kernels.tile import STRIP

TARGETS = 3


class Experts(NamedTuple):
    """The two linear layers of all experts, in one direction."""

    gate_up: Linear
    down: Linear


class Rows(NamedTuple):
    """Whose they are."""

    stop_E: Any
    """Where each expert's end."""
    slot_N: Any
    """Of their adapters; -1: none."""


class Tape(NamedTuple):
    """What the way back reads."""

    x_ND: Any
    gate_up_NF: Any
    h_2NR: Any
    """Of either linear layer."""


class Room(NamedTuple):
    """Where gradients stand in between."""

    active_NF: Any
    """Forth, too."""
    grad_active_NF: Any
    grad_gate_up_NF: Any
    grad_h_NR: Any


class Sink(NamedTuple):
    """Where the gradients of A and B go: addresses of float32 arrays, 0 where a slot has none."""

    a_MS: Any
    b_MS: Any
    rank_S: Any


@kernel
def forward(experts: Any, adapters: Any, rows: Any, tape: Any, active_NF: Any, y_ND: Any) -> None:
    """`down(silu(gate) * up)` of each row's expert."""
    first, h_2NR = 0, tape.h_2NR
    for e in range(len(rows.stop_E)):
        stop = rows.stop_E[e]
        if stop > first:
            x_RD, gate_up_RF = tape.x_ND[first:stop], tape.gate_up_NF[first:stop]
            active_RF, to_gate_up = active_NF[first:stop], _slots(adapters, 2 * e, 2, first)
            weights = weight_of(experts.gate_up, e)
            product(x_RD, weights, to_gate_up, h_2NR[0, first:stop], gate_up_RF, False)
            swiglu._forward(gate_up_RF, active_RF)
            weights, to_down = weight_of(experts.down, e), _slots(adapters, 2 * e + 1, 1, first)
            product(active_RF, weights, to_down, h_2NR[1, first:stop], y_ND[first:stop], False)
        first = stop


@kernel
def backward(
    experts: Any,
    adapters: Any,
    rows: Any,
    sink: Any,
    ends: Any,
    tape: Any,
    room: Any,
    grad_y_ND: Any,
    grad_x_ND: Any,
) -> None:
    """dL/dx; adds the adapters' gradients to the sink. `experts` and `adapters` are those of the
    way back; `ends` are the columns where the parts of gate_up end, and of down."""
    first, h_2NR = 0, tape.h_2NR
    for e in range(len(rows.stop_E)):
        stop = rows.stop_E[e]
        if stop > first:
            to_gate_up = _slots(adapters, 2 * e, 2, first)
            to_down = _slots(adapters, 2 * e + 1, 1, first)
            grad_h_RR, grad_active_RF = room.grad_h_NR[first:stop], room.grad_active_NF[first:stop]
            grad_gate_up_RF = room.grad_gate_up_NF[first:stop]
            weights = weight_of(experts.down, e)
            grad_y_RD = grad_y_ND[first:stop]
            product_back(grad_y_RD, ends[1], weights, to_down, grad_h_RR, grad_active_RF)
            gate_up_RF, active_RF = tape.gate_up_NF[first:stop], room.active_NF[first:stop]
            swiglu._backward(grad_active_RF, gate_up_RF, grad_gate_up_RF, active_RF)
            span, found = (first, stop, rows.slot_N, sink.rank_S), (grad_y_ND, room.grad_h_NR)
            _add_gradients(sink, TARGETS * e + 2, ends[1], room.active_NF, h_2NR[1], found, span)
            weights = weight_of(experts.gate_up, e)
            grad_x_RD = grad_x_ND[first:stop]
            product_back(grad_gate_up_RF, ends[0], weights, to_gate_up, grad_h_RR, grad_x_RD)
            found = (room.grad_gate_up_NF, room.grad_h_NR)
            _add_gradients(sink, TARGETS * e, ends[0], tape.x_ND, h_2NR[0], found, span)
        first = stop


@piece
def _slots(adapters: Any, n: Any, num_parts: Any, first: Any) -> Any:
    """The adapters of one linear layer, for rows from `first` on."""
    slot_T = adapters.slot_T
    return slots_at(adapters, n, num_parts, slot_T if slot_T == 0 else slot_T + 8 * first)


@piece
def _add_gradients(
    sink: Any, target: Any, ends_P: Any, x_NI: Any, h_NR: Any, found: Any, span: Any
) -> None:
    """Of one linear layer of one expert. `found` are the gradients of y and of the adapters'
    hidden values; rows of one adapter stand together."""
    grad_NO, grad_h_NR = found
    first, stop, slot_N, rank_S = span
    start = 0
    for part in range(len(ends_P)):
        n = first
        while n < stop:
            slot, end = slot_N[n], n + 1
            while end < stop and slot_N[end] == slot:
                end += 1
            if slot >= 0 and sink.a_MS[target + part, slot] != 0:
                to_a, to_b = sink.a_MS[target + part, slot], sink.b_MS[target + part, slot]
                rank = rank_S[slot]
                row, width = part * ((rank + STRIP - 1) // STRIP * STRIP), ends_P[part] - start
                add_outer(grad_h_NR, row, rank, x_NI, 0, x_NI.shape[1], n, end, to_a)
                add_outer(h_NR, row, rank, grad_NO, start, width, n, end, to_b)
            n = end
        start = ends_P[part]
