"""An adapter's A and B laid out for tiles: strips that shrink, and panels that expand.

P parameters, M parts (targets, in the order of their linear layers), W words of two values. All
layers of an adapter are laid out in one call: after each update of a policy its next step waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openmint.kernels.jit import as_array, kernel
from openmint.kernels.tile import PANEL, STRIP
from openmint.types import IntArray

Direction = Literal["forth", "back"]
"""Which way a linear layer runs."""
SHRINKS, NUM_SHRUNK, EXPANDS, NUM_EXPANDED, STRIPS, PANELS, DEPTH, ROW = range(8)
"""Of a part: where the matrices lie in the vector that shrink and expand, their widths; where their
strips and panels begin, in words; pairs of rows of a panel, and which of them is the part's first.
"""


class Target(NamedTuple):
    """Where A and B of one target lie in the vector, and their widths."""

    a: int
    b: int
    num_in: int
    num_out: int


class Plan(NamedTuple):
    """Where the tiles of an adapter go."""

    rank: int
    parts_M8: IntArray
    places: list[tuple[int, int]]
    """Where the strips and the panels of each linear layer begin, in words."""
    num_words: int


def padded(rank: int) -> int:
    """Rows of one target: whole strips."""
    return -(-rank // STRIP) * STRIP


def plan(rank: int, layers: Sequence[Sequence[Target]], direction: Direction) -> Plan:
    """For targets that share an input, of each linear layer. Forth, strips shrink x by all A's and
    panels expand into each y by its B; back, strips shrink dL/dy part by part by the B's and panels
    expand into dL/dx by all A's together."""
    parts, places, end, rows = [], [], 0, padded(rank)
    for targets in layers:
        num_shrunk = [t.num_in if direction == "forth" else t.num_out for t in targets]
        strips = end
        end += sum(rows * width // 2 for width in num_shrunk)
        panels = end = -(-end // PANEL) * PANEL
        places.append((strips, panels))
        for i, target in enumerate(targets):
            own = strips + sum(rows * width // 2 for width in num_shrunk[:i])
            if direction == "forth":
                shrink, expand = (target.a, target.num_in), (target.b, target.num_out)
                parts.append((*shrink, *expand, own, end, rows // 2, 0))
                end += -(-target.num_out // PANEL) * PANEL * rows // 2
            else:
                shrink, expand = (target.b, target.num_out), (target.a, target.num_in)
                depth = len(targets) * rows // 2
                parts.append((*shrink, *expand, own, panels, depth, i * rows // 2))
        if direction == "back":
            end += -(-targets[0].num_in // PANEL) * PANEL * len(targets) * rows // 2
    return Plan(rank, np.array(parts, np.int64).reshape(-1, 8), places, end)


@kernel
def _lay_out(flat_P: Any, rank: Any, parts_M8: Any, words_W: Any) -> None:
    rows = (rank + STRIP - 1) // STRIP * STRIP
    for m in range(len(parts_M8)):
        part = parts_M8[m]
        width, to = part[NUM_SHRUNK], part[STRIPS]
        for row in range(rows):
            strip = words_W[to + row // STRIP * STRIP * width // 2 :]
            own = flat_P[part[SHRINKS] + row * width :]
            for p in range(width // 2):
                word = np.uint32(0)
                if row < rank:
                    word = np.uint32(own[2 * p]) | (np.uint32(own[2 * p + 1]) << np.uint32(16))
                strip[p * STRIP + row % STRIP] = word
        width, own = part[NUM_EXPANDED], flat_P[part[EXPANDS] :]
        for panel in range((width + PANEL - 1) // PANEL):
            first, count = panel * PANEL, min(PANEL, width - panel * PANEL)
            for pair in range(rows // 2):
                place = part[PANELS] + (panel * part[DEPTH] + part[ROW] + pair) * PANEL
                to_N = words_W[place : place + PANEL]
                to_N[:] = 0
                for r in range(2 * pair, min(2 * pair + 2, rank)):
                    from_N = own[r * width + first : r * width + first + count]
                    for n in range(count):
                        to_N[n] |= np.uint32(from_N[n]) << np.uint32(16 * (r % 2))


def lay_out(flat_P: Tensor, plan: Plan) -> Tensor:
    """The tiles of an adapter of bfloat16 values, as 32-bit words on whole cache lines."""
    room = torch.empty(plan.num_words + PANEL // 4, dtype=torch.int32)
    start = (-room.data_ptr()) % 64 // 4
    words_W = room[start : start + plan.num_words]
    _lay_out(as_array(flat_P), plan.rank, plan.parts_M8, as_array(words_W).view(np.uint32))
    return words_W
