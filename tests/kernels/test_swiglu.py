import pytest
import torch

from openmint.kernels import swiglu
from tests.kernels.compare import DTYPES, assert_same, values


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_its_gradient(dtype):
    assert_same(swiglu.FusedSwiGLU.apply, swiglu.reference, 3 * values(9, 130, dtype=dtype))


def test_large_gates_saturate_without_overflow():
    gates = torch.tensor([[-200.0, -90.0, 90.0, 200.0, 1.0, 1.0, 1.0, 1.0]])
    out = swiglu.FusedSwiGLU.apply(gates)
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0, 90.0, 200.0]]))
