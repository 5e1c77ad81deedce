"""An int8 weight is its bfloat16 one to half a step; tests/layers/test_linear.py has the rest."""

from __future__ import annotations

import pytest
import torch

from openmint.errors import InvalidRequest
from openmint.kernels.linear import to_int8
from openmint.kernels.team import alone
from openmint.kernels.tile import IS_AVAILABLE
from openmint.layers.linear import TiledLinear, lora_linear


def test_int8_rows_are_within_half_a_step_of_their_weights() -> None:
    weight_OI = torch.randn(40, 64).bfloat16()
    weight_OI[3] = 0.0
    rounded_OI, scale_O = to_int8(weight_OI)
    gap_OI = (rounded_OI.float() * scale_O[:, None] - weight_OI.float()).abs()
    assert bool((gap_OI <= 0.5001 * scale_O[:, None]).all())
    assert int(rounded_OI.abs().max()) == 127


@pytest.mark.skipif(not IS_AVAILABLE, reason="this CPU has no AVX512-BF16")
@pytest.mark.parametrize("num_rows", [1, 7, 40])
def test_an_int8_layer_serves_the_product_with_its_rounded_weights(num_rows: int) -> None:
    parts = [
        (path, (0.1 * torch.randn(width, 48)).bfloat16(), torch.randn(width).bfloat16())
        for path, width in (("q", 72), ("k", 8), ("v", 64))
    ]
    linear = TiledLinear("attn", parts, serves_int8=True)
    x_TI = torch.randn(num_rows, 48).bfloat16()
    rounded = [
        rounded.float() * scale[:, None] for rounded, scale in (to_int8(w) for _, w, _ in parts)
    ]
    bias_O = torch.cat([bias.float() for _, _, bias in parts])
    expected = x_TI.float() @ torch.cat(rounded).t() + bias_O
    torch.testing.assert_close(
        linear.serve(x_TI, None, alone).float(), expected, rtol=1e-2, atol=1e-2
    )
    exact = linear.forward(x_TI, None)[0].float()
    assert 0 < float((exact - expected).norm() / expected.norm()) < 2e-2


def test_int8_without_tiles_is_refused_with_what_it_needs() -> None:
    with pytest.raises(InvalidRequest, match=r"serving_weights = int8 needs .*bfloat16"):
        lora_linear("attn", [("q", torch.randn(16, 16), None)], serves_int8=True)
