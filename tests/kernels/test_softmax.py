import numpy as np
import pytest
import torch

from openmint.kernels import softmax
from tests.kernels.compare import BOUNDS, DTYPES, values

SCALE = 0.3
AT = np.array([[0, 1, 2, 3], [5, 6, 6, 6]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 3, 1 << 40])
def test_probabilities_and_gradient(window, dtype):
    scores = values(2, 3, 8, 7, dtype=dtype)
    exact = scores.float().requires_grad_()
    expected = softmax.reference(exact, torch.from_numpy(AT), window, SCALE)
    probs = softmax.softmax_(scores.clone(), AT, window, SCALE)
    torch.testing.assert_close(probs.float(), expected, **BOUNDS[dtype])
    grad = values(*scores.shape, dtype=dtype, seed=1)
    expected.backward(grad.float())
    slope = softmax.softmax_backward_(grad.clone(), probs, AT, window, SCALE)
    bounds = BOUNDS[dtype] if dtype == torch.float32 else {"rtol": 3e-2, "atol": 5e-3}
    torch.testing.assert_close(slope.float(), exact.grad, **bounds)


def test_what_is_out_of_sight_cannot_poison():
    scores = values(1, 1, 2, 4, dtype=torch.float32)
    at = np.array([[1, 2]])
    clean = softmax.softmax_(scores.clone(), at, 1 << 40, SCALE)
    scores[0, 0, 0, 2:], scores[0, 0, 1, 3] = torch.nan, torch.inf
    assert torch.equal(softmax.softmax_(scores, at, 1 << 40, SCALE), clean)


def test_a_nan_in_sight_is_not_hidden():
    scores = values(1, 1, 1, 4, dtype=torch.float32)
    scores[0, 0, 0, 1] = torch.nan
    probs = softmax.softmax_(scores, np.array([[3]]), 1 << 40, SCALE)
    assert probs.isnan().all()
