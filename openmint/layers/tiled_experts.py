"""The routed experts of one layer: in training with the kernels of `kernels/experts.py`, one call
forth and one back, where a loop over experts would be hundreds that wait for each other's Python;
in sampling with that of `kernels/routed.py`, which a team of threads shares.

Shapes: T tokens, K experts of a token, N rows expert by expert, E experts of this rank, D hidden
size, F feed-forward size, R rows of adapters, S slots, M targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmint.kernels import dense, experts, routed
from openmint.kernels.jit import as_array
from openmint.kernels.team import Together, team
from openmint.layers.adapters import AdapterBatch, adapters_of
from openmint.layers.linear import LoraLinear, TiledLinear
from openmint.types import AnyArray, IntArray


class TiledExperts:
    """Gated feed-forward experts that are alike."""

    def __init__(self, gate_ups: Sequence[TiledLinear], downs: Sequence[TiledLinear]) -> None:
        self._linears: list[LoraLinear] = [
            each for pair in zip(gate_ups, downs, strict=True) for each in pair
        ]
        self._forth = experts.Experts(
            dense.of_all([each.forth for each in gate_ups]),
            dense.of_all([each.forth for each in downs]),
        )
        self._back = experts.Experts(
            dense.of_all([each.back for each in gate_ups]),
            dense.of_all([each.back for each in downs]),
        )
        self._paths = tuple(part.path for each in self._linears for part in each.parts)
        stops = [part.stop for part in gate_ups[0].parts]
        self._ends = np.array(stops), np.array([downs[0].num_out])
        self._inner = downs[0].num_in

    def forward(
        self,
        x_ND: Tensor,
        counts_E: Sequence[int],
        token_N: Tensor,
        adapters: AdapterBatch | None,
    ) -> Tensor:
        """Each row through its expert, with a way back. `token_N` says which token of the batch a
        row is."""
        rows = experts.Rows(np.cumsum(counts_E), _slots(adapters, token_N))
        y_ND: Tensor = _Trained.apply(x_ND, self, rows, adapters)
        return y_ND

    def serve(
        self,
        x_TD: Tensor,
        chosen: tuple[Tensor, Tensor, int],
        adapters: AdapterBatch | None,
        together: Together,
    ) -> Tensor:
        """Each token's sum of its experts, without a way back. `chosen` are the experts `[T, K]`,
        what each counts, and the first of all experts that is this rank's; others give nothing."""
        expert_TK, weight_TK, first = chosen
        num_rows, widest = expert_TK.numel(), adapters.stack.widest if adapters else 0
        num_experts, y_TD = len(self._linears) // 2, torch.empty_like(x_TD)
        to = routed.Chosen(
            as_array(expert_TK.contiguous()),
            as_array(weight_TK.float().contiguous()),
            first,
            row_TK=_places(*expert_TK.shape),
            token_N=_places(num_rows),
            slot_N=_places(num_rows),
            stop_E=_places(num_experts),
            busy_E=_places(num_experts),
            num_busy_1=_places(1),
        )
        room = routed.Room(
            _room(num_rows, x_TD.shape[1]),
            _room(num_rows, 2 * self._inner),
            _room(num_rows, self._inner),
            _room(num_rows, x_TD.shape[1]),
            _room(num_rows, 2 * widest),
        )
        given = adapters_of(adapters, self._linears, "forth")
        counters, x, y = team(routed.PHASES), as_array(x_TD.contiguous()), as_array(y_TD)
        together(lambda: routed.forward(counters, self._forth, given, to, room, x, y))
        return y_TD

    def run(
        self, x_ND: Tensor, rows: experts.Rows, adapters: AdapterBatch | None
    ) -> tuple[Tensor, experts.Tape]:
        count, widest = len(x_ND), adapters.stack.widest if adapters else 0
        tape = experts.Tape(
            as_array(x_ND.contiguous()),
            _room(count, 2 * self._inner),
            np.empty((2, count, 2 * widest), np.uint16),
        )
        y_ND = torch.empty_like(x_ND)
        given = adapters_of(adapters, self._linears, "forth", rows.slot_N)
        active_NF = _room(count, self._inner)
        experts.forward(self._forth, given, rows, tape, active_NF, as_array(y_ND))
        return y_ND, tape

    def run_back(
        self,
        grad_y_ND: Tensor,
        rows: experts.Rows,
        tape: experts.Tape,
        adapters: AdapterBatch | None,
    ) -> Tensor:
        """dL/dx; the adapters' gradients go to the batch's sink."""
        count, inner = len(grad_y_ND), self._inner
        rooms = (_room(count, inner), _room(count, inner), _room(count, 2 * inner))
        room = experts.Room(*rooms, np.empty_like(tape.h_2NR[0]))
        grad_x_ND = torch.empty_like(grad_y_ND)
        given = adapters_of(adapters, self._linears, "back", rows.slot_N)
        arrays = as_array(grad_y_ND.contiguous()), as_array(grad_x_ND)
        sink = self._sink(adapters)
        experts.backward(self._back, given, rows, sink, self._ends, tape, room, *arrays)
        return grad_x_ND

    def _sink(self, adapters: AdapterBatch | None) -> experts.Sink:
        ranks = [adapter.spec.rank for adapter in adapters.stack.adapters] if adapters else []
        rank_S = np.array(ranks, np.int64)
        if adapters is None or adapters.sink is None:
            nothing_MS = np.zeros((len(self._paths), len(ranks)), np.int64)
            return experts.Sink(nothing_MS, nothing_MS, rank_S)
        a_MS, b_MS = adapters.sink.places(self._paths)
        return experts.Sink(a_MS, b_MS, rank_S)


@dataclass(frozen=True, slots=True)
class _Call:
    tiled: TiledExperts
    rows: experts.Rows
    tape: experts.Tape
    adapters: AdapterBatch | None


class _Trained(torch.autograd.Function):
    """`TiledExperts` under autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        tiled: TiledExperts,
        rows: experts.Rows,
        adapters: AdapterBatch | None,
    ) -> Tensor:
        y_ND, tape = tiled.run(x_ND, rows, adapters)
        ctx.call = _Call(tiled, rows, tape, adapters)
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        call: _Call = ctx.call
        grad_x_ND = call.tiled.run_back(grads[0], call.rows, call.tape, call.adapters)
        return grad_x_ND, None, None, None


def _slots(adapters: AdapterBatch | None, token_N: Tensor) -> IntArray:
    if adapters is None:
        return np.full(len(token_N), -1)
    slot_N: IntArray = adapters.slot_rows[token_N.numpy()]
    return slot_N


def _places(*shape: int) -> IntArray:
    return np.empty(shape, np.int64)


def _room(*shape: int) -> AnyArray:
    return np.empty(shape, np.uint16)
