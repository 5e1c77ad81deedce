"""PEFT's layout of experts that one module holds as 3D parameters: `target_parameters`.

Two tensors each for `gate_up_proj` and `down_proj` of a layer hold all experts: A `[E * r, in]`
with an expert's rows together, B `[out, r * E]` with an expert's columns *apart*: column `rank * E
+ expert` (measured with peft 0.21). gate and up share their input, hence in PEFT also their A. An
adapter whose gate and up have A's of their own is written with twice the rank and a block-diagonal
B. The rows of gate come before those of up, but alternate with them in gpt-oss. Shapes: E experts,
R rank, I in, O out; G is the rank of `gate_up_proj`, R or 2 R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from openmint.types import TargetStack

Values = npt.NDArray[Any]
Pair = tuple[Values, Values]
"""`A_ERI` and `B_ERO` of all experts of a layer."""

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
GATE_UP = "experts.gate_up_proj"


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """The experts of one layer."""

    path: str
    """Of their module, e.g. `model.layers.3.mlp.experts`."""
    layer: int
    """Which row of the stacks they are."""
    gate: TargetStack
    down: TargetStack
    alternates: bool
    """Whether every other row of `gate_up_proj` is gate's."""

    def names(self, prefix: str) -> tuple[str, str, str, str]:
        """A and B of `gate_up_proj`, A and B of `down_proj`."""
        outer = f"{prefix}{self.path}"
        inner = f"{outer}.base_layer"
        return (
            *(f"{inner}.lora_A.weight", f"{inner}.lora_B.weight"),
            *(f"{outer}.lora_A.weight", f"{outer}.lora_B.weight"),
        )

    def shapes(self, prefix: str, rank: int, gate_up_rank: int) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        count, gate, down = self.gate.grid[-1], self.gate, self.down
        shapes = (
            (count * gate_up_rank, gate.num_in),
            (2 * gate.num_out, gate_up_rank * count),
            (count * rank, down.num_in),
            (down.num_out, rank * count),
        )
        return dict(zip(self.names(prefix), shapes, strict=True))

    def take_apart(
        self, value_of: Callable[[str], Values], prefix: str, rank: int, gate_up_rank: int
    ) -> dict[str, Pair]:
        """`gate_proj` and `up_proj`, both of `gate_up_rank`, and `down_proj`."""
        gate_up_a, gate_up_b, down_a, down_b = map(value_of, self.names(prefix))
        a_EGI, b_EGO = self._by_expert(gate_up_a, gate_up_b, gate_up_rank)
        gate, up = self._rows
        return {
            GATE: (a_EGI, b_EGO[..., gate]),
            UP: (a_EGI, b_EGO[..., up]),
            DOWN: self._by_expert(down_a, down_b, rank),
        }

    def join(self, parts: Mapping[str, Pair], prefix: str) -> dict[str, Values]:
        """PEFT's tensors; `gate_up_proj` has twice the rank."""
        (gate_a, gate_b), (up_a, up_b), (down_a, down_b) = (parts[n] for n in (GATE, UP, DOWN))
        count, rank, width = gate_a.shape
        gate_up_OGE = np.zeros((2 * self.gate.num_out, 2 * rank, count), gate_b.dtype)
        gate, up = self._rows
        gate_up_OGE[gate, :rank] = gate_b.transpose(2, 1, 0)
        gate_up_OGE[up, rank:] = up_b.transpose(2, 1, 0)
        values = (
            np.concatenate([gate_a, up_a], axis=1).reshape(-1, width),
            gate_up_OGE.reshape(len(gate_up_OGE), -1),
            down_a.reshape(-1, self.down.num_in),
            down_b.transpose(2, 1, 0).reshape(self.down.num_out, -1),
        )
        return dict(zip(self.names(prefix), values, strict=True))

    @property
    def _rows(self) -> tuple[slice, slice]:
        """Of `gate_up_proj`: those of gate, those of up."""
        if self.alternates:
            return slice(0, None, 2), slice(1, None, 2)
        return slice(self.gate.num_out), slice(self.gate.num_out, None)

    def _by_expert(self, a: Values, b: Values, rank: int) -> Pair:
        count = self.gate.grid[-1]
        b_ORE = b.reshape(b.shape[0], rank, count)
        return a.reshape(count, rank, a.shape[1]), b_ORE.transpose(2, 1, 0)


def halved(layer: Mapping[str, Pair], rank: int) -> dict[str, Pair] | None:
    """A layer whose gate uses the first `rank` rows of their common A alone, and up the others:
    each with its own. None where one of them uses more."""
    gate_a, gate_b = layer[GATE]
    up_a, up_b = layer[UP]
    if gate_b[:, rank:].any() or up_b[:, :rank].any():
        return None
    return {
        GATE: (gate_a[:, :rank], gate_b[:, :rank]),
        UP: (up_a[:, rank:], up_b[:, rank:]),
        DOWN: layer[DOWN],
    }


def has_experts(stack: TargetStack) -> bool:
    """Whether the stack's targets are those of routed experts."""
    return len(stack.grid) == 2


def fused_experts(stacks: Iterable[TargetStack], *, alternates: bool) -> list[FusedExperts]:
    """The expert modules among them, layer by layer."""
    by_leaf = {stack.name.rpartition(".")[2]: stack for stack in stacks if has_experts(stack)}
    if not by_leaf:
        return []
    gate, down = by_leaf[GATE], by_leaf[DOWN]
    num_layers, count = gate.grid
    paths = [gate.targets[layer * count].path.rsplit(".", 2)[0] for layer in range(num_layers)]
    return [FusedExperts(path, layer, gate, down, alternates) for layer, path in enumerate(paths)]
