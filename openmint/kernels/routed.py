"""The routed experts of one layer on AVX512-BF16 in one kernel, for a team of threads: rows are put
together by expert, multiplied, and summed by token. Forward only.

Each sum is that of `experts.py` and `layers/feed_forward.py`, to the bit. T tokens, D hidden size,
F feed-forward size, E experts of this rank, K experts of a token, N = T * K rows expert by expert,
R rows of adapters, S slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from openmint.kernels import swiglu
from openmint.kernels.compiler import njit
from openmint.kernels.dense import slots_at, weight_of
from openmint.kernels.jit import F32, address, int_at, kernel, load, piece, rounded
from openmint.kernels.linear import FEW, MANY, PART, panel, shrink
from openmint.kernels.team import share

PHASES = 6
ELSEWHERE = -1
"""The place of a row whose expert another rank has."""


class Chosen(NamedTuple):
    """Who goes to which expert; from `row_TK` on the kernel fills it in."""

    expert_TK: Any
    weight_TK: Any
    """float32: what each of a token's experts counts."""
    first: int
    """The first of this rank's experts."""
    row_TK: Any
    """Where each of a token's rows stands."""
    token_N: Any
    """Whose row it is."""
    slot_N: Any
    """Of its adapter; -1: none."""
    stop_E: Any
    """Where an expert's rows end."""
    busy_E: Any
    """Experts that have rows, of which there are:"""
    num_busy_1: Any


class Room(NamedTuple):
    """What the phases leave for each other."""

    x_ND: Any
    gate_up_NF: Any
    active_NF: Any
    y_ND: Any
    h_NR: Any


@kernel
def forward(
    team: Any, experts: Any, adapters: Any, chosen: Any, room: Any, x_TD: Any, y_TD: Any
) -> None:
    """Each token's sum of its experts' outputs. What each thread of the team runs."""
    panels = len(experts.gate_up.panels_P3), len(experts.down.panels_P3)
    share(team, 0, 1, _sort, (chosen, adapters.slot_T))
    busy = chosen.num_busy_1[0]
    share(team, 1, busy, _gather, (chosen, adapters, room, x_TD))
    gate_up = (chosen, adapters, 0, experts.gate_up, room.x_ND, room.h_NR, room.gate_up_NF)
    share(team, 2, busy * panels[0], _multiply, gate_up)
    share(team, 3, busy, _activate, (chosen, adapters, room))
    down = (chosen, adapters, 1, experts.down, room.active_NF, room.h_NR, room.y_ND)
    share(team, 4, busy * panels[1], _multiply, down)
    share(team, 5, (len(y_TD) + FEW - 1) // FEW, _combine, (chosen, room, y_TD))


@piece
def _sort(i: Any, chosen: Any, slot_T: Any) -> None:
    """Where each row stands: expert by expert, and token by token of each. One thread does it."""
    expert_TK, row_TK, stop_E = chosen.expert_TK, chosen.row_TK, chosen.stop_E
    num_tokens, num_chosen = expert_TK.shape
    stop_E[:] = 0
    for t in range(num_tokens):
        for k in range(num_chosen):
            e = expert_TK[t, k] - chosen.first
            if 0 <= e < len(stop_E):
                stop_E[e] += 1
    start, busy = 0, 0
    for e in range(len(stop_E)):
        count = stop_E[e]
        if count > 0:
            chosen.busy_E[busy] = e
            busy += 1
        stop_E[e] = start
        start += count
    for t in range(num_tokens):
        slot = -1 if slot_T == 0 else int_at(slot_T, t)
        for k in range(num_chosen):
            e, n = expert_TK[t, k] - chosen.first, ELSEWHERE
            if 0 <= e < len(stop_E):
                n = stop_E[e]
                stop_E[e] += 1
                chosen.token_N[n], chosen.slot_N[n] = t, slot
            row_TK[t, k] = n
    chosen.num_busy_1[0] = busy


@piece
def _expert(place: Any, chosen: Any) -> Any:
    """The `place`-th of the experts with rows, and its rows."""
    e = chosen.busy_E[place]
    return e, chosen.stop_E[e - 1] if e > 0 else 0, chosen.stop_E[e]


@piece
def _slots(adapters: Any, e: Any, side: Any, chosen: Any) -> Any:
    """The adapters of an expert's linear layer: `side` 0 is gate and up, 1 is down."""
    slot_N = 0 if adapters.slot_T == 0 else address(chosen.slot_N)
    return slots_at(adapters, 2 * e + side, 2 - side, slot_N)


@piece
def _shrink(x_NI: Any, first: Any, stop: Any, slots: Any, h_NR: Any) -> None:
    if slots.slot_T != 0:
        num_in = x_NI.shape[1]
        shrink(address(x_NI), 2 * num_in, num_in // 2, first, stop, slots, h_NR, -1, 0)


@piece
def _gather(i: Any, chosen: Any, adapters: Any, room: Any, x_TD: Any) -> None:
    """The rows of one expert."""
    e, first, stop = _expert(i, chosen)
    for n in range(first, stop):
        room.x_ND[n] = x_TD[chosen.token_N[n]]
    _shrink(room.x_ND, first, stop, _slots(adapters, e, 0, chosen), room.h_NR)


@piece
def _activate(i: Any, chosen: Any, adapters: Any, room: Any) -> None:
    e, first, stop = _expert(i, chosen)
    swiglu._forward(room.gate_up_NF[first:stop], room.active_NF[first:stop])
    _shrink(room.active_NF, first, stop, _slots(adapters, e, 1, chosen), room.h_NR)


@piece
def _multiply(
    i: Any, chosen: Any, adapters: Any, side: Any, linear: Any, x_NI: Any, h_NR: Any, y_NO: Any
) -> None:
    """One panel of y for the rows of one expert."""
    num_panels, x, x_stride = len(linear.panels_P3), address(x_NI), 2 * x_NI.shape[1]
    (e, first, stop), index = _expert(i // num_panels, chosen), i % num_panels
    weights, slots = weight_of(linear, e), _slots(adapters, e, side, chosen)
    part = weights.panels_P3[index, PART]
    for start in range(first, stop, MANY):
        end = min(start + MANY, stop)
        panel(x, x_stride, start, end, weights, index, part, slots, h_NR, y_NO, False)


# Without the liberties of a `piece`, which it would have from its caller if it didn't say so: torch
# rounds each product before it adds it.
@njit(fastmath=False, error_model="numpy", boundscheck=False)
def _combine(i: Any, chosen: Any, room: Any, y_TD: Any) -> None:
    """A few tokens' outputs, summed in the order of their choice."""
    sum_D = np.empty(y_TD.shape[1], np.float32)
    for t in range(i * FEW, min((i + 1) * FEW, len(y_TD))):
        sum_D[:] = F32(0.0)
        for k in range(chosen.row_TK.shape[1]):
            if chosen.row_TK[t, k] != ELSEWHERE:
                y_D, weight = room.y_ND[chosen.row_TK[t, k]], chosen.weight_TK[t, k]
                for d in range(len(sum_D)):
                    sum_D[d] += load(y_D[d]) * weight
        to_D = y_TD[t]
        for d in range(len(sum_D)):
            to_D[d] = rounded(sum_D[d], to_D)
