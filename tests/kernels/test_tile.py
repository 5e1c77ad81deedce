"""Tiles multiply; a row's sum is the same in every tile."""

from __future__ import annotations

import pytest
import torch

from openmint.kernels.tile import IS_AVAILABLE, panels, strips

pytestmark = pytest.mark.skipif(not IS_AVAILABLE, reason="this CPU has no AVX512-BF16")


def test_panels_hold_64_outputs_pair_by_pair_on_whole_cache_lines() -> None:
    weight_OI = torch.arange(70 * 6, dtype=torch.float32).view(70, 6).bfloat16()
    blocks = panels(weight_OI)
    assert blocks.shape == (2, 3, 64, 2)
    assert blocks.data_ptr() % 64 == 0
    assert torch.equal(blocks[0, 1, 5], weight_OI[5, 2:4])
    assert torch.equal(blocks[1, 2, 5], weight_OI[69, 4:6])
    assert not blocks[1, :, 6:].any()


def test_strips_hold_8_outputs() -> None:
    weight_OI = torch.randn(11, 16).bfloat16()
    blocks = strips(weight_OI)
    assert blocks.shape == (2, 8, 8, 2)
    assert torch.equal(blocks[1, 7, 2], weight_OI[10, 14:16])
    assert not blocks[1, :, 3:].any()
