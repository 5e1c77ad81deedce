"""PEFT's layout of experts that one module holds as 3D parameters: `target_parameters`.

Two tensors each for `gate_up_proj` and `down_proj` of a layer hold all experts: A `[E * r, in]`
with an expert's rows together, B `[out, r * E]` with an expert's columns *apart*: column `rank * E
+ expert` (measured with peft 0.21). gate and up share their input, hence in PEFT also their A. An
adapter whose gate and up have A's of their own is written with twice the rank and a block-diagonal
B. Shapes: E experts, R rank, I in, O out; G is the rank of `gate_up_proj`, R or 2 R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from openmint.errors import InvalidRequest
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
        """`gate_proj`, `up_proj` and `down_proj`. Raises InvalidRequest for a `gate_up_proj` of
        twice the rank in which gate or up uses both halves."""
        gate_up_a, gate_up_b, down_a, down_b = map(value_of, self.names(prefix))
        a_EGI, b_OGE = self._by_expert(gate_up_a, gate_up_b, gate_up_rank)
        num_out = self.gate.num_out
        gate_OGE, up_OGE = b_OGE[:num_out], b_OGE[num_out:]
        if gate_up_rank > rank and (gate_OGE[:, rank:].any() or up_OGE[:, :rank].any()):
            raise InvalidRequest(
                f"{self.path}: gate_up_proj has rank {gate_up_rank}, twice that of the others, and "
                "gate or up uses more than half of it; train it at their rank"
            )
        down = self._by_expert(down_a, down_b, rank)
        return {
            GATE: (a_EGI[:, :rank], gate_OGE[:, :rank].transpose(2, 1, 0)),
            UP: (a_EGI[:, -rank:], up_OGE[:, -rank:].transpose(2, 1, 0)),
            DOWN: (down[0], down[1].transpose(2, 1, 0)),
        }

    def join(self, parts: Mapping[str, Pair], prefix: str) -> dict[str, Values]:
        """PEFT's tensors; `gate_up_proj` has twice the rank."""
        (gate_a, gate_b), (up_a, up_b), (down_a, down_b) = (parts[n] for n in (GATE, UP, DOWN))
        count, rank, width = gate_a.shape
        gate_up_OGE = np.zeros((2 * self.gate.num_out, 2 * rank, count), gate_b.dtype)
        gate_up_OGE[: self.gate.num_out, :rank] = gate_b.transpose(2, 1, 0)
        gate_up_OGE[self.gate.num_out :, rank:] = up_b.transpose(2, 1, 0)
        values = (
            np.concatenate([gate_a, up_a], axis=1).reshape(-1, width),
            gate_up_OGE.reshape(len(gate_up_OGE), -1),
            down_a.reshape(-1, self.down.num_in),
            down_b.transpose(2, 1, 0).reshape(self.down.num_out, -1),
        )
        return dict(zip(self.names(prefix), values, strict=True))

    def _by_expert(self, a: Values, b: Values, rank: int) -> Pair:
        count = self.gate.grid[-1]
        return a.reshape(count, rank, a.shape[1]), b.reshape(b.shape[0], rank, count)


def has_experts(stack: TargetStack) -> bool:
    """Whether the stack's targets are those of routed experts."""
    return len(stack.grid) == 2


def fused_experts(stacks: Iterable[TargetStack]) -> list[FusedExperts]:
    """The expert modules among them, layer by layer."""
    by_leaf = {stack.name.rpartition(".")[2]: stack for stack in stacks if has_experts(stack)}
    if not by_leaf:
        return []
    gate, down = by_leaf[GATE], by_leaf[DOWN]
    num_layers, count = gate.grid
    paths = [gate.targets[layer * count].path.rsplit(".", 2)[0] for layer in range(num_layers)]
    return [FusedExperts(path, layer, gate, down) for layer, path in enumerate(paths)]
