"""How the ranks of a worker divide a base: which part of each tensor one of them holds.

Ranks that divide by tensor have some of every layer's heads and feed-forward columns; of two
weights in a row the first is cut by outputs, the second by inputs. Ranks that divide by expert have
some of the experts, whole, and some columns of those that all tokens pass. Ranks that divide data
hold some rows of each weight of a block. What no rule cuts is on every rank.

The families' code does the dividing (docs/decisions/0019-ranks.md). A test compares what it takes
on each rank with what is said here, which can be asked of many placements in a moment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from openmint.errors import InvalidRequest

Axis = Literal["tensor", "expert", "shared"]
Cuts = tuple[Axis | None, ...]
"""What divides each dimension of a tensor; dimensions left out are whole. `shared` is of experts
that all tokens pass."""

CUTS: tuple[tuple[str, Cuts], ...] = (
    (r"indexer\..*", ()),
    (r"(\w*norm|gate|router)\.(weight|bias|e_score_correction_bias)", ()),
    (r"e_score_correction_bias", ()),
    (r"(q_a_proj|kv_a_proj_with_mqa)\.(weight|bias)", ()),
    (r"shared_experts\.(gate|up)_proj\.weight", ("shared",)),
    (r"shared_experts\.down_proj\.weight", (None, "shared")),
    (r"(q|k|v|q_b|kv_b|gate|up)_proj\.(weight|bias)", ("tensor",)),
    (r"(o|down)_proj\.weight", (None, "tensor")),
    (r"(o|down)_proj\.bias", ()),
    (r"sinks", ()),
    (r"experts\.gate_up_proj", ("expert", None, "tensor")),
    (r"experts\.gate_up_proj_bias", ("expert", "tensor")),
    (r"experts\.down_proj", ("expert", "tensor")),
    (r"experts\.down_proj_bias", ()),
    (r"(embed_tokens|lm_head)\.weight", ()),
)
"""By the end of a tensor's name, the first that matches."""
RULES = tuple((re.compile(rf"(?:.*\.)?{end}"), cuts) for end, cuts in CUTS)


def cuts_of(name: str) -> Cuts | None:
    """The rule for a tensor of a checkpoint; None: there is none, for no family has such a one."""
    return next((cuts for rule, cuts in RULES if rule.fullmatch(name)), None)


@dataclass(frozen=True, slots=True)
class Placement:
    """Workers of as many ranks each; a rank is a GPU. Ranks divide by tensor, by expert, by both,
    or data, all of them or none."""

    workers: int
    ranks: int
    """Of one worker."""
    tensor: int = 1
    """`worker.tensor_parallel`: 1, or all ranks."""
    expert: int = 1
    """`worker.expert_parallel`."""
    data: int = 1
    """`worker.data_parallel`."""

    @property
    def by_tensor(self) -> bool:
        return self.tensor > 1

    @property
    def by_expert(self) -> bool:
        return self.expert > 1

    def sizes(self, name: str, shape: Sequence[int], is_expert: bool) -> tuple[int, ...]:
        """The shape of what a rank holds of a tensor that it has something of. `is_expert`: the
        tensor is one expert's.

        Raises InvalidRequest for a name that no rule is for.
        """
        if (cuts := cuts_of(name)) is None:
            raise InvalidRequest(f"no rule says which rank holds what of tensor {name!r}")
        if self.by_expert and (is_expert or "expert" in cuts):
            cuts = tuple("expert" if axis == "expert" else None for axis in cuts)
        cuts = (*cuts, *[None] * (len(shape) - len(cuts)))
        return tuple(self._size(n, axis) for n, axis in zip(shape, cuts, strict=True))

    def count(self, count: int, of_experts: bool) -> int:
        """How many of so many like tensors a rank has something of."""
        return count // self.ranks if of_experts and self.by_expert else count

    def _size(self, size: int, axis: Axis | None) -> int:
        is_cut = {
            "tensor": self.by_tensor,
            "expert": self.by_expert,
            "shared": self.by_tensor or self.by_expert,
            None: False,
        }
        return size // self.ranks if is_cut[axis] else size


@dataclass(frozen=True, slots=True)
class Widths:
    """What ranks have to divide evenly."""

    tensor: frozenset[int]
    """Heads, and widths of feed-forward layers; 1 where attention can't be divided by heads."""
    of_experts: frozenset[int]
    """Widths of routed experts; they matter where experts aren't divided whole."""
    shared: frozenset[int]
    """Widths of experts that all tokens pass."""
    experts: int
    """In a layer; 0: the base has none."""


def placements(gpus: int, widths: Widths) -> list[Placement]:
    """All ways to use these GPUs, small workers first, those that divide data last."""
    sizes = [n for n in range(1, gpus + 1) if gpus % n == 0]
    found = [Placement(gpus // n, n, *way) for n in sizes for way in _ways(n, widths)]
    return found + [Placement(gpus // n, n, data=n) for n in sizes if n > 1]


def _ways(ranks: int, widths: Widths) -> list[tuple[int, int]]:
    """Among how many by tensor, and by expert."""
    if ranks == 1:
        return [(1, 1)]
    by_tensor = _divides(ranks, widths.tensor) and _divides(ranks, widths.shared)
    ways = []
    if widths.experts and widths.experts % ranks == 0 and _divides(ranks, widths.shared):
        ways = [(ranks, ranks)] if by_tensor else []
        ways.append((1, ranks))
    if by_tensor and _divides(ranks, widths.of_experts):
        ways.append((ranks, 1))
    return ways


def _divides(ranks: int, widths: frozenset[int]) -> bool:
    return all(width % ranks == 0 for width in widths)
