import pytest
import torch

from openmint.kernels import rotary
from tests.kernels.compare import DTYPES, assert_same, values

NUM_TOKENS, NUM_HEADS, WIDTH = 11, 5, 8


def angles(dtype):
    turn = torch.rand(NUM_TOKENS, WIDTH // 2, generator=torch.Generator().manual_seed(3)) * 6
    return (both.repeat(1, 2).to(dtype) for both in (turn.cos(), turn.sin()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rotated", [1, 3, NUM_HEADS])
def test_leading_heads_turn_and_the_others_stay(num_rotated, dtype):
    cos, sin = angles(dtype)

    def fused(x):
        turned, rest = rotary.FusedRotary.apply(x, cos, sin, num_rotated)
        return torch.cat((turned, rest), dim=1)

    def reference(x):
        turned = rotary.reference(x, cos.to(x.dtype), sin.to(x.dtype), num_rotated)
        return torch.cat((turned.flatten(1), x[:, num_rotated * WIDTH :]), dim=1)

    assert_same(fused, reference, values(NUM_TOKENS, NUM_HEADS * WIDTH, dtype=dtype))
