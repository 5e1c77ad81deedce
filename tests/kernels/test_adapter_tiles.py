"""An adapter's tiles are the strips and panels of its matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openmint.kernels import adapter_tiles
from openmint.kernels.adapter_tiles import Target
from openmint.kernels.compiler import HAS_BF16
from openmint.kernels.tile import panels, strips

pytestmark = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no AVX512-BF16")


def padded(rows_RN: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows_RN, (0, 0, 0, -len(rows_RN) % 8))


def expected(pairs: list[tuple[Tensor, Tensor]], direction: str) -> tuple[Tensor, Tensor]:
    """Strips, then panels, of targets that share an input."""
    whole = [(padded(a_RI), padded(b_RO)) for a_RI, b_RO in pairs]
    if direction == "forth":
        return strips(torch.cat([a for a, _ in whole])), torch.cat(
            [panels(b.t().contiguous()).flatten() for _, b in whole]
        )
    shrinking = torch.cat([strips(b).flatten() for _, b in whole])
    return shrinking, panels(torch.cat([a for a, _ in whole]).t().contiguous())


@pytest.mark.parametrize("direction", ["forth", "back"])
@pytest.mark.parametrize("rank", [1, 5, 8, 24])
def test_tiles_are_the_strips_and_panels(rank: int, direction: adapter_tiles.Direction) -> None:
    layers, matrices, at = [], [], 0
    for num_in, widths in ((48, (96, 16, 8)), (72, (136,))):
        targets, pairs = [], []
        for width in widths:
            targets.append(Target(at, at + rank * num_in, num_in, width))
            pairs.append((torch.randn(rank, num_in), torch.randn(rank, width)))
            at += rank * (num_in + width)
        layers.append(targets)
        matrices.append(pairs)
    flat_P = torch.cat([m.flatten() for pairs in matrices for pair in pairs for m in pair])
    plan = adapter_tiles.plan(rank, layers, direction)
    halves = adapter_tiles.lay_out(flat_P.bfloat16(), plan).view(torch.bfloat16)
    assert halves.data_ptr() % 64 == 0
    for (at_strips, at_panels), pairs in zip(plan.places, matrices, strict=True):
        rounded = [(a.bfloat16(), b.bfloat16()) for a, b in pairs]
        both = zip((at_strips, at_panels), expected(rounded, direction), strict=True)
        for start, wanted in both:
            found = halves[2 * start : 2 * start + wanted.numel()]
            assert torch.equal(found, wanted.flatten())
